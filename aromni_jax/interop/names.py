"""One table between our parameter tree and the tensor names of Hugging Face Chameleon, read in both directions.

A row says where a tensor lives in our tree, what it is called there, and how its dimensions are rearranged, in the
letters of `aromni_jax.arrays`: `DNH->(NH)D` is a kernel [D, N, H] stored there as a Linear weight (out = N*H, in = D).
Names with `{layer}` stand for one tensor per layer there and for one slice of a stacked leaf [n, ...] here.

Source of the names and shapes: `transformers` (Apache-2.0), `ChameleonForConditionalGeneration`, version 5.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from aromni_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """One row of the table: `path` in our tree, `name` in theirs, `layout` "ours->theirs"."""

    path: str
    name: str
    layout: str

    @property
    def per_layer(self) -> bool:
        """True where ours is a stacked leaf and theirs is one tensor per layer."""
        return "{layer}" in self.name

    @property
    def is_extra(self) -> bool:
        """True for what transformers has no place for; it is kept in a file of its own."""
        return self.name.startswith(EXTRA_PREFIX)

    def their_name(self, layer: int | None) -> str:
        return self.name.format(layer=layer)

    def _groups(self) -> tuple[str, list[str]]:
        ours, theirs = self.layout.split("->")
        return ours, [group.strip("()") for group in re.findall(r"\([A-Z]+\)|[A-Z]", theirs)]

    def our_shape(self, dims: dict[str, int]) -> tuple[int, ...]:
        """Shape of one layer's slice in our tree."""
        return tuple(dims[letter] for letter in self._groups()[0])

    def their_shape(self, dims: dict[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(dims[letter] for letter in group) for group in self._groups()[1])

    def to_theirs(self, array: np.ndarray, dims: dict[str, int]) -> np.ndarray:
        """[our_shape] -> [their_shape]; values are untouched."""
        ours, groups = self._groups()
        order = [ours.index(letter) for letter in "".join(groups)]
        return array.transpose(order).reshape(self.their_shape(dims))

    def to_ours(self, array: np.ndarray, dims: dict[str, int]) -> np.ndarray:
        """Inverse of `to_theirs`."""
        ours, groups = self._groups()
        letters = "".join(groups)
        order = [letters.index(letter) for letter in ours]
        return array.reshape([dims[letter] for letter in letters]).transpose(order)


EXTRA_PREFIX = "aromni."

TABLE: tuple[TensorRule, ...] = (
    TensorRule("embedding", "model.embed_tokens.weight", "VD->VD"),
    TensorRule("layers/attention/q", "model.layers.{layer}.self_attn.q_proj.weight", "DNH->(NH)D"),
    TensorRule("layers/attention/k", "model.layers.{layer}.self_attn.k_proj.weight", "DKH->(KH)D"),
    TensorRule("layers/attention/v", "model.layers.{layer}.self_attn.v_proj.weight", "DKH->(KH)D"),
    TensorRule("layers/attention/o", "model.layers.{layer}.self_attn.o_proj.weight", "NHD->D(NH)"),
    TensorRule("layers/attention/q_norm/scale", "model.layers.{layer}.self_attn.q_norm.weight", "NH->NH"),
    TensorRule("layers/attention/q_norm/bias", "model.layers.{layer}.self_attn.q_norm.bias", "NH->NH"),
    TensorRule("layers/attention/k_norm/scale", "model.layers.{layer}.self_attn.k_norm.weight", "KH->KH"),
    TensorRule("layers/attention/k_norm/bias", "model.layers.{layer}.self_attn.k_norm.bias", "KH->KH"),
    TensorRule("layers/attention_norm/scale", "model.layers.{layer}.input_layernorm.weight", "D->D"),
    TensorRule("layers/mlp/gate", "model.layers.{layer}.mlp.gate_proj.weight", "DF->FD"),
    TensorRule("layers/mlp/up", "model.layers.{layer}.mlp.up_proj.weight", "DF->FD"),
    TensorRule("layers/mlp/down", "model.layers.{layer}.mlp.down_proj.weight", "FD->DF"),
    TensorRule("layers/mlp_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight", "D->D"),
    TensorRule("final_norm/scale", "model.norm.weight", "D->D"),
    TensorRule("unembedding", "lm_head.weight", "VD->VD"),
    TensorRule("perceptual_head/kernel", EXTRA_PREFIX + "perceptual_head.weight", "DE->ED"),
)


def dimensions(model: ModelConfig) -> dict[str, int]:
    """Sizes of the letters the table uses."""
    return {
        "V": model.vocab_size,
        "D": model.d_model,
        "N": model.num_heads,
        "K": model.num_kv_heads,
        "H": model.head_dim,
        "F": model.mlp_dim,
        "E": model.perceptual_dim,
    }


def rules(model: ModelConfig) -> tuple[TensorRule, ...]:
    """The rows that apply to `model`.

    Raises:
      ValueError: the model has no counterpart in Chameleon (no QK-norm, or heads that do not make up the width).
    """
    if not model.qk_norm:
        raise ValueError(
            "Chameleon always normalises queries and keys; a model with qk_norm=False has no Chameleon form"
        )
    if model.num_heads * model.head_dim != model.d_model:
        raise ValueError(
            f"Chameleon needs num_heads * head_dim = d_model, this model has {model.num_heads} * {model.head_dim} and "
            f"{model.d_model}"
        )
    return tuple(rule for rule in TABLE if model.perceptual_dim or not rule.is_extra)


def layers_of(rule: TensorRule, model: ModelConfig) -> list[int | None]:
    """The layers a rule makes tensors for; [None] for a tensor that is not stacked."""
    return list(range(model.num_layers)) if rule.per_layer else [None]


def leaf_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers/attention/q": leaf, ...} of a nested dict."""
    return dict(traverse_util.flatten_dict(dict(params), sep="/"))


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `leaf_paths`."""
    return dict(traverse_util.unflatten_dict(leaves, sep="/"))


def deinterleave_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (heads * H, ...) of a query or key projection from interleaved to half-split rotary order.

    Interleaved RoPE rotates features (2i, 2i+1) of a head together, half-split RoPE (i, i + H/2). For one head, H = 4:
    rows [a0 b0 a1 b1] become [a0 a1 b0 b1].
    """
    heads = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
    return np.swapaxes(heads, 1, 2).reshape(weight.shape)


def deinterleave_norm(vectors: np.ndarray, num_heads: int) -> np.ndarray:
    """Interleaved QK-norm vectors become one half-split row per head: [H] or [S, H] -> [num_heads, H].

    Each of S vectors, S a divisor of `num_heads`, is shared by as many neighbouring heads.
    """
    rows = vectors.reshape(-1, vectors.shape[-1])
    half_split = np.swapaxes(rows.reshape(len(rows), -1, 2), 1, 2).reshape(rows.shape)
    return np.repeat(half_split, num_heads // len(rows), axis=0)
