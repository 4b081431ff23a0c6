"""The tensors of a Hugging Face directory by name, safetensors or torch, in one file or in shards; none is read yet.

Which files count is decided as transformers decides it: safetensors before torch, and of each the single file before
the shards that an index lists. Names come out as `interop.names` has them, whatever wrapper saved the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import safetensors

from aromni_jax.interop.container import INDEX_NAME
from aromni_jax.interop.torch_files import read_state_dict

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = (INDEX_NAME, "pytorch_model.bin.index.json")
"""The index that belongs to each of `SINGLE_FILES`."""

_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
READABLE_DTYPES = frozenset(_DTYPES.values())

_PREFIXES = (
    ("module.", ""),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""Beginnings of names and what they stand for: distributed wrappers of torch, and the nesting that transformers gives
most of its multimodal classes since 4.52 (Chameleon itself kept `model.layers`) and gave them before."""
_DERIVED = (".rotary_emb.inv_freq",)
"""Ends of names of buffers that follow from the config; old transformers saved them."""


class LazyTensor(Protocol):
    """A tensor that lies in a file: its shape and type are known, `read` gives its values."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray:
        """The values, as an array of their own; ValueError names a damaged file."""
        ...


@dataclasses.dataclass(frozen=True)
class SafetensorsEntry:
    """A `LazyTensor` of a safetensors file."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        try:
            with safetensors.safe_open(self.path, "numpy") as handle:
                return handle.get_tensor(self.name)
        except safetensors.SafetensorError as error:
            raise _damaged(self.path, error) from None


def read_json(path: Path) -> Any:
    """The JSON in `path`; ValueError for anything else in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or export the directory again") from None


def check_dtype(dtype: np.dtype | str, path: Path, name: str) -> None:
    """Raises ValueError for weights that are not plain floating point (quantized ones, say)."""
    if dtype not in READABLE_DTYPES:
        readable = ", ".join(sorted(known.name for known in READABLE_DTYPES))
        raise ValueError(f"{path} stores {name} as {dtype}; only {readable} can be read: take the unquantized weights")


def safetensors_entries(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file; only its header is read.

    Raises:
      ValueError: the file is cut short or damaged, or a tensor has a type that cannot be read.
    """
    found: dict[str, LazyTensor] = {}
    try:
        with safetensors.safe_open(path, "numpy") as handle:
            for name in handle.keys():
                tensor = handle.get_slice(name)
                code = tensor.get_dtype()
                check_dtype(_DTYPES.get(code, code), path, name)
                found[name] = SafetensorsEntry(path, name, _DTYPES[code], tuple(tensor.get_shape()))
    except safetensors.SafetensorError as error:
        raise _damaged(path, error) from None
    return found


def torch_entries(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one torch file; only its pickle is read, by the interpreter of `torch_files`.

    Raises:
      ValueError: as `read_state_dict`, or a tensor has a type that cannot be read.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in read_state_dict(path).items():
        if not name.endswith(_DERIVED):
            check_dtype(tensor.dtype, path, name)
        found[name] = tensor
    return found


def directory_entries(directory: Path) -> dict[str, LazyTensor]:
    """The tensors of a Hugging Face directory, by the names of `interop.names`.

    Raises:
      ValueError: no weights, a shard is missing or damaged, the index and the shards disagree, or two tensors have one
        name.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (directory / single).is_file():
            return _renamed(directory, [(directory / single, None)])
        if (directory / index).is_file():
            return _renamed(directory, _shards(directory / index))
    raise ValueError(
        f"{directory} lacks weights: there is none of {', '.join((*SINGLE_FILES, *INDEX_FILES))}; fetch or export it "
        "again"
    )


def _shards(index: Path) -> list[tuple[Path, set[str]]]:
    """(file, names the index promises in it) for every shard."""
    try:
        placed: Mapping[str, str] = read_json(index)["weight_map"]
        names_of: dict[str, set[str]] = {}
        for name, file in placed.items():
            names_of.setdefault(file, set()).add(name)
        shards = [(index.parent / file, names_of[file]) for file in sorted(names_of)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards: {error!r}; fetch it again") from None
    missing = [file.name for file, _ in shards if not file.is_file()]
    if missing:
        raise ValueError(f"{index.parent} lacks {', '.join(missing)}, named in {index.name}; fetch or export it again")
    return shards


def _renamed(directory: Path, files: Iterable[tuple[Path, set[str] | None]]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for path, promised in files:
        found = safetensors_entries(path) if path.suffix == ".safetensors" else torch_entries(path)
        absent = sorted((promised or set()) - found.keys())
        if absent:
            raise ValueError(
                f"{path} lacks {absent[0]}" + (f" and {len(absent) - 1} more" if absent[1:] else "") + ", which the "
                "index says is in it; shards of two downloads were mixed, fetch the directory again"
            )
        for stored, tensor in found.items():
            name = table_name(stored)
            if name.endswith(_DERIVED):
                continue
            if name in tensors:
                raise ValueError(f"{directory} has two tensors {name} (one of them as {stored} in {path.name})")
            tensors[name] = tensor
    return tensors


def table_name(stored: str) -> str:
    """The name that `interop.names` has for a tensor stored as `stored`."""
    for prefix, meaning in _PREFIXES:
        if stored.startswith(prefix):
            stored = meaning + stored.removeprefix(prefix)
    return stored


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read ({error}): fetch or export it again")
