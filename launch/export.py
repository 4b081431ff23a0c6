"""`aromni export`: a checkpoint becomes a Hugging Face Chameleon directory, one tensor at a time."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from aromni_jax.interop.chameleon import Provenance
    from aromni_jax.models.config import ModelConfig
    from aromni_jax.train.saved import SavedParams
    from aromni_jax.vocab import JointVocab

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

    saved = _SavedSource(workdir, step, ema)
    return export_chameleon(
        saved,
        saved.model,
        saved.vocab,
        pathlib.Path(output),
        provenance=saved.provenance(template),
        dtype=dtype,
        tokenizers=saved.tokenizers,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


class _SavedSource:
    """One checkpoint of a workdir as an `interop.TensorSource`, with the model and vocabulary it belongs to."""

    def __init__(self, workdir: str | os.PathLike[str], step: int | None, ema: bool) -> None:
        from aromni_jax.models.config import resolve_model
        from aromni_jax.train.saved import open_for_export
        from aromni_jax.train.workdir import TOKENIZERS
        from aromni_jax.vocab import JointVocab

        self._saved: SavedParams = open_for_export(workdir, step, ema)
        self._ema = ema
        self.tokenizers = pathlib.Path(workdir) / TOKENIZERS
        vocab_file = self.tokenizers / "vocab.json"
        if not vocab_file.is_file():
            raise ValueError(f"{vocab_file} is missing: without it nobody knows what the rows of the model mean")
        self.vocab: JointVocab = JointVocab.from_json(vocab_file.read_text(encoding="utf-8"))
        self.vocab.check_fingerprint(self._saved.facts.vocab_fingerprint, f"checkpoint {self._saved.step} of {workdir}")
        head = self._saved.shapes.get("perceptual_head/kernel")
        self.model: ModelConfig = resolve_model(
            self._saved.facts.config["model"], self.vocab.size, head.shape[-1] if head else 0
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(leaf.shape) for name, leaf in self._saved.shapes.items()}

    def read(self, path: str, layer: int | None) -> np.ndarray:
        return self._saved.read(path, layer)

    def provenance(self, template: str) -> Provenance:
        from aromni_jax.interop.chameleon import Provenance

        config = self._saved.facts.config
        imported = config.get("imported")
        return Provenance(
            step=self._saved.step,
            template=template or (imported["template"] if imported else _template_of_data(config)),
            data_fingerprint=self._saved.facts.data_fingerprint,
            uses_ema=self._ema or bool(imported and imported["uses_ema"]),
            max_positions=config["sequence_length"],
        )


def _template_of_data(config: dict[str, Any]) -> str:
    """Name of the templates the data sets of a run were made with; "" for synthetic rows, which have none.

    Raises:
      ValueError: a data set is not there any more, or they were made with different ones.
    """
    mixture = config["data"]["mixture"]
    if isinstance(mixture, str):
        return ""
    names = set()
    for name, entry in mixture.items():
        described = pathlib.Path(entry["path"]) / "dataset.json"
        if not described.is_file():
            raise ValueError(
                f"data set {name!r} is not at {described.parent} any more: name its templates with --template"
            )
        names.add(json.loads(described.read_text(encoding="utf-8"))["templates"]["name"])
    if len(names) > 1:
        raise ValueError(
            f"the data sets were made with several templates ({', '.join(sorted(names))}): say with --template which "
            "one prompts of this model should use"
        )
    return names.pop()


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "20KB"; ValueError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)\s*(KB|MB|GB)", text.strip().upper())
    if not match:
        raise ValueError(f"--max_shard_size={text}: give a number and KB, MB or GB, for example 5GB")
    return int(match[1]) * _UNITS[match[2]]


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
