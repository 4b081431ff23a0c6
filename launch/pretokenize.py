"""`aromni pretokenize`: raw corpus to token shards, by any number of processes, again after a crash."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from launch.flags import add_config_argument, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_config_argument(parser, default="configs/pretokenize.py")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the data set goes")
    parser.add_argument(
        "--shard_index",
        type=int,
        default=None,
        metavar="I",
        help="which worker this is (default: SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX, else 0)",
    )
    parser.add_argument(
        "--num_shards",
        type=int,
        default=None,
        metavar="N",
        help="how many workers share the work (default: SLURM_ARRAY_TASK_COUNT, else 1)",
    )


def worker_of(args: argparse.Namespace, environment: dict[str, str]) -> tuple[int, int]:
    """(shard_index, num_shards) from the flags, or from what a Slurm array or a Kubernetes Indexed Job sets."""
    index, count = args.shard_index, args.num_shards
    if index is None:
        index = int(environment.get("SLURM_ARRAY_TASK_ID", environment.get("JOB_COMPLETION_INDEX", 0)))
        if "SLURM_ARRAY_TASK_ID" in environment:
            index -= int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
    if count is None:
        count = int(environment.get("SLURM_ARRAY_TASK_COUNT", 1))
    if not 0 <= index < count:
        raise ValueError(f"--shard_index={index} must lie in 0..{count - 1}; give --num_shards, the number of workers")
    return index, count


def progress_line(event: dict[str, Any]) -> str:
    """`4,096 of 19,000 records, 210 records/s, 1 min 11 s left, 0 bad`."""
    rate = event["done"] / max(event["seconds"], 1e-9)
    left = (event["total"] - event["done"]) / max(rate, 1e-9)
    minutes, seconds = divmod(round(left), 60)
    return (
        f"{event['done']:,} of {event['total']:,} records, {rate:,.0f} records/s, "
        f"{minutes} min {seconds:02d} s left, {event['quarantined']} bad"
    )


def main(args: argparse.Namespace) -> int:
    """Makes this worker's shards; the worker that finds all of them finished completes the data set."""
    index, count = worker_of(args, dict(os.environ))
    config_dict = load_config(args)
    from aromni_jax.config import from_mapping
    from data_pipelines.pretokenize import PretokenizeConfig, pretokenize

    config = from_mapping(PretokenizeConfig, config_dict)
    is_terminal = sys.stderr.isatty()

    def show(event: dict[str, Any]) -> None:
        print(progress_line(event), end="\r" if is_terminal else "\n", file=sys.stderr, flush=True)

    is_complete = pretokenize(config, args.output, shard_index=index, num_shards=count, progress=show)
    if is_terminal:
        print(file=sys.stderr)
    if is_complete:
        print(f"{args.output} is complete")
    else:
        print(f"worker {index} of {count} is done; {args.output} is complete once the other workers are")
    return 0


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
