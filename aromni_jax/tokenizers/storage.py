"""Parameter trees in safetensors files: written whole or not at all, checked on reading, fingerprinted by content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from aromni_jax.arrays import PyTree

T = TypeVar("T")


def flatten(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves by their path, "encoder/conv_in/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def save_tree(path: str | Path, tree: PyTree, *, identity: str, dtype: str | None = None) -> None:
    """Writes the leaves of `tree` and a line saying what they are; the file appears only when it is complete.

    `dtype` "float16" halves the file; `load_tree` reads it as float32 again, rounded once and for all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    tensors = {name: np.asarray(value, dtype, order="C") for name, value in sorted(flatten(tree).items())}
    with open(partial_path, "wb") as file:
        file.write(safetensors.numpy.save(tensors, metadata={"identity": identity}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial_path, path)


def load_tree(path: str | Path, like: T, *, identity: str) -> T:
    """Reads a tree shaped `like` the given one (arrays or ShapeDtypeStructs).

    Raises:
      ValueError: unreadable file, another identity, or a tensor that is missing, extra or of another shape: named.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            found = (file.metadata() or {}).get("identity", "")
            if found != identity:
                raise ValueError(
                    f"{path} was made with other settings or data ({_difference(found, identity)}); "
                    "go back to them, or use another directory"
                )
            tensors: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and train again") from error
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in leaves]
    if missing := sorted(set(names) - set(tensors)):
        raise ValueError(f"{path} lacks the tensor {missing[0]!r} ({len(missing)} missing)")
    if extra := sorted(set(tensors) - set(names)):
        raise ValueError(f"{path} has the unknown tensor {extra[0]!r} ({len(extra)} unknown)")
    for name, (_, leaf) in zip(names, leaves):
        if tensors[name].dtype == np.float16 and leaf.dtype == np.float32:
            tensors[name] = tensors[name].astype(np.float32)
        if tensors[name].shape != leaf.shape or tensors[name].dtype != leaf.dtype:
            raise ValueError(
                f"{path}: tensor {name!r} is {tensors[name].dtype}{list(tensors[name].shape)}, "
                f"expected {leaf.dtype}{list(leaf.shape)}"
            )
    return jax.tree_util.tree_unflatten(structure, [jax.numpy.asarray(tensors[name]) for name in names])


def fingerprint(tree: PyTree, description: str) -> str:
    """SHA-256 over a description and the content of every tensor; the file format has no part in it."""
    digest = hashlib.sha256(description.encode())
    for name, value in sorted(flatten(tree).items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def describe(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, nested ones too.

    What is saved under such a description stays readable when a field is added whose default changes nothing.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            values[field.name] = describe(value) if dataclasses.is_dataclass(value) else value
    return values


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError when it does not hold one."""
    try:
        value = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _difference(found: str, expected: str) -> str:
    try:
        old, new = _leaves(json.loads(found)), _leaves(json.loads(expected))
    except json.JSONDecodeError:
        return "not a state of this kind"
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} here" for key in changed[:4])


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _leaves(item, f"{prefix}.{key}" if prefix else key).items()}
