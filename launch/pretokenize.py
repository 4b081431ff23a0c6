"""`aromni pretokenize`: raw corpus to token shards, by any number of processes, again after a crash.

    aromni pretokenize --config=configs/pretokenize.py --num_workers=8 --output=data/train

runs eight processes on this machine. Across machines, `launch/pretokenize.sbatch` is a Slurm array and
`launch/pretokenize_job.yaml` a Kubernetes Indexed Job of this command.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from launch.flags import add_config_argument, load_config
from launch.local_workers import LocalWorkers
from launch.stages import format_seconds

_RATE_SECONDS = 30.0
_LINE_EVERY_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_config_argument(parser, default="configs/pretokenize.py")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the data set goes")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine (default: 1; one process uses all devices, so more are for CPUs)",
    )
    parser.add_argument(
        "--shard_index",
        type=int,
        default=None,
        metavar="I",
        help="which worker, or machine, this is (default: SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX, else 0)",
    )
    parser.add_argument(
        "--num_shards",
        type=int,
        default=None,
        metavar="N",
        help="how many workers, or machines, share the work (default: SLURM_ARRAY_TASK_COUNT, else 1)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="once the data set is complete, read every shard and compare its SHA-256",
    )
    parser.add_argument(
        "--progress",
        default="words",
        choices=("words", "json"),
        help="json: an object a line on standard output, for programs (default: words)",
    )


def worker_of(args: argparse.Namespace, environment: dict[str, str]) -> tuple[int, int]:
    """(shard_index, num_shards) from the flags, or from what a Slurm array or a Kubernetes Indexed Job sets."""
    index, count = args.shard_index, args.num_shards
    if index is None:
        index = int(environment.get("SLURM_ARRAY_TASK_ID", environment.get("JOB_COMPLETION_INDEX", 0)))
        if "SLURM_ARRAY_TASK_ID" in environment and count is None:
            index -= int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
    if count is None:
        count = int(environment.get("SLURM_ARRAY_TASK_COUNT", 1))
    if not 0 <= index < count:
        raise ValueError(
            f"--shard_index={index} must lie in 0..{count - 1}; give --num_shards, the number of workers (completions "
            "of a Kubernetes Job, size of a Slurm array of which only some tasks run)"
        )
    return index, count


class ProgressBar:
    """A bar drawn over on a terminal, a line now and then elsewhere: records, records/s of late, time left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_terminal = stream, stream.isatty()
        self._every = 0.2 if self._is_terminal else _LINE_EVERY_SECONDS
        self._seen: collections.deque[tuple[float, int]] = collections.deque()
        self._drawn, self._bad = -self._every, 0
        self._bar = ""

    def update(self, event: dict[str, Any]) -> None:
        """Takes {"done", "total", "seconds", "quarantined"} and draws where it is due, always at the end, once.

        What is found bad after that is drawn as well.
        """
        if self._seen and self._seen[-1][1] == event["done"] == event["total"] and self._bad == event["quarantined"]:
            return
        self._bad = event["quarantined"]
        self._seen.append((event["seconds"], event["done"]))
        while len(self._seen) > 2 and self._seen[1][0] < event["seconds"] - _RATE_SECONDS:
            self._seen.popleft()
        if event["seconds"] - self._drawn < self._every and event["done"] < event["total"]:
            return
        self._drawn = event["seconds"]
        # What an earlier run had finished is there at once, and says nothing about speed.
        (since, had), (now, done) = self._seen[0], self._seen[-1]
        alone = done / max(now, 1e-9) if done == event["total"] else 0.0
        rate = (done - had) / (now - since) if now > since else alone
        text = progress_line(event, rate)
        if self._is_terminal:
            filled = round(24 * event["done"] / max(event["total"], 1))
            self._bar = f"[{'#' * filled}{'.' * (24 - filled)}] {text}"
            self._stream.write(f"\r\x1b[2K{self._bar}")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line that stays above the bar."""
        self._stream.write(f"\r\x1b[2K{text}\n{self._bar}" if self._is_terminal else f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Leaves the cursor on a line of its own."""
        if self._is_terminal and self._seen:
            self._stream.write("\n")


