"""One checkpoint of a workdir, with everything that says what it is: shared by export, generate and evaluate."""

from __future__ import annotations

import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from aromni_jax.interop.chameleon import Provenance
    from aromni_jax.models.config import ModelConfig
    from aromni_jax.train.saved import SavedParams
    from aromni_jax.vocab import JointVocab


class SavedRun:
    """A checkpoint opened for reading; also an `interop.TensorSource`.

    Attributes:
      params: the weights (or their moving average), read on demand.
      model, vocab: what they belong to; the vocabulary is the one they were trained with.
      tokenizers: directory of the tokenizers, at least `vocab.json`.

    Raises:
      ValueError: no such checkpoint, none readable, no moving average in it, or another vocabulary beside it.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int | None = None, ema: bool = False) -> None:
        from aromni_jax.models.config import resolve_model
        from aromni_jax.train.saved import open_for_export
        from aromni_jax.train.workdir import TOKENIZERS
        from aromni_jax.vocab import JointVocab

        self.params: SavedParams = open_for_export(workdir, step, ema)
        self._ema = ema
        self.tokenizers = pathlib.Path(workdir) / TOKENIZERS
        vocab_file = self.tokenizers / "vocab.json"
        if not vocab_file.is_file():
            raise ValueError(f"{vocab_file} is missing: without it nobody knows what the rows of the model mean")
        self.vocab: JointVocab = JointVocab.from_json(vocab_file.read_text(encoding="utf-8"))
        self.vocab.check_fingerprint(self.params.facts.vocab_fingerprint, f"checkpoint {self.params.step} of {workdir}")
        head = self.params.shapes.get("perceptual_head/kernel")
        self.model: ModelConfig = resolve_model(
            self.params.facts.config["model"], self.vocab.size, head.shape[-1] if head else 0
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(leaf.shape) for name, leaf in self.params.shapes.items()}

    def read(self, path: str, layer: int | None) -> np.ndarray:
        return self.params.read(path, layer)

    def template(self) -> str:
        """Name of the prompt templates of the run, "" where there are none (synthetic rows).

        Raises:
          ValueError: a data set is not there any more, or they were made with different templates.
        """
        config = self.params.facts.config
        return config["imported"]["template"] if "imported" in config else _template_of_data(config)

    @property
    def max_positions(self) -> int:
        """The longest document it was trained on may have this many tokens."""
        return int(self.params.facts.config["sequence_length"])

    def provenance(self, template: str = "") -> Provenance:
        """What an export says about its origin; `template` overrides what the run knows."""
        from aromni_jax.interop.chameleon import Provenance

        config = self.params.facts.config
        return Provenance(
            step=self.params.step,
            template=template or self.template(),
            data_fingerprint=self.params.facts.data_fingerprint,
            uses_ema=self._ema or bool(config.get("imported", {}).get("uses_ema")),
            max_positions=self.max_positions,
        )


def _template_of_data(config: dict[str, Any]) -> str:
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
