"""Writing safetensors files as a stream, and directories that appear whole or not at all.

The safetensors container is an 8-byte little-endian length, a JSON header that gives every tensor's dtype, shape and
byte range, and the bytes themselves. Since shapes are known before values, the header goes first and the tensors
follow one by one: memory holds one tensor, however large the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

DTYPES: dict[str, tuple[str, np.dtype]] = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
"""Name on our command line -> name in the container and numpy dtype."""

Entry = tuple[str, tuple[int, ...]]
"""Name and shape of a tensor that will be written."""

INDEX_NAME = "model.safetensors.index.json"


@contextlib.contextmanager
def whole_directory(output: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """A temporary sibling of `output` that takes its place when the block succeeds and vanishes when it fails.

    What is in `output` may go where it holds a file called `replaces`, and no checkpoints.

    Raises:
      ValueError: `output` exists, is not empty and may not go; or its parent cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; --output must name a directory to create")
    if output.exists() and any(output.iterdir()):
        if replaces is None:
            raise ValueError(f"{output} is not empty; name another directory, or remove this one first")
        if not (output / replaces).is_file() or (output / "checkpoints").exists():
            raise ValueError(
                f"{output} holds other things than what is written here (no {replaces}, or checkpoints of a run), "
                "which --overwrite does not remove; name another directory"
            )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except PermissionError:
        raise ValueError(f"cannot write in {output.parent}; name a directory where you may") from None
    try:
        temporary.chmod(0o755)
        yield temporary
        if output.exists():
            # A rename over a directory works only when that is empty: move the old one aside, so that a crash between
            # the two renames loses neither.
            aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
            output.rename(aside / output.name)
            temporary.rename(output)
            shutil.rmtree(aside)
        else:
            temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plan_shards(entries: Sequence[Entry], itemsize: int, max_shard_bytes: int) -> list[list[Entry]]:
    """Cuts `entries`, in order, into files of at most `max_shard_bytes` (a larger tensor gets a file of its own)."""
    shards: list[list[Entry]] = []
    room = 0
    for name, shape in entries:
        size = itemsize * int(np.prod(shape, dtype=np.int64))
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, shape))
        room -= size
    return shards


def _append(file: BinaryIO, tensor: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Writes one tensor; a function of its own, so that the tensor is gone before the next one is read."""
    assert tensor.shape == shape, f"tensor of shape {tensor.shape}, {shape} was announced"
    contiguous = np.ascontiguousarray(tensor, dtype=dtype)
    file.write(contiguous.reshape(-1).view(np.uint8).data)


def write_file(
    path: Path, entries: Sequence[Entry], dtype: str, read: Callable[[str], np.ndarray], metadata: dict[str, str]
) -> int:
    """Writes one safetensors file, asking `read(name)` for each tensor in turn; returns its size in bytes."""
    code, numpy_dtype = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, shape in entries:
        end = offset + numpy_dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned, so that readers can map the file
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, shape in entries:
            _append(file, read(name), shape, numpy_dtype)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def write_shards(
    directory: Path,
    entries: Sequence[Entry],
    *,
    dtype: str,
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int,
    metadata: dict[str, str],
) -> list[Path]:
    """Writes `model.safetensors`, or numbered shards and their index where one file would be too large.

    Args:
      read: gives a tensor by name; called once per tensor, in the order of `entries`.
    """
    itemsize = DTYPES[dtype][1].itemsize
    shards = plan_shards(entries, itemsize, max_shard_bytes)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard, dtype, read, metadata)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(itemsize * int(np.prod(shape, dtype=np.int64)) for _, shape in entries)},
            "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard},
        }
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [directory / name for name in names]
