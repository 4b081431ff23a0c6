"""`aromni bench checkpoint`: what saving costs the training loop, and what a restart waits for, on this machine's disk.

The real loop (`run_training`) trains synthetic rows and saves asynchronously several times. A save is taken when its
step has ended, so the step that saves is the next one: from the end of the step before it to its own end, with
everything the loop waits for. Its neighbours are the steps at least one and at most three away from it that do not
save; files of the save may be written while they run. Quiet steps are those during which nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aromni_jax.train.observe import Hook
from launch.bench_sides import chosen_cases, versions
from launch.host_memory import keep_freed_memory_on_cpu

if TYPE_CHECKING:
    from aromni_jax.config import TrainConfig

_NEAR_STEPS = 3
_WARM_STEPS = 4
_POLL_SECONDS = 0.01
_PIECE_BYTES = 16 * 2**20
PEER_NAME = "torch.save and torch.load of the same arrays, blocking"


@dataclasses.dataclass(frozen=True)
class Case:
    """One config to train, with a save every `every_steps`, `num_saves` times."""

    name: str
    config: Callable[[], Any]
    every_steps: int
    num_saves: int


def _quickstart() -> Any:
    from configs.quickstart import get_config

    return get_config().train


def _100m() -> Any:
    from configs.pretrain import get_config

    config = get_config("100m")
    with config.data.ignore_type():
        config.data.mixture = "synthetic"
    config.data.num_workers = 1
    config.optimizer.warmup_steps = 0
    # Two cores: few short rows, whose vocabulary is small too; memory and disk stay below 8 GB.
    config.global_batch_size, config.sequence_length = 4, 512
    return config


CASES = (Case("quickstart", _quickstart, 50, 6), Case("100m", _100m, 7, 3))


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Prints and returns `CONFIG/stall`, `CONFIG/save` and `CONFIG/restore`, with the keys of `aromni bench --json`.

    `stall`: seconds of a step that saves; the limit is its neighbours, the peer a neighbour plus `torch.save`. `save`
    and `restore`: bytes a second until the files are whole, and until checksums are compared; the limit is the disk's
    sequential rate. Needs room on the disk of temporary files for three checkpoints: 3 GB for 100m,
    which takes some minutes and about 8 GB of memory.
    """
    names = chosen_cases(args.case, [case.name for case in CASES])
    keep_freed_memory_on_cpu()
    device = f"{os.cpu_count()} cores, {platform.machine()}; {versions('jax', 'orbax-checkpoint')}"
    print(device, flush=True)
    results: dict[str, dict[str, Any]] = {}
    for case in CASES:
        if case.name in names:
            for kind, row in _measure(case).items():
                results[f"{case.name}/{kind}"] = row | {"device": device}
    return results


class _Clock(Hook):
    """When steps ended, when saves of them began, and what the loop says saving stopped it for (all but the last)."""

    def __init__(self) -> None:
        self.ended: dict[int, float] = {}
        self.saved: dict[int, float] = {}
        self.stall_seconds = 0.0

    def on_step(self, step: int, line: dict[str, Any] | None) -> None:
        self.ended[step] = time.monotonic()
        if line is not None:
            self.stall_seconds += line["save_stall_seconds"]

    def on_save(self, step: int) -> None:
        self.saved[step] = time.monotonic()


@contextlib.contextmanager
def _watching(directory: Path) -> Iterator[dict[int, float]]:
    """{step: when its checkpoint was whole}, filled by a thread that looks a hundred times a second."""
    from aromni_jax.train.saved_step import list_steps

    whole: dict[int, float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(_POLL_SECONDS):
            for step in list_steps(directory):
                whole.setdefault(step, time.monotonic())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield whole
    time.sleep(2 * _POLL_SECONDS)
    over.set()
    thread.join()


def _measure(case: Case) -> dict[str, dict[str, Any]]:
    import jax

    from aromni_jax.config import TrainConfig, from_mapping
    from launch.train import run_training

    config_dict = case.config()
    config_dict.total_steps = case.every_steps * case.num_saves + _NEAR_STEPS + 1
    config_dict.checkpoint.update(save_every_steps=case.every_steps, keep_last=1)
    config = from_mapping(TrainConfig, config_dict)
    with tempfile.TemporaryDirectory() as folder:
        path, clock = Path(folder) / "run", _Clock()
        with _watching(path / "checkpoints") as whole:
            result = run_training(config, path, [clock], with_progress=False)
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), result.state
        )
        peer = _torch_times(result.state, Path(folder) / "peer.pt")
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(result.state.params))
        del result
        steps = describe_steps(clock.ended, clock.saved, whole)
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted))
        written = sum(file.stat().st_size for file in (path / "checkpoints").rglob("*") if file.is_file())
        restore_seconds = _restore(config, path, wanted)
        write_rate, read_rate = _disk_rates(Path(folder) / "plain", num_bytes)
    shape = (
        f"{case.name}: {num_parameters / 1e6:,.1f} M parameters, {num_bytes / 1e6:,.0f} MB of arrays; "
        f"batch {config.global_batch_size} x {config.sequence_length}"
    )
    common = {"shape": shape, "peer_name": PEER_NAME if peer else None}
    save_seconds, load_seconds = peer or (None, None)
    num_timed_saves = len(clock.saved) - 1
    rows = {
        "stall": {
            "ours": steps["saving"],
            "limit": steps["neighbours"],
            "peer": steps["neighbours"] + save_seconds if save_seconds else None,
            "unit": "seconds of a step that saves",
            "stall_ratio": steps["saving"] / steps["neighbours"],
            "first_stall_ratio": steps["first"] / steps["neighbours"],
            "quiet_step_seconds": steps["quiet"],
            "save_stall_seconds": clock.stall_seconds / num_timed_saves,
            "seconds_until_whole": steps["until_whole"],
            "saves": num_timed_saves,
        },
        "save": {
            "ours": num_bytes / steps["until_whole"],
            "limit": write_rate,
            "peer": num_bytes / save_seconds if save_seconds else None,
            "unit": "bytes of arrays a second until the files are whole, training meanwhile",
            "bytes_written": written,
        },
        "restore": {
            "ours": num_bytes / restore_seconds,
            "limit": read_rate,
            "peer": num_bytes / load_seconds if load_seconds else None,
            "unit": "bytes of arrays a second, checksums compared",
            "restore_seconds": restore_seconds,
            "parameters": num_parameters,
        },
    }
    for row in rows.values():
        row |= common
        for side in ("limit", "peer"):
            row[f"ratio_to_{side}"] = row["ours"] / row[side] if row[side] else None
    _print(rows, peer)
    return rows


