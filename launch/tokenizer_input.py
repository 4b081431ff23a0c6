"""What `--input` of `aromni tokenizer` names: a file, a folder, a manifest, or any kind of source as `KIND:PATH`."""

from __future__ import annotations

import argparse
import ast
import functools
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from aromni_jax.tokenizers.speech_input import Report
    from data_pipelines.sources import Conversation, MediaFile, Source

Prepared = TypeVar("Prepared")
LONGEST_PIECE = 1 << 20
"""Characters of a text file that are read at once."""
_MAX_BAD_FRACTION = 0.01
_ERRORS_NAMED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `--input` and the flags that choose among what it holds."""
    parser.add_argument(
        "--input",
        metavar="PATH",
        help="a file, a folder, a manifest of conversations, or KIND:PATH as `aromni pretokenize` takes it; import: a "
        "published .safetensors, .ckpt, directory or tokenizer.json, or `shipped`",
    )
    parser.add_argument("--split", default="", help="of a manifest or KIND:PATH, read only this split")
    parser.add_argument(
        "--heldout_fraction", type=float, default=0.0, help="share of a source that names no splits that is heldout"
    )
    parser.add_argument(
        "--columns", type=_columns, default={}, metavar="DICT", help="of table: and tfds:, {'text': 'caption', ...}"
    )
    parser.add_argument(
        "--max_bad_fraction",
        type=_fraction,
        default=_MAX_BAD_FRACTION,
        metavar="F",
        help="share of the records or files that may be left out because they cannot be read (default: 0.01)",
    )
    parser.add_argument(
        "--max_files",
        type=int,
        metavar="N",
        help="train --kind=image|speech: learn from N files of a corpus, drawn with --seed, all of them in memory",
    )


def _fraction(text: str) -> float:
    """The value of `--max_bad_fraction`."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def _columns(text: str) -> dict[str, str]:
    """The value of `--columns`."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, dict) or not all(isinstance(word, str) for pair in value.items() for word in pair):
        raise argparse.ArgumentTypeError(f"{text!r} is no mapping of names; write \"{{'text': 'caption'}}\"")
    return value


def _source(args: argparse.Namespace) -> Source | None:
    """The source that --input names, if it is one."""
    from data_pipelines.source_kinds import named_kind, open_source

    if not named_kind(args.input)[0] and not args.input.endswith(".jsonl"):
        return None
    return open_source(args.input, split=args.split, heldout_fraction=args.heldout_fraction, columns=args.columns)


def bare_paths(args: argparse.Namespace) -> list[pathlib.Path]:
    """The files of the kind that --input, a file or folder, is or holds, sorted; ValueError when there are none."""
    from data_pipelines.containers import SOUND_SUFFIXES
    from data_pipelines.layouts import PICTURE_SUFFIXES
    from data_pipelines.places import located

    place = located(args.input)
    suffixes = {"text": (".txt",), "image": PICTURE_SUFFIXES, "speech": SOUND_SUFFIXES}[args.kind]
    if not place.exists():
        raise FileNotFoundError(f"--input={place} does not exist")
    if not place.is_dir():
        return [place]
    paths = sorted(path for path in place.rglob("*") if path.suffix.lower() in suffixes)
    if not paths:
        raise ValueError(f"--input={place} holds no {args.kind} ({', '.join(suffixes)})")
    return paths


def media(args: argparse.Namespace) -> list[MediaFile]:
    """The distinct pictures or utterances behind --input, at most --max_files of them, in order.

    Raises:
      ValueError: there are none, or too many records of a source cannot be read.
    """
    from data_pipelines.sources import MediaFile

    source = _source(args)
    if source is None:
        return [MediaFile(args.kind, path) for path in _drawn(bare_paths(args), args)]
    conversations = _conversations(source, _drawn(source.first_of_items, args), args.max_bad_fraction)
    files = dict.fromkeys(file for one in conversations for file in one.media() if file.kind == args.kind)
    if not files:
        raise ValueError(f"--input={args.input} holds no {args.kind}")
    return list(files)


def _drawn(everything: Sequence[Any], args: argparse.Namespace) -> Sequence[Any]:
    """`--max_files` of it in their order, or all."""
    most = args.max_files
    if most is not None and most < 1:
        raise ValueError(f"--max_files={most}: give at least one")
    if most is None or len(everything) <= most:
        return everything
    print(f"learning from {most:,} of {len(everything):,}, drawn with seed {args.seed}")
    return [everything[i] for i in sorted(random.Random(args.seed).sample(range(len(everything)), most))]


def _conversations(source: Source, records: Sequence[int], max_bad_fraction: float) -> Iterator[Conversation]:
    """Those records of a source, one at a time; the unreadable are left out and told, in the end too many an error."""
    from data_pipelines.sources import RecordError

    unreadable: list[Exception] = []
    for record in records:
        try:
            conversation = source[record]
        except RecordError as error:
            unreadable.append(error)
        else:
            yield conversation
    _tell(unreadable, len(records), max_bad_fraction)


def prepared(
    files: Sequence[MediaFile],
    prepare: Callable[[pathlib.Path, Report], Prepared],
    report: Report = lambda line: None,
    *,
    max_bad_fraction: float = _MAX_BAD_FRACTION,
) -> dict[MediaFile, Prepared]:
    """What `prepare` makes of every file, in order; `report` is told what it reports, by the names that people know.

    Files that cannot be read are left out and told.

    Raises:
      ValueError: more than `max_bad_fraction` of the files cannot be read, or none can.
    """
    found: dict[MediaFile, Prepared] = {}
    unreadable: list[Exception] = []
    for file in files:
        try:
            with file.on_disk() as path:
                found[file] = prepare(path, functools.partial(_report_by_name, report, path, file))
        except (ValueError, OSError) as error:
            unreadable.append(error)
    _tell(unreadable, len(files), max_bad_fraction)
    return found


def _report_by_name(report: Report, path: pathlib.Path, file: MediaFile, line: str) -> None:
    report(line.replace(str(path), str(file)))


def name(file: MediaFile) -> str:
    """The last part of what a file is called."""
    return pathlib.PurePosixPath(str(file)).name


def _tell(unreadable: list[Exception], total: int, max_bad_fraction: float) -> None:
    """Prints how many of `total` are left out; raises where they are too many: then something else is wrong."""
    if not unreadable:
        return
    if total == 1:
        raise unreadable[0]
    first = "; ".join(map(str, unreadable[:_ERRORS_NAMED]))
    if len(unreadable) == total:
        raise ValueError(f"none of {total:,} could be read; the first: {first}")
    counted = f"{len(unreadable):,} of {total:,} could not be read"
    if len(unreadable) > max_bad_fraction * total:
        raise ValueError(
            f"{counted}, more than --max_bad_fraction={max_bad_fraction:g}; the first: {first}. Mend or remove them, "
            "or raise --max_bad_fraction"
        )
    print(f"{counted} and are left out; the first: {first}")


def pieces_of_text(args: argparse.Namespace) -> Iterator[str]:
    """The text behind --input, a little at a time: a corpus need not fit into memory."""
    source = _source(args)
    if source is not None:
        for conversation in _conversations(source, source.first_of_items, args.max_bad_fraction):
            yield from conversation.texts()
        return
    for path in bare_paths(args):
        with path.open(encoding="utf-8") as file:
            while piece := file.readline(LONGEST_PIECE):
                yield piece


def texts(args: argparse.Namespace) -> list[str]:
    """Every text behind --input, whole files where it names files."""
    source = _source(args)
    if source is None:
        return [path.read_text(encoding="utf-8") for path in bare_paths(args)]
    return list(pieces_of_text(args))
