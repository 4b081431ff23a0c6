"""What `aromni tokenizer` reads and writes, checked before any work: the tokenizer's directory, and other files."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from launch.flags import check_can_write

_CONFIG = "config.json"
_TRAINING = "training"
_FILES = (_CONFIG, "params.safetensors", "tokenizer.model", "tokenizer.json")
"""What a saved tokenizer of any kind is made of."""


def check(args: argparse.Namespace) -> None:
    """Checks every place that `args` names.

    Raises:
      ValueError: a tokenizer of another kind, one that would be replaced unasked, or a file that cannot be written.
      FileNotFoundError: no tokenizer where one is read.
    """
    if args.action in ("train", "import"):
        _check_is_free(args)
    else:
        _check_is_there(args)
    for flag in ("json", "report") + (("output",) if args.action in ("encode", "decode") else ()):
        check_can_write(flag, getattr(args, flag))
    if args.action in ("encode", "decode"):
        _check_suffix(args)


def _check_is_free(args: argparse.Namespace) -> None:
    directory = Path(args.tokenizer)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--tokenizer={directory} is a file; name a directory for the tokenizer")
    # A training that goes on, or is finished, is known by its state: it refuses other data and settings by itself.
    goes_on = args.action == "train" and (directory / _TRAINING).is_dir()
    if (directory / _CONFIG).exists() and not (args.overwrite or goes_on):
        raise ValueError(
            f"--tokenizer={directory} holds a tokenizer already; name another directory, or give --overwrite to "
            "replace it (data made with it needs it)"
        )


def clear(args: argparse.Namespace) -> None:
    """With --overwrite, removes the tokenizer at --tokenizer and the state of its training; nothing else."""
    if args.overwrite:
        for name in _FILES:
            (Path(args.tokenizer) / name).unlink(missing_ok=True)
        shutil.rmtree(Path(args.tokenizer) / _TRAINING, ignore_errors=True)


def _check_is_there(args: argparse.Namespace) -> None:
    directory = Path(args.tokenizer)
    if not (directory / _CONFIG).is_file():
        inside = directory / args.kind
        remedy = "make one with aromni tokenizer train or import"
        if (inside / _CONFIG).is_file():
            remedy = f"did you mean --tokenizer={inside}?"
        raise FileNotFoundError(f"--tokenizer={directory} holds no tokenizer (it has no {_CONFIG}); {remedy}")
    from aromni_jax.tokenizers.bundle import kind_of

    if (found := kind_of(directory)) != args.kind:
        raise ValueError(
            f"--tokenizer={directory} is a tokenizer of {found}; give --kind={found}, or a tokenizer of {args.kind}"
        )


def _check_suffix(args: argparse.Namespace) -> None:
    from data_pipelines.layouts import PICTURE_SUFFIXES

    kinds = {"image": PICTURE_SUFFIXES, "speech": (".wav", ".flac", ".ogg"), "text": (".txt",)}
    allowed = (".npy",) if args.action == "encode" else kinds[args.kind]
    if Path(args.output).suffix.lower() not in allowed:
        raise ValueError(
            f"--output={args.output}: {args.action} --kind={args.kind} writes files that end in {', '.join(allowed)}"
        )
