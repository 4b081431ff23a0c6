"""Loss weights from facts, chosen when data is loaded: shards never need to be made again for another objective.

Every weighting is a table of weights by task, modality and role of the target token:

    uniform    1 everywhere
    response   2 on the response of recognition and captioning, else 1 (the authors' stage 1; METHOD section 4)
    balanced   w_m = share_m ** -0.5 for modality m with that share of all training targets, times
               `task_modality_weights[task][modality]` (1 where not named); scaled to mean 1 over the training targets
    sft        1 on responses, `transcript_weight` on transcripts, else 0
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np

from aromni_jax.config import LossConfig
from aromni_jax.structs import Modality, Role, Task
from data_pipelines.records import StoredExample

_RESPONSE_WEIGHT = 2.0
_DOUBLED_TASKS = (Task.SPEECH_TO_TEXT, Task.CAPTION)

UNIFORM_TMR = np.ones((len(Task), len(Modality), len(Role)), np.float32)
"""Every target counts 1."""


def weight_table(config: LossConfig, counts_TMR: np.ndarray) -> np.ndarray:
    """float32 [task, modality, role] weights; `counts_TMR` counts the training targets (used by `balanced`).

    Raises:
      ValueError: `task_modality_weights` names a task or modality there is not, or a negative weight.
    """
    table_TMR = UNIFORM_TMR.copy()
    scale_TM = _task_modality_scale(config)
    if config.weighting == "response":
        table_TMR[list(_DOUBLED_TASKS), :, Role.RESPONSE] = _RESPONSE_WEIGHT
    elif config.weighting == "balanced":
        table_TMR *= (_modality_weights(counts_TMR) * scale_TM)[:, :, None]
        total = counts_TMR.sum()
        mean = float((table_TMR * counts_TMR).sum() / total) if total else 1.0
        if mean == 0:
            raise ValueError("config key 'loss.task_modality_weights': every training token has weight 0")
        table_TMR /= mean
    elif config.weighting == "sft":
        table_TMR[:] = 0
        table_TMR[:, :, Role.RESPONSE] = 1
        table_TMR[:, :, Role.TRANSCRIPT] = config.transcript_weight
    return table_TMR


def _modality_weights(counts_TMR: np.ndarray) -> np.ndarray:
    counts_M = counts_TMR.sum(axis=(0, 2)).astype(np.float64)
    share_M = counts_M / max(counts_M.sum(), 1)
    return np.where(share_M > 0, np.maximum(share_M, 1e-12) ** -0.5, 1.0)


def _task_modality_scale(config: LossConfig) -> np.ndarray:
    scale_TM = np.ones((len(Task), len(Modality)))
    for task_name, row in config.task_modality_weights.items():
        task = Task.from_name(task_name)
        for modality_name, weight in row.items():
            labels = [modality.label for modality in Modality]
            if modality_name not in labels:
                near = difflib.get_close_matches(modality_name, labels, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(labels)}"
                raise ValueError(
                    f"config key 'loss.task_modality_weights.{task_name}': no modality {modality_name!r}; {hint}"
                )
            if weight < 0:
                raise ValueError(
                    f"config key 'loss.task_modality_weights.{task_name}.{modality_name}': {weight} is negative"
                )
            scale_TM[task, labels.index(modality_name)] = weight
    return scale_TM


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """Examples shifted to next-token form, one after another; every array has one entry per target.

    Each example of n tokens has n - 1 targets, so no target crosses from one to the next:

        tokens    0 5 6 2 | 0 7 2
        inputs    0 5 6     0 7
        targets   5 6 2     7 2       weights, modality, task and perceptual mask describe these
        positions 0 1 2     0 1
    """

    inputs_L: np.ndarray
    targets_L: np.ndarray
    positions_L: np.ndarray
    loss_weights_L: np.ndarray
    modality_L: np.ndarray
    task_L: np.ndarray
    perceptual_mask_L: np.ndarray
    lengths_N: np.ndarray


def to_targets(examples: Sequence[StoredExample], table_TMR: np.ndarray) -> Targets:
    """Shifts `examples` (at least one) and looks their weights up; image codes of positive weight count for perceptual
    alignment.

    All at once: a row of short documents costs hardly more than one of a single long document.
    """
    spans_S6 = np.concatenate([stored.spans_S6 for stored in examples])
    num_spans_N = [len(stored.spans_S6) for stored in examples]
    lengths_N = np.array([len(stored.tokens_L) - 1 for stored in examples])
    tasks_N = np.array([stored.task for stored in examples], np.int32)
    modality_S, parts_S = spans_S6[:, 2], spans_S6[:, 5]
    example_S = np.repeat(np.arange(len(examples)), num_spans_N)
    weights_S = table_TMR[tasks_N[example_S], modality_S, spans_S6[:, 3]]
    ends_S = np.cumsum(spans_S6[:, 1])
    # The first token of an example is no target: the span it is in has one target less than tokens.
    targets_S = spans_S6[:, 1].copy()
    targets_S[np.searchsorted(ends_S, np.cumsum(lengths_N + 1) - lengths_N - 1, side="right")] -= 1
    num_targets = int(lengths_N.sum())
    perceptual_mask_L = np.zeros(num_targets, bool)
    for span in np.flatnonzero((modality_S == Modality.IMAGE) & (parts_S >= 0) & (weights_S > 0)).tolist():
        # Between the begin and the end of the picture; token t of example e is target t - e - 1 of all.
        last = ends_S[span] - 1 - example_S[span] - 1
        perceptual_mask_L[last - (spans_S6[span, 1] - 2) : last] = True
    return Targets(
        inputs_L=np.concatenate([stored.tokens_L[:-1] for stored in examples]),
        targets_L=np.concatenate([stored.tokens_L[1:] for stored in examples]),
        positions_L=np.arange(num_targets, dtype=np.int32)
        - np.repeat((np.cumsum(lengths_N) - lengths_N).astype(np.int32), lengths_N),
        loss_weights_L=np.repeat(weights_S, targets_S),
        modality_L=np.repeat(modality_S, targets_S),
        task_L=np.repeat(tasks_N, lengths_N),
        perceptual_mask_L=perceptual_mask_L,
        lengths_N=lengths_N,
    )
