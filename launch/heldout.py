"""Losses on held-out data sets between the steps of a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from aromni_jax import partitioning
from aromni_jax.config import TrainConfig
from aromni_jax.train.metrics import MetricsWindow
from aromni_jax.train.step import make_eval_step
from data_pipelines.pipeline import evaluation_batches, load_examples

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from aromni_jax.models.config import ModelConfig
    from aromni_jax.train.state import Frozen, TrainState
    from aromni_jax.vocab import JointVocab


class HeldOutLosses:
    """Measures a training state on the data sets of `data.evaluation`, each for itself: {"NAME/loss/image": nats, ...}.

    Every target counts once, whatever the training weights, so numbers of different runs stand side by side. A call is
    one of `loop.Evaluate`.

    Raises:
      ValueError: a data set that is not there, is empty, was made with another vocabulary, or holds longer records than
        `sequence_length`.
    """

    def __init__(
        self, config: TrainConfig, model: ModelConfig, vocab: JointVocab, mesh: Mesh, frozen: Frozen | None
    ) -> None:
        self._config, self._mesh = config, mesh
        self._step = make_eval_step(model, config, mesh, vocab, frozen)
        rows = partitioning.local_rows(mesh, config.global_batch_size)
        self._batches = {}
        for name, directory in config.data.evaluation.items():
            limit = config.data.evaluation_examples or None
            examples = [stored.example for stored in load_examples(directory, vocab, limit=limit)]
            if not examples:
                raise ValueError(f"config key 'data.evaluation.{name}': the data set {directory} has no records")
            self._batches[name] = list(
                evaluation_batches(
                    examples,
                    vocab,
                    sequence_length=config.sequence_length,
                    batch_size=config.global_batch_size,
                    local_rows=rows,
                )
            )

    def __call__(self, state: TrainState, step: int, is_stopping: Callable[[], bool]) -> dict[str, Any] | None:
        results: dict[str, Any] = {}
        for name, batches in self._batches.items():
            measured = []
            for batch in batches:
                if is_stopping():
                    return None
                placed = partitioning.put_batch(batch, self._mesh)
                measured.append(jax.device_get(self._step(state.params, state.frozen, placed, state.step)))
            line = MetricsWindow.of_evaluation(measured, self._config.loss)
            results |= {f"{name}/{key}": value for key, value in line.items() if not key.startswith("weight_share")}
        return results
