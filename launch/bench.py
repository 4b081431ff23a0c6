"""`aromni bench`: how fast we are beside the reference that others use, and beside what the machine can do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launch import bench_data, bench_decode, bench_dialogue, bench_tokenizer, bench_train
from launch.flags import add_config_argument
from launch.model_flags import WEIGHTS


def _measure_checkpoints(args: argparse.Namespace) -> dict[str, Any]:
    # Imported here, because it needs jax, and `--help` answers without.
    from launch import bench_checkpoint

    return bench_checkpoint.measure(args)


_SUBJECTS = {
    "train": bench_train.measure,
    "decode": bench_decode.measure,
    "tokenizer": bench_tokenizer.measure,
    "data": bench_data.measure,
    "checkpoint": _measure_checkpoints,
    "dialogue": bench_dialogue.measure,
}
_CONFIGS = {"train": bench_train.DEFAULT_CONFIG, "decode": bench_decode.DEFAULT_CONFIG}
"""Subject -> the config it measures where `--config` says nothing; the others have none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `aromni bench`."""
    parser.add_argument("what", choices=tuple(_SUBJECTS), help="the subject; dialogue needs --model, an export")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side; the median counts")
    parser.add_argument(
        "--num_cores", type=int, metavar="N", help="for each side, with as many threads (default: all; tokenizer: 1)"
    )
    parser.add_argument(
        "--family", choices=tuple(bench_tokenizer.ITEMS), action="append", help="tokenizer: only this one (repeatable)"
    )
    parser.add_argument(
        "--case", action="append", help="train: only dense, or only packed; checkpoint: only quickstart, or only 100m"
    )
    parser.add_argument(
        "--data",
        default="",
        metavar="DIR",
        help="train, data: what to read (default: one is made); data makes it where DIR does not exist",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the table as JSON")
    parser.add_argument("--model", default="", metavar="DIR", help="decode: an export (default: random weights)")
    parser.add_argument(
        "--rows", type=int, action="append", metavar="N", help="decode: answers at a time (default: 1; repeatable)"
    )
    parser.add_argument(
        "--keep_peer_memory", action="store_true", help="train: on CPUs the other side, too, keeps what it frees"
    )
    parser.add_argument("--no_peer", action="store_true", help="train, decode: leave out the other side")
    parser.add_argument("--weights", choices=WEIGHTS, help="decode: type of our weights (default: of the model)")
    add_config_argument(parser, default="")


def main(args: argparse.Namespace) -> int:
    """Prints the table of one subject; ValueError says what is missing."""
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {args.repeats}")
    args.config = args.config or _CONFIGS.get(args.what, "")
    results = _SUBJECTS[args.what](args)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
