"""The decoder's shape: fields, named sizes, and how many parameters and FLOPs a shape means."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from aromni_jax.config import Count, CountOrZero, Positive, from_mapping


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder.

    `vocab_size` counts rows of the embedding table. `norm_position`: "swin" normalises what attention and MLP return,
    "pre" what they read. `perceptual_dim` is the code width E of the perceptual head, 0 for a model without one.
    `remat` names what the backward pass computes again (`layers.REMAT_POLICIES`). `scan_layers` false unrolls the loop
    over layers: slower to compile, the same parameter tree. `attention` chooses an implementation (`attention.py`).
    """

    vocab_size: Count
    num_layers: Count
    d_model: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    mlp_dim: Count
    perceptual_dim: CountOrZero = 0
    norm_position: Literal["swin", "pre"] = "swin"
    qk_norm: bool = True
    rope_theta: Positive = 10_000.0
    norm_eps: Positive = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "offload", "dots", "attention"] = "none"
    scan_layers: bool = True
    attention: Literal["auto", "reference", "blocked", "splash", "cudnn"] = "auto"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: rotary embedding turns pairs")


_BF16_FULL = {"dtype": "bfloat16", "remat": "full"}


def _shape(layers: int, d: int, heads: int, kv_heads: int, head_dim: int, mlp: int, **rest: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "d_model": d,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp_dim": mlp,
        **rest,
    }


SIZES: dict[str, dict[str, Any]] = {
    "debug": _shape(2, 64, 4, 2, 16, 128),
    "quickstart": _shape(6, 256, 4, 4, 64, 704),
    "100m": _shape(12, 768, 12, 12, 64, 2048, dtype="bfloat16"),
    "1b": _shape(16, 2048, 16, 16, 128, 5504, **_BF16_FULL),
    "7b": _shape(32, 4096, 32, 32, 128, 11008, **_BF16_FULL),
    "34b": _shape(48, 8192, 64, 8, 128, 22016, **_BF16_FULL),
}
"""Named sizes; 7b and 34b are the Chameleon shapes (METHOD section 1)."""


def named_size(name: str) -> dict[str, Any]:
    """The fields of a named size; ValueError with the nearest name for an unknown one."""
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model size {name!r}; known sizes: {', '.join(SIZES)}{hint}")
    return dict(SIZES[name])


def resolve_model(model: str | Mapping[str, Any], vocab_size: int, perceptual_dim: int) -> ModelConfig:
    """The ModelConfig of a named size, or of a mapping of fields that may start from one (`size`).

    Vocabulary and code width come from the tokenizers, so `model` may not set them.

    Raises:
      ValueError: unknown size or field (with the nearest name), or a field that the tokenizers decide.
    """
    fields = {"size": model} if isinstance(model, str) else dict(model)
    for name in ("vocab_size", "perceptual_dim"):
        if name in fields:
            raise ValueError(f"config key 'model.{name}': follows from the tokenizers; remove it")
    base = named_size(fields.pop("size")) if "size" in fields else {}
    values = base | fields | {"vocab_size": vocab_size, "perceptual_dim": perceptual_dim}
    return from_mapping(ModelConfig, values, "model")


def num_parameters(config: ModelConfig) -> int:
    """All trained values: two embedding tables, layers, norms, and the perceptual head if there is one."""
    c = config
    qk_norm = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim if c.qk_norm else 0
    per_layer = _layer_matmul_parameters(c) + 2 * c.d_model + qk_norm
    return 2 * c.vocab_size * c.d_model + c.num_layers * per_layer + c.d_model + c.d_model * c.perceptual_dim


def _layer_matmul_parameters(c: ModelConfig) -> int:
    return c.d_model * (2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.mlp_dim)


def attended_pairs(segment_lengths: Sequence[int] | np.ndarray) -> int:
    """Query-key pairs that causal attention inside documents of these lengths really needs: sum of l (l + 1) / 2."""
    lengths = np.asarray(segment_lengths, np.int64)
    return int((lengths * (lengths + 1) // 2).sum())


def train_flops(config: ModelConfig, num_tokens: float, num_pairs: float) -> float:
    """Model FLOPs of one forward and backward pass over `num_tokens` real tokens (METHOD section 9).

    Causal, within documents, padding and rematerialisation not counted: 6 per matmul weight and token, 12 N H per layer
    and attended query-key pair. Lookups, norms and the perceptual head are left out.
    """
    c = config
    matmul = c.num_layers * _layer_matmul_parameters(c) + c.vocab_size * c.d_model
    return 6.0 * matmul * num_tokens + 12.0 * c.num_layers * c.num_heads * c.head_dim * num_pairs


def train_flops_per_token(config: ModelConfig, segment_lengths: Sequence[int] | np.ndarray) -> float:
    """`train_flops` per real token for documents of these lengths; one length L means unpacked rows of L tokens."""
    num_tokens = float(np.sum(segment_lengths))
    return train_flops(config, num_tokens, attended_pairs(segment_lengths)) / num_tokens
