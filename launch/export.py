"""`aromni export`: a checkpoint becomes a Hugging Face Chameleon directory, one tensor at a time."""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Callable

from launch.saved_run import SavedRun

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `aromni export`."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to create")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights instead of the weights")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    parser.add_argument("--template", default="", metavar="NAME", help="prompt templates, where the data sets are gone")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is already at --output")


def main(args: argparse.Namespace) -> int:
    """Exports, and prints where."""
    show = sys.stderr.isatty()

    def progress(name: str) -> None:
        if show:
            print(f"\r\033[K{name}", end="", file=sys.stderr, flush=True)

    files = export_workdir(
        args.workdir,
        args.output,
        step=args.step,
        ema=args.ema,
        dtype=args.dtype,
        max_shard_bytes=parse_size(args.max_shard_size),
        template=args.template,
        overwrite=args.overwrite,
        progress=progress,
    )
    if show:
        print("\r\033[K", end="", file=sys.stderr)
    size = sum(file.stat().st_size for file in files)
    print(f"{args.output}: {size / 1e6:,.1f} MB of {args.dtype} weights in {len(files)} file(s)")
    return 0


def export_workdir(
    workdir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 * _UNITS["GB"],
    template: str = "",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> list[pathlib.Path]:
    """Writes the export of one checkpoint of a run; returns its weight files.

    Raises:
      ValueError: no such checkpoint, no moving average in it, another vocabulary than its own, or `output` is taken.
    """
    from aromni_jax.interop.chameleon import export_chameleon

    run = SavedRun(workdir, step, ema)
    return export_chameleon(
        run,
        run.model,
        run.vocab,
        pathlib.Path(output),
        provenance=run.provenance(template),
        dtype=dtype,
        tokenizers=run.tokenizers,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "20KB"; ValueError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)\s*(KB|MB|GB)", text.strip().upper())
    if not match:
        raise ValueError(f"--max_shard_size={text}: give a number and KB, MB or GB, for example 5GB")
    return int(match[1]) * _UNITS[match[2]]


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
