"""`aromni bench data`: from shards to packed batches, beside Grain's own packer over the same shards, in one process.

Both sides read the same records with the same code, give each target the same arrays, and are timed in turn, in seconds
of the processor: what a host spends on a token whatever else it does. The limit is reading: records from the shards and
nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.bench_sides import versions

_ROW_LENGTH, _ROWS = 4096, 8
_DOCUMENTS, _PLANNED_DOCUMENTS = 40_000, 600_000
_BATCHES_A_TURN = 50
_GRAIN_BINS = 64
PEER_NAME = f"grain.experimental.FirstFitPackIterDataset, {_GRAIN_BINS} bins"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the figures; returns {"data": them} under the keys of `aromni bench --json`.

    A folder that `--data` names and that does not exist is made, and stays: `aromni train` reads it, too.

    Raises:
      ValueError: `--data` names no finished data set, or one whose records are longer than a row.
    """
    device = f"{platform.machine()}; {versions('grain', 'array_record', 'numpy')}"
    print(device)
    with contextlib.ExitStack() as stack:
        if args.data:
            directory = Path(args.data)
        else:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "recipe"
        if not directory.exists():
            from aromni_jax.interop.container import whole_directory
            from data_pipelines.recipe_corpus import write_recipe_corpus

            print(f"writing {_DOCUMENTS:,} documents with the lengths of the recipe to {directory}", flush=True)
            with whole_directory(directory) as unfinished:
                write_recipe_corpus(unfinished, _DOCUMENTS)
        return {"data": _measured(directory, args.repeats) | {"device": device}}


def _measured(directory: Path, repeats: int) -> dict[str, Any]:
    from data_pipelines.records import TokenDataset

    started = time.perf_counter()
    ours, fill = _our_batches(directory)
    next(ours)
    first_batch_seconds = time.perf_counter() - started

    dataset = TokenDataset(directory)
    sides = {"ours": ours, "peer": _grain_batches(dataset)}
    sides["limit"] = _records(dataset)
    for batches in sides.values():
        next(batches)  # files opened, code warm
    rates: dict[str, list[float]] = {side: [] for side in sides}
    positions: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, batches in sides.items():
            begun, tokens, places = time.process_time(), 0, 0
            for _ in range(_BATCHES_A_TURN):
                held, room = next(batches)
                tokens, places = tokens + held, places + room
            rates[side].append(tokens / (time.process_time() - begun))
            positions[side].append(tokens / places)
    speed = {side: statistics.median(values) for side, values in rates.items()}
    peer_fill = statistics.fmean(positions["peer"])
    stored = sum(marker.bytes for marker in dataset.markers) / sum(marker.tokens for marker in dataset.markers)
    result: dict[str, Any] = {
        "ours": speed["ours"],
        "limit": speed["limit"],
        "peer": speed["peer"],
        "ratio_to_limit": speed["ours"] / speed["limit"],
        "ratio_to_peer": speed["ours"] / speed["peer"],
        "unit": "target tokens per CPU second, one process",
        "shape": f"{_ROWS} rows of {_ROW_LENGTH}, {len(dataset):,} documents",
        "peer_name": PEER_NAME,
        "fill": fill,
        "fill_peer": peer_fill,
        "bytes_per_token": stored,
        "cpu_nanoseconds_per_token": {side: 1e9 / value for side, value in speed.items()},
        "first_batch_seconds": first_batch_seconds,
        "planned_documents_per_cpu_second": _planning_rate(),
        "repeats": repeats,
    }
    share = result["ratio_to_limit"]
    result["bound_by"] = "reading records" if share > 0.5 else "packing rows"
    print(
        f"ours {speed['ours'] / 1e6:.1f}, peer {speed['peer'] / 1e6:.1f}, reading alone {speed['limit'] / 1e6:.1f} M "
        f"tokens per CPU second; ratio to peer {result['ratio_to_peer']:.2f}, to reading {share:.2f}: {share:.0%} of "
        f"the time is reading, so it is bound by {result['bound_by']}\n"
        f"a token costs {1e9 / speed['ours']:.0f} ns of the processor, {1e9 / speed['limit']:.0f} of them reading, and "
        f"{stored:.2f} bytes in the shards\n"
        f"rows {fill:.2%} full, the peer's {peer_fill:.2%}\n"
        f"first batch after {first_batch_seconds:.2f} s; plans "
        f"{result['planned_documents_per_cpu_second'] / 1e6:.2f} M documents per CPU second",
        flush=True,
    )
    return result


def _our_batches(directory: Path) -> tuple[Iterator[tuple[int, int]], float]:
    """(real tokens, positions) of each batch of the pipeline that trains, and the share of its rows that is full."""
    from aromni_jax.config import DataConfig, LossConfig
    from aromni_jax.vocab import JointVocab
    from data_pipelines.pipeline import make_train_iterator

    batches = make_train_iterator(
        DataConfig({"recipe": {"path": str(directory)}}, "examples", num_workers=0, prefetch_batches=1),
        JointVocab.from_json((directory / "vocab.json").read_text()),
        loss=LossConfig("balanced", 1.0, "predict", 0.0, 1024),
        seed=0,
        sequence_length=_ROW_LENGTH,
        global_batch_size=_ROWS,
    )
    return ((int((b.segment_ids_BL > 0).sum()), b.segment_ids_BL.size) for b in batches), batches.statistics["fill"]


def _grain_batches(dataset: Any) -> Iterator[tuple[int, int]]:
    """The same arrays through Grain: shuffle, shift and weights per document, first fit, batches."""
    import grain
    import numpy as np

    from data_pipelines.weighting import UNIFORM_TMR, to_targets

    features = ("inputs", "targets", "loss_weights", "modality", "task", "perceptual_mask")

    def document(index: int) -> dict[str, np.ndarray]:
        flat = to_targets([dataset[index]], UNIFORM_TMR)
        return {name: getattr(flat, f"{name}_L") for name in features}

    documents = grain.MapDataset.range(len(dataset)).shuffle(seed=0).repeat().map(document)
    packed = grain.experimental.FirstFitPackIterDataset(
        documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)),
        length_struct=dict.fromkeys(features, _ROW_LENGTH),
        num_packing_bins=_GRAIN_BINS,
        meta_features=features[1:],
    )
    for batch in packed.batch(_ROWS):
        yield int((batch["inputs_segment_ids"] > 0).sum()), batch["inputs"].size


def _records(dataset: Any) -> Iterator[tuple[int, int]]:
    """Records in random order, as many as fill a batch, read and decoded and nothing else."""
    import numpy as np

    order = np.random.default_rng(0)
    while True:
        tokens = 0
        while tokens < _ROWS * _ROW_LENGTH:
            tokens += len(dataset[int(order.integers(len(dataset)))].tokens_L) - 1
        yield tokens, _ROWS * _ROW_LENGTH


def _planning_rate() -> float:
    from data_pipelines.pack_plan import make_plan
    from data_pipelines.recipe_corpus import recipe_lengths

    lengths_N, _ = recipe_lengths(_PLANNED_DOCUMENTS)
    begun = time.process_time()
    make_plan(lengths_N - 1, _ROW_LENGTH, seed=0)
    return _PLANNED_DOCUMENTS / (time.process_time() - begun)
