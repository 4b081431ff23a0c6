"""Meta's own layout of Chameleon (and Anole): `params.json` and `consolidated.pth`, or a file per model-parallel rank.

Every rank holds a part of each matrix, so a tensor is joined from all files when it is asked for. Queries and keys are
in interleaved rotary order, and each rank has one QK-norm vector that all of its heads share.

Source of names and joins: the public loader of facebookresearch/chameleon and `convert_chameleon_weights_to_hf.py` of
transformers (Apache-2.0).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aromni_jax.interop.torch_files import StoredTensor, read_torch_file
from aromni_jax.interop.weight_files import LazyTensor, check_dtype, read_json

PARAMS_FILE = "params.json"
_MORE_PARAMS_FILE = "consolidate_params.json"

Join = Literal["rows", "columns", "stack", "mean"]

_TABLE: dict[str, tuple[str, Join]] = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", "columns"),
    "model.layers.{}.self_attn.q_proj.weight": ("layers.{}.attention.wq.weight", "rows"),
    "model.layers.{}.self_attn.k_proj.weight": ("layers.{}.attention.wk.weight", "rows"),
    "model.layers.{}.self_attn.v_proj.weight": ("layers.{}.attention.wv.weight", "rows"),
    "model.layers.{}.self_attn.o_proj.weight": ("layers.{}.attention.wo.weight", "columns"),
    "model.layers.{}.self_attn.q_norm.weight": ("layers.{}.attention.q_normalization.weight", "stack"),
    "model.layers.{}.self_attn.q_norm.bias": ("layers.{}.attention.q_normalization.bias", "stack"),
    "model.layers.{}.self_attn.k_norm.weight": ("layers.{}.attention.k_normalization.weight", "stack"),
    "model.layers.{}.self_attn.k_norm.bias": ("layers.{}.attention.k_normalization.bias", "stack"),
    "model.layers.{}.input_layernorm.weight": ("layers.{}.attention_norm.weight", "mean"),
    "model.layers.{}.mlp.gate_proj.weight": ("layers.{}.feed_forward.w1.weight", "rows"),
    "model.layers.{}.mlp.up_proj.weight": ("layers.{}.feed_forward.w3.weight", "rows"),
    "model.layers.{}.mlp.down_proj.weight": ("layers.{}.feed_forward.w2.weight", "columns"),
    "model.layers.{}.post_attention_layernorm.weight": ("layers.{}.ffn_norm.weight", "mean"),
    "model.norm.weight": ("norm.weight", "mean"),
    "lm_head.weight": ("output.weight", "rows"),
}
"""Name of transformers -> (Meta's name, how the parts of the ranks make the whole). `mean`: all ranks hold the tensor,
and transformers takes their mean, which is the tensor itself where they are equal."""
_JOINS: dict[str, Join] = dict(_TABLE.values())
_DERIVED = "rope.freqs"
"""A buffer that follows from the parameters; in Anole's files it is there and None."""


def consolidated_name(name: str) -> str:
    """Meta's name of the tensor that transformers calls `name`."""
    layer = re.search(r"\.(\d+)\.", name)
    return _TABLE[re.sub(r"\.\d+\.", ".{}.", name)][0].format(layer[1] if layer else "")


@dataclasses.dataclass(frozen=True)
class JoinedTensor:
    """A `LazyTensor` whose parts lie in the files of several ranks."""

    parts: tuple[StoredTensor, ...]
    join: Join

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first, count = self.parts[0].shape, len(self.parts)
        if self.join == "stack":
            return (count, *first)
        if self.join == "mean":
            return first
        axis = self._axis()
        return (*first[:axis], count * first[axis], *first[axis + 1 :])

    def _axis(self) -> int:
        return 1 if self.join == "columns" else 0

    def read(self) -> np.ndarray:
        if self.join == "mean":
            total = sum(part.read().astype(np.float32) for part in self.parts)
            return np.asarray(total / len(self.parts)).astype(self.dtype)
        whole = np.empty(self.shape, self.dtype)
        along = np.moveaxis(whole, self._axis(), 0)
        size = len(along) // len(self.parts)
        for rank, part in enumerate(self.parts):  # one part at a time beside the whole
            along[rank * size : (rank + 1) * size] = np.moveaxis(
                part.read().reshape(self._part_shape()), self._axis(), 0
            )
        return whole

    def _part_shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (1, *first) if self.join == "stack" else first


def architecture_of_params(directory: Path) -> dict[str, Any]:
    """The fields of `ModelConfig` that `params.json` stands for; `vocab_size` is not in it.

    Raises:
      ValueError: not JSON, a key is missing or has no sense, or the model has no QK-norm.
    """
    path = directory / PARAMS_FILE
    params = read_json(path)
    more = directory / _MORE_PARAMS_FILE
    try:
        params = {**params, **params.get("model", {}), **(read_json(more) if more.is_file() else {})}
        d_model, num_heads = int(params["dim"]), int(params["n_heads"])
        multiple = int(params.get("multiple_of") or 256)
        # As the published code rounds it: two thirds of 4 D, times the multiplier, up to a multiple.
        width = int(float(params.get("ffn_dim_multiplier") or 1.0) * int(2 * 4 * d_model / 3))
        if not params.get("qk_normalization", True):
            raise ValueError(f"{path} has qk_normalization = False; only models with QK-norm can be imported")
        return {
            "num_layers": int(params["n_layers"]),
            "d_model": d_model,
            "num_heads": num_heads,
            "num_kv_heads": int(params.get("n_kv_heads") or num_heads),
            "head_dim": d_model // num_heads,
            "mlp_dim": -(-width // multiple) * multiple,
            "norm_position": "swin" if params.get("swin_norm") else "pre",
            "qk_norm": True,
            "rope_theta": float(params.get("rope_theta") or 10_000.0),
            "norm_eps": float(params.get("norm_eps") or 1e-5),
        }
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; Chameleon's params.json has it, perhaps below 'model'") from None
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not the params.json of a Chameleon: {error!r}") from None


def consolidated_entries(directory: Path) -> tuple[dict[str, LazyTensor], int]:
    """(the tensors of Meta's files by Meta's names, joined over ranks; how many ranks there are).

    Raises:
      ValueError: a file is missing or damaged, the files do not hold the same tensors, or one of those is not stored as
        plain floating point.
    """
    files = _files(directory)
    ranks = [_state_dict(path) for path in files]
    for path, rank in zip(files, ranks, strict=True):
        different = sorted(rank.keys() ^ ranks[0].keys())
        if different:
            raise ValueError(
                f"{path} and {files[0].name} should hold parts of the same tensors, but only one of them has "
                f"{different[0]}; fetch them again"
            )
        for name, tensor in rank.items():
            first = ranks[0][name]
            if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, but {first.dtype} {list(first.shape)} in "
                    f"{files[0].name}; fetch them again"
                )
    joined: dict[str, LazyTensor] = {}
    for name in ranks[0]:
        # An unknown name is kept as it is, to be named by the check of names and shapes.
        join, shape = _JOINS.get(re.sub(r"\.\d+\.", ".{}.", name)), ranks[0][name].shape
        if join and len(shape) != (2 if join in ("rows", "columns") else 1):
            raise ValueError(f"{directory}: {name} has shape {list(shape)}, which has a dimension too many or too few")
        joined[name] = JoinedTensor(tuple(rank[name] for rank in ranks), join or "mean")
    return joined, len(files)


def _files(directory: Path) -> list[Path]:
    """One file per rank, as many as there are: how the published loader counts them."""
    if (directory / "consolidated.pth").is_file():
        return [directory / "consolidated.pth"]
    found = {path.name: path for path in directory.glob("consolidated.[0-9][0-9].pth")}
    more = directory / _MORE_PARAMS_FILE
    declared = read_json(more).get("model_parallel_size") if more.is_file() else None
    count = max(declared or 1, 1 + max((int(name[13:15]) for name in found), default=0))
    wanted = [f"consolidated.{rank:02d}.pth" for rank in range(count)]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{directory} has {PARAMS_FILE} but lacks {', '.join(missing)}"
            + ("" if found else " (and consolidated.pth)")
            + "; fetch it again"
        )
    return [found[name] for name in wanted]


def _state_dict(path: Path) -> dict[str, StoredTensor]:
    content = read_torch_file(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no dictionary of tensors")
    tensors = {}
    for name, value in content.items():
        if name == _DERIVED:
            continue
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise ValueError(f"{path} holds no dictionary of tensors: {name!r} is a {type(value).__name__}")
        check_dtype(value.dtype, path, name)
        tensors[name] = value
    return tensors