def describe_steps(ended: dict[int, float], saved: dict[int, float], whole: dict[int, float]) -> dict[str, Any]:
    """Medians over steps in seconds: `saving`, `neighbours`, `quiet` (nothing written meanwhile; None where there is no
    such step), and of the saves `until_whole`; `first` is the first step that saves.

    `ended` and `saved` map steps to times: step s + 1 is the one that saves s. The last save has no such step.
    """
    seconds = {step: ended[step] - ended[step - 1] for step in ended if step - 1 in ended and step > _WARM_STEPS}
    saving = [step + 1 for step in saved if step + 1 in seconds]
    near = {
        other
        for step in saving
        for distance in range(-_NEAR_STEPS, _NEAR_STEPS + 1)
        if (other := step + distance) in seconds and other not in saving
    }
    quiet = [
        step
        for step in seconds
        if all(ended[step] < begun or ended[step - 1] > whole[number] for number, begun in saved.items())
    ]
    return {
        "saving": statistics.median(seconds[step] for step in saving),
        "first": seconds[saving[0]],
        "neighbours": statistics.median(seconds[step] for step in near),
        "quiet": statistics.median(seconds[step] for step in quiet) if quiet else None,
        "until_whole": statistics.median(whole[step] - saved[step] for step in saved),
    }


def _restore(config: TrainConfig, workdir: Path, wanted: Any) -> float:
    """Seconds of a restart's reading: a fresh Checkpointer, files not in memory, checksums compared, arrays ready."""
    import jax

    from aromni_jax.train.checkpoint import Checkpointer
    from aromni_jax.train.pieces import forget

    forget(file for file in workdir.rglob("*") if file.is_file())
    begun = time.perf_counter()
    with contextlib.closing(Checkpointer(workdir, config.checkpoint)) as checkpointer:
        restored = checkpointer.restore_latest(wanted, lambda facts: None)
        assert restored is not None
        jax.block_until_ready(restored[1])
        return time.perf_counter() - begun


def _torch_times(state: Any, path: Path) -> tuple[float, float] | None:
    """Seconds of `torch.save` until the file is on disk, and of `torch.load`; None without torch."""
    if not importlib.util.find_spec("torch"):
        return None
    import jax
    import numpy as np

    from aromni_jax.peers import torch_files
    from aromni_jax.train.pieces import forget

    save_seconds = torch_files.save_seconds([np.asarray(leaf) for leaf in jax.tree.leaves(state)], path)
    forget([path])
    load_seconds = torch_files.load_seconds(path)
    path.unlink()
    return save_seconds, load_seconds


def _disk_rates(path: Path, num_bytes: int) -> tuple[float, float]:
    """Bytes a second of plain sequential writing (until on disk) and reading of a file of `num_bytes`."""
    from aromni_jax.train.pieces import forget

    piece = os.urandom(_PIECE_BYTES)
    begun = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, num_bytes, _PIECE_BYTES):
            file.write(memoryview(piece)[: num_bytes - start])
        os.fsync(file.fileno())
    write_seconds = time.perf_counter() - begun
    forget([path])
    room = bytearray(_PIECE_BYTES)
    begun = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(room):
            pass
    read_seconds = time.perf_counter() - begun
    path.unlink()
    return num_bytes / write_seconds, num_bytes / read_seconds


def _print(rows: dict[str, dict[str, Any]], peer: tuple[float, float] | None) -> None:
    stall, save, restore = rows["stall"], rows["save"], rows["restore"]
    beside = f"; torch.save {peer[0]:.2f} s, torch.load {peer[1]:.2f} s" if peer else ""
    print(
        f"{stall['shape']}\n"
        f"a step that saves {stall['ours']:.3f} s, its neighbours {stall['limit']:.3f} s, ratio "
        f"{stall['stall_ratio']:.2f} (the first save {stall['first_stall_ratio']:.2f}); steps while nothing is written "
        f"{stall['quiet_step_seconds'] or 0:.3f} s; the loop waited {stall['save_stall_seconds']:.3f} s a save\n"
        f"files whole after {stall['seconds_until_whole']:.2f} s, {save['bytes_written'] / 1e6:,.0f} MB: "
        f"{save['ours'] / 1e6:,.0f} MB/s of arrays, the disk writes {save['limit'] / 1e6:,.0f} MB/s\n"
        f"restored in {restore['restore_seconds']:.2f} s: {restore['ours'] / 1e6:,.0f} MB/s, the disk reads "
        f"{restore['limit'] / 1e6:,.0f} MB/s{beside}",
        flush=True,
    )