def progress_line(event: dict[str, Any], rate: float) -> str:
    """`4,096 of 19,000 records, 210 records/s, 1 min 11 s left, 0 bad`."""
    left = format_seconds((event["total"] - event["done"]) / rate) + " left" if rate > 0 else "starting"
    return f"{event['done']:,} of {event['total']:,} records, {rate:,.0f} records/s, {left}, {event['quarantined']} bad"


def main(args: argparse.Namespace) -> int:
    """Makes this worker's shards; the worker that finds all of them finished completes the data set."""
    index, count = worker_of(args, dict(os.environ))
    if args.num_workers < 1:
        raise ValueError(f"--num_workers={args.num_workers} must be at least 1")
    config_dict = load_config(args)
    bar = ProgressBar(sys.stderr)
    if args.num_workers > 1:
        status, is_complete = _run_workers(args, index, count, bar)
        if status:
            return status
    else:
        from aromni_jax.config import from_mapping
        from data_pipelines.pretokenize import PretokenizeConfig, pretokenize

        config = from_mapping(PretokenizeConfig, config_dict)
        in_json = args.progress == "json"
        show = _print_json if in_json else bar.update
        is_complete = pretokenize(config, args.output, shard_index=index, num_shards=count, progress=show)
        if in_json:
            _print_json({"complete": is_complete})
            return 0
    bar.close()
    if not is_complete:
        print(f"worker {index} of {count} is done; {args.output} is complete once the other workers are")
        return 0
    print(f"{args.output} is complete{_verified(args.output) if args.verify else ''}")
    _print_unclaimed(pathlib.Path(args.output))
    return 0


def _print_json(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _print_unclaimed(directory: pathlib.Path) -> None:
    from data_pipelines.pretokenize import unclaimed_text
    from data_pipelines.records import DATASET_FILE, unsealed

    if unclaimed := unsealed((directory / DATASET_FILE).read_bytes())["unclaimed"]:
        print(unclaimed_text(unclaimed))


def _verified(output: str) -> str:
    from data_pipelines.records import TokenDataset, read_vocab

    dataset = TokenDataset(output, read_vocab(pathlib.Path(output)), verify=True)
    assert dataset.unigram_V.sum() == dataset.counts_TMR.sum()  # reading it compares its hash
    return f"; all {len(dataset.markers)} shards have the SHA-256 they were written with"


def _run_workers(args: argparse.Namespace, index: int, count: int, bar: ProgressBar) -> tuple[int, bool]:
    """(exit status, whether the data set is complete) of processes that share the part of worker `index` of `count`."""
    command = [sys.executable, "-m", "launch.cli", "pretokenize", f"--config={args.config}", *args.config_overrides]
    command += [f"--output={args.output}", "--progress=json", f"--num_shards={count * args.num_workers}"]
    first = index * args.num_workers
    started = time.monotonic()
    last: list[dict[str, Any]] = [{} for _ in range(args.num_workers)]

    def merge(events: Sequence[dict[str, Any] | None]) -> None:
        for known, event in zip(last, events, strict=True):
            known.update(event or {})
        if all(known for known in last):  # before that the total is not known
            summed = {key: sum(known.get(key, 0) for known in last) for key in ("done", "total", "quarantined")}
            bar.update(summed | {"seconds": time.monotonic() - started})

    commands = [[*command, f"--shard_index={first + worker}"] for worker in range(args.num_workers)]
    status = LocalWorkers(commands, merge, bar.say).run()
    if status:
        bar.say("the same command, with any number of workers, goes on where this one stopped")
    return status, any(known.get("complete") for known in last)


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
