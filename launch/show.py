"""`aromni show`: one packed row, or the statistics of a data set, for a human: as tables, or as a page to see and hear.

aromni show --data=data/train --row=3 --html=row.html
aromni show --data=data/train --statistics --sequence_length=4096 --html=statistics.html --json=statistics.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aromni_jax.config import LossConfig

_SAMPLES_PER_TASK = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--data", required=True, metavar="DIR", help="a data set made by `aromni pretokenize`")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="which row (default: 0)")
    parser.add_argument(
        "--statistics",
        action="store_true",
        help="of all documents instead of one row: lengths, fill of rows beside padding, shares, quarantine, samples",
    )
    parser.add_argument("--sequence_length", type=int, default=512, metavar="L", help="length of a row (default: 512)")
    parser.add_argument(
        "--weighting",
        default="balanced",
        choices=("uniform", "response", "balanced", "sft"),
        help="loss weights to show (default: balanced)",
    )
    parser.add_argument("--html", default="", metavar="FILE", help="also write a page with pictures and players")
    parser.add_argument("--json", default="", metavar="FILE", help="with --statistics: also write its numbers")


def main(args: argparse.Namespace) -> int:
    """Prints the row or the statistics, and writes the page where one is asked for."""
    from aromni_jax.config import LossConfig

    if args.sequence_length < 1:
        raise ValueError(f"--sequence_length={args.sequence_length} must be at least 1")
    if args.json and not args.statistics:
        raise ValueError(f"--json={args.json} writes the numbers of --statistics; give both")
    loss = LossConfig(args.weighting, 0.0, "predict", 0.0, 1)
    return _statistics(args, loss) if args.statistics else _row(args, loss)


def _row(args: argparse.Namespace, loss: LossConfig) -> int:
    from data_pipelines.show import RowView

    view = RowView(args.data, row=args.row, sequence_length=args.sequence_length, loss=loss)
    print(view.to_text(), end="")
    if args.html:
        _write(args.html, view.to_html())
    return 0


def _statistics(args: argparse.Namespace, loss: LossConfig) -> int:
    from aromni_jax.evaluation.data_page import render_data_page
    from data_pipelines.show import sample_documents
    from data_pipelines.survey import survey, survey_text, ways_to_batch

    data = pathlib.Path(args.data)
    numbers = survey(data, sequence_length=args.sequence_length, loss=loss)
    print(survey_text(numbers), end="")
    if args.json:
        _write(args.json, json.dumps(numbers, indent=1) + "\n")
    if args.html:
        samples = sample_documents(data, per_task=_SAMPLES_PER_TASK)
        _write(args.html, render_data_page(numbers, ways_to_batch(numbers["rows"]), samples))
    return 0


def _write(file: str, text: str) -> None:
    pathlib.Path(file).write_text(text, encoding="utf-8")
    print(f"\nwrote {file}")


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
