"""`aromni quickstart`: the main job on the embedded corpus, from raw data to a report, in minutes on two cores."""

from __future__ import annotations

import argparse
import pathlib
import sys

from launch.flags import add_config_argument, load_config
from launch.host_memory import keep_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `aromni quickstart`."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where everything goes; run again to go on")
    add_config_argument(parser, default="configs/quickstart.py")
    parser.add_argument(
        "--tokenizers",
        choices=("shipped", "train"),
        help="of pictures and speech: those that come with the package (default), or trained here, two minutes more",
    )


def main(args: argparse.Namespace) -> int:
    """Runs every stage that is not done and prints where the report is."""
    config_dict = load_config(args)
    if args.tokenizers:
        config_dict.tokenizers.codecs = args.tokenizers
    keep_freed_memory()
    from aromni_jax.config import from_mapping
    from launch.quickstart_job import REPORT_FILE, Interrupted, QuickstartConfig, QuickstartJob
    from launch.stages import format_seconds, run_stages

    config = from_mapping(QuickstartConfig, config_dict)
    workdir = pathlib.Path(args.workdir).absolute()
    job = QuickstartJob(config, workdir)
    try:
        markers = run_stages(job.stages(), workdir)
    except (KeyboardInterrupt, Interrupted):
        print(f"\nstopped; the same command goes on in {args.workdir}", file=sys.stderr)
        return 130
    total = format_seconds(sum(marker["seconds"] for marker in markers.values()))
    print(f"done in {total}: open {workdir / REPORT_FILE}")
    return 0


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
