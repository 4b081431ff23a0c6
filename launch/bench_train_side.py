"""One side of `aromni bench train`, in a process of its own (`launch.bench_sides`).

`describe` (ours) says what is measured; `dense` and `packed` (and `micro_batch_padding` of the peer) train one step and
answer {seconds, loss, positions}; `peak` is the rate of large matrix products in FLOP/s; `parts` (ours) times the step
piece by piece.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from launch.bench_sides import answer_questions
from launch.bench_train import KEEPING_PEER, MICRO_BATCH, PADDINGS
from launch.host_memory import keep_freed_memory, keep_freed_memory_on_cpu

WEIGHTS = "weights"
_PEAK_WIDTHS = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
_PEAK_PRODUCTS = {"cpu": 4, "gpu": 32, "tpu": 32}

Batch = Mapping[str, np.ndarray]
MicroBatch = tuple[np.ndarray, np.ndarray]
"""(inputs, targets), int64 [rows, L]; targets of padding are -100."""


def main() -> None:
    """Prepares one side, then answers until standard input closes."""
    side, folder, cores, *platform = sys.argv[1:]
    directory = Path(folder)
    # Before any library starts its threads: they count the cores they see.
    os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    if side == KEEPING_PEER:
        keep_freed_memory()
    batches = {name: dict(np.load(directory / f"{name}.npz")) for name in ("dense", "packed")}
    answer_questions(_ours(directory, batches) if side == "ours" else _peer(directory, batches, platform[0]))


def _ours(directory: Path, batches: Mapping[str, Batch]) -> Callable[[str], Any]:
    """The train step that `aromni train` compiles."""
    keep_freed_memory_on_cpu()
    import jax

    # The peer lives beside us.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from launch.bench_train_ours import Trainer

    trainer = Trainer(directory, batches)
    trainer.write_weights(directory / WEIGHTS)
    platform = jax.default_backend()

    def answer(question: str) -> Any:
        if question == "describe":
            return trainer.describe() | {"platform": platform}
        if question == "parts":
            return trainer.parts()
        if question == "peak":
            return _peak(platform, trainer)
        start = time.perf_counter()
        loss = trainer.step(question)
        return {"seconds": time.perf_counter() - start, "loss": loss, "positions": batches["dense"]["inputs_BL"].size}

    return answer


def _peer(directory: Path, batches: Mapping[str, Batch], platform: str) -> Callable[[str], Any]:
    """Hugging Face's Chameleon from the same weights, on the same cores or GPU."""
    from aromni_jax.peers.training import ChameleonTrainer

    optimizer = json.loads((directory / "config.json").read_text(encoding="utf-8"))["optimizer"]
    trainer = ChameleonTrainer(directory / WEIGHTS, optimizer, "cuda" if platform == "gpu" else "cpu")
    work = {name: list(micro_batches(batches["packed"], among)) for name, among in PADDINGS.items()}
    work["dense"] = list(micro_batches(batches["dense"], MICRO_BATCH))

    def answer(question: str) -> Any:
        if question == "peak":
            return _peak(platform, trainer)
        start = time.perf_counter()
        loss = trainer.step(work[question])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": loss, "positions": sum(inputs.size for inputs, _ in work[question])}

    return answer


def micro_batches(batch: Batch, among: int) -> Iterator[MicroBatch]:
    """The documents of a packed batch in micro-batches of 2, padded on the right to the longest of each `among`."""
    documents = []
    for inputs_L, targets_L, segments_L in zip(batch["inputs_BL"], batch["targets_BL"], batch["segment_ids_BL"]):
        for segment in range(1, int(segments_L.max()) + 1):
            documents.append((inputs_L[segments_L == segment], targets_L[segments_L == segment]))
    for start in range(0, len(documents), among):
        together = documents[start : start + among]
        longest = max(len(inputs_L) for inputs_L, _ in together)
        for first in range(0, len(together), MICRO_BATCH):
            rows = together[first : first + MICRO_BATCH]
            inputs = np.zeros((len(rows), longest), np.int64)
            targets = np.full((len(rows), longest), -100, np.int64)
            for row, (inputs_L, targets_L) in enumerate(rows):
                inputs[row, : len(inputs_L)], targets[row, : len(targets_L)] = inputs_L, targets_L
            yield inputs, targets


def _peak(platform: str, trainer: Any) -> float:
    """FLOP/s of products of large square matrices, the best of three.

    Of random numbers: a GPU multiplies ones or zeros faster than what a training run holds.
    """
    width, count = _PEAK_WIDTHS[platform], _PEAK_PRODUCTS[platform]
    squares = trainer.squares(width)
    trainer.products(squares, count)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        trainer.products(squares, count)
        times.append(time.perf_counter() - start)
    return 2.0 * width**3 * count / min(times)


if __name__ == "__main__":
    main()
