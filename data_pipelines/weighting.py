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
class Document:
    """An example shifted to next-token form; every array has one entry per target (one less than the tokens).

    tokens   0 5 6 2
    inputs   0 5 6
    targets  5 6 2     weights, modality and perceptual mask describe these
    """

    inputs_L: np.ndarray
    targets_L: np.ndarray
    loss_weights_L: np.ndarray
    modality_L: np.ndarray
    perceptual_mask_L: np.ndarray
    task: Task


def to_document(stored: StoredExample, table_TMR: np.ndarray) -> Document:
    """Shifts an example and looks its weights up; image codes of positive weight count for perceptual alignment."""
    tokens_L = stored.tokens_L
    lengths, modalities, roles = stored.spans_S6[:, 1], stored.spans_S6[:, 2], stored.spans_S6[:, 3]
    weights_L = np.repeat(table_TMR[stored.task, modalities, roles], lengths)
    is_code_L = np.zeros(len(tokens_L), bool)
    for start, length, modality, _, _, part in stored.spans_S6.tolist():
        if modality == Modality.IMAGE and part >= 0:
            codes = slice(start + 1, start + length - 1)  # between the begin and the end of the image
            is_code_L[codes] = weights_L[codes] > 0
    return Document(
        inputs_L=tokens_L[:-1],
        targets_L=tokens_L[1:],
        loss_weights_L=weights_L[1:],
        modality_L=np.repeat(modalities, lengths)[1:],
        perceptual_mask_L=is_code_L[1:],
        task=stored.task,
    )
