"""`aromni show`: one packed row for a human, as a table or as a page with pictures and sound."""

from __future__ import annotations

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--data", required=True, metavar="DIR", help="a data set made by `aromni pretokenize`")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="which row (default: 0)")
    parser.add_argument("--sequence_length", type=int, default=512, metavar="L", help="length of a row (default: 512)")
    parser.add_argument(
        "--weighting",
        default="balanced",
        choices=("uniform", "response", "balanced", "sft"),
        help="loss weights to show (default: balanced)",
    )
    parser.add_argument("--html", default="", metavar="FILE", help="also write a page with pictures and players")


def main(args: argparse.Namespace) -> int:
    """Prints the row, and writes the page where one is asked for."""
    from aromni_jax.config import LossConfig
    from data_pipelines.show import RowView

    loss = LossConfig(args.weighting, 0.0, "predict", 0.0, 1)
    view = RowView(args.data, row=args.row, sequence_length=args.sequence_length, loss=loss)
    print(view.to_text(), end="")
    if args.html:
        pathlib.Path(args.html).write_text(view.to_html(), encoding="utf-8")
        print(f"\nwrote {args.html}")
    return 0


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
