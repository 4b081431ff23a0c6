"""Our side of `aromni bench train`: the train step, and its parts each compiled and timed by itself."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax import losses, partitioning
from aromni_jax.config import TrainConfig, from_mapping
from aromni_jax.interop.chameleon import Provenance, TreeSource, export_chameleon
from aromni_jax.models.attention import attention
from aromni_jax.models.config import attended_pairs, num_parameters, resolve_model, train_flops
from aromni_jax.structs import PackedBatch
from aromni_jax.train.state import init_state
from aromni_jax.train.step import loss_and_gradients, make_learning_rate, make_train_step
from aromni_jax.vocab import JointVocab

_REPEATS, _WARM_UP = 3, 2
"""Calls of a part that are timed, and those before them."""


class _EveryRow(JointVocab):
    """The peer knows no rows without a meaning: they are all in its softmax, so here they are in ours."""

    @property
    def valid_mask_V(self) -> np.ndarray:  # type: ignore[override]
        return np.ones(self.size, bool)


class Trainer:
    """A state and the step that trains it on the named batches, all of one shape."""

    def __init__(self, directory: Path, batches: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        self._train = from_mapping(TrainConfig, json.loads((directory / "config.json").read_text(encoding="utf-8")))
        self._vocab = _EveryRow.from_json((directory / "vocab.json").read_text(encoding="utf-8"))
        self._model = resolve_model(self._train.model, self._vocab.size, 0)
        self._mesh = partitioning.make_mesh(self._train.mesh)
        self._state = init_state(self._model, self._train, self._mesh)
        self._host_batches = batches
        self._batches = {
            name: partitioning.put_batch(PackedBatch(**fields), self._mesh) for name, fields in batches.items()
        }
        self._rate, self._num_steps = make_learning_rate(self._train, self._mesh), 0
        step: Any = make_train_step(self._model, self._train, self._mesh, self._vocab)
        self._step = step.lower(self._state, self._batches["dense"], self._rate(0)).compile()

    def describe(self) -> dict[str, Any]:
        """Device and shape; of each batch its useful `tokens` and model `flops`."""
        counted: dict[str, Any] = {}
        for name, fields in self._host_batches.items():
            segments_BL, positions_BL = fields["segment_ids_BL"], fields["positions_BL"]
            tokens = int((segments_BL > 0).sum())
            pairs = int(np.where(segments_BL > 0, positions_BL.astype(np.int64) + 1, 0).sum())
            counted[name] = {"tokens": tokens, "flops": train_flops(self._model, tokens, pairs)}
        rows, length = self._host_batches["dense"]["inputs_BL"].shape
        model = self._model
        return counted | {
            "device": jax.devices()[0].device_kind,
            "parameters": num_parameters(model),
            "shape": f"{rows} rows of {length}, {model.num_layers} layers of {model.d_model}, {model.vocab_size} rows "
            f"of vocabulary, {model.dtype}",
        }

    def write_weights(self, directory: Path) -> None:
        """An export of the weights, for the peer to start from."""
        length = self._host_batches["dense"]["inputs_BL"].shape[1]
        export_chameleon(
            TreeSource(jax.device_get(self._state.params)),
            self._model,
            self._vocab,
            directory,
            provenance=Provenance(step=0, max_positions=length),
            dtype="float32",
        )

    def step(self, name: str) -> float:
        """Trains one step on a batch; its loss."""
        rate = self._rate(self._num_steps)
        self._state, metrics = self._step(self._state, self._batches[name], rate)
        self._num_steps += 1
        return float(metrics["loss"])

    def squares(self, width: int) -> tuple[jax.Array, jax.Array]:
        """Two square matrices of random numbers, whose product is as large as the first."""
        keys = jax.random.split(jax.random.key(0))
        x, w = (jax.random.normal(key, (width, width), self._model.dtype) for key in keys)
        return x, w * width**-0.5

    def products(self, squares: tuple[jax.Array, jax.Array], count: int) -> None:
        """`count` products of square matrices, one after the other."""
        x, w = squares
        for _ in range(count):
            x = _product(x, w)
        x.block_until_ready()

    def parts(self) -> dict[str, dict[str, float]]:
        """Seconds and model FLOPs of attention, loss, the rest of the layers, and the update, on the dense batch."""
        model, state, batch = self._model, self._state, self._batches["dense"]
        rows, length = batch.inputs_BL.shape
        pairs, tokens = rows * attended_pairs([length]), rows * length
        key = jax.random.key(0)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, batch.segment_ids_BL, implementation=model.attention).astype(jnp.float32).sum()

        q, k, v = (
            jax.random.normal(key, (rows, length, heads, model.head_dim), model.dtype)
            for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        )
        of_attention = model.num_layers * self._seconds(jax.grad(attend, (0, 1, 2)), q, k, v)

        def lose(hidden_BLD: jax.Array, table_VD: jax.Array) -> jax.Array:
            sums = losses.next_token_loss(
                hidden_BLD,
                table_VD,
                batch,
                valid_mask_V=self._vocab.valid_mask_V,
                chunk_tokens=self._train.loss.chunk_tokens,
                z_loss_weight=self._train.loss.z_loss_weight,
            )
            return sums.objective / tokens

        hidden_BLD = jax.random.normal(key, (rows, length, model.d_model), model.dtype)
        of_loss = self._seconds(jax.value_and_grad(lose, (0, 1)), hidden_BLD, state.params["unembedding"])

        def differentiate(params: Any) -> Any:
            return loss_and_gradients(model, self._train, self._vocab, params, state.frozen, batch)

        of_gradients = self._seconds(differentiate, state.params)
        of_step = statistics.median(self._timed(lambda: self.step("dense")))
        attention_flops = 12.0 * model.num_layers * model.num_heads * model.head_dim * pairs
        loss_flops = 6.0 * model.vocab_size * model.d_model * tokens
        layer_flops = train_flops(model, tokens, pairs) - attention_flops - loss_flops
        return {
            "attention": {"seconds": of_attention, "flops": attention_flops},
            "loss": {"seconds": of_loss, "flops": loss_flops},
            "layers": {"seconds": max(of_gradients - of_attention - of_loss, 0.0), "flops": layer_flops},
            "update": {"seconds": max(of_step - of_gradients, 0.0), "flops": 0.0},
        }

    def _seconds(self, function: Callable[..., Any], *args: Any) -> float:
        compiled = jax.jit(partitioning.on_mesh(function, self._mesh)).lower(*args).compile()
        return statistics.median(self._timed(lambda: jax.block_until_ready(compiled(*args))))

    def _timed(self, call: Callable[[], Any]) -> list[float]:
        times = []
        for _ in range(_WARM_UP + _REPEATS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times[_WARM_UP:]


@jax.jit
def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w
