"""A trained model ready to be asked: from an export directory or from the workdir of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aromni_jax.inference.decode import OmniModel
    from aromni_jax.tokenizers.bundle import TokenizerBundle
    from aromni_jax.tokenizers.prompts import Templates


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """Weights, tokenizers and prompt templates that belong together, and the step the weights are from."""

    model: OmniModel
    bundle: TokenizerBundle
    templates: Templates
    step: int


def load_model(directory: str | os.PathLike[str], *, template: str = "") -> LoadedModel:
    """Loads `directory`: an export (`aromni export`), or a workdir, whose newest readable checkpoint is taken.

    `template` names the prompt templates where the directory does not (or to override it).

    Raises:
      ValueError: not a model, damaged, without tokenizers, tokenizers of another vocabulary, or no templates known.
    """
    from aromni_jax.tokenizers.bundle import TokenizerBundle
    from aromni_jax.tokenizers.prompts import load_templates

    path = pathlib.Path(directory)
    if not path.is_dir():
        raise ValueError(f"no model directory {path}; give an export directory or the workdir of a run")
    model, step, tokenizers, recorded = _from_workdir(path) if (path / "checkpoints").is_dir() else _from_export(path)
    name = template or recorded
    if not name:
        raise ValueError(f"{path} does not say which prompt templates it was trained with; name them with --template")
    if tokenizers is None or not (tokenizers / "text").is_dir():
        raise ValueError(f"{path} holds no tokenizers, without which neither prompts nor answers can be read")
    bundle = TokenizerBundle.load(tokenizers)
    built = dict(model.vocab.tokenizer_fingerprints)
    if built != bundle.fingerprints:
        raise ValueError(
            f"the tokenizers in {tokenizers} ({bundle.fingerprints}) are not those of the model ({built}); "
            "restore the ones it was trained with"
        )
    return LoadedModel(model, bundle, load_templates(name), step)


def _from_export(path: pathlib.Path) -> tuple[OmniModel, int, pathlib.Path | None, str]:
    import jax.numpy as jnp

    from aromni_jax.inference.decode import OmniModel
    from aromni_jax.interop.chameleon import ChameleonDirectory
    from aromni_jax.interop.names import nested
    from aromni_jax.models.decoder import Decoder

    opened = ChameleonDirectory(path)
    config = dataclasses.replace(opened.model, param_dtype=opened.dtype, remat="none")
    params = nested({name: jnp.asarray(opened.read(name, None)) for name in opened.shapes()})
    model = OmniModel(Decoder(config), params, opened.vocab)
    return model, opened.provenance.step, opened.tokenizers, opened.provenance.template


def _from_workdir(path: pathlib.Path) -> tuple[OmniModel, int, pathlib.Path, str]:
    from aromni_jax.inference.decode import OmniModel
    from aromni_jax.models.config import resolve_model
    from aromni_jax.models.decoder import Decoder
    from aromni_jax.train.saved import open_for_export
    from aromni_jax.train.workdir import TOKENIZERS
    from aromni_jax.vocab import JointVocab

    saved = open_for_export(path)
    tokenizers = path / TOKENIZERS
    vocab_file = tokenizers / "vocab.json"
    if not vocab_file.is_file():
        raise ValueError(f"{vocab_file} is missing: without it nobody knows what the rows of the model mean")
    vocab = JointVocab.from_json(vocab_file.read_text(encoding="utf-8"))
    vocab.check_fingerprint(saved.facts.vocab_fingerprint, f"checkpoint {saved.step} of {path}")
    head = saved.shapes.get("perceptual_head/kernel")
    config = resolve_model(saved.facts.config["model"], vocab.size, head.shape[-1] if head else 0)
    model = OmniModel(Decoder(dataclasses.replace(config, remat="none")), saved.load(), vocab)
    return model, saved.step, tokenizers, _template_of(saved.facts.config)


def _template_of(config: dict[str, Any]) -> str:
    """Name of the templates a run's data sets were made with; "" where that cannot be known."""
    if "imported" in config:
        return str(config["imported"]["template"])
    mixture = config["data"]["mixture"]
    if isinstance(mixture, str):
        return ""
    described = [pathlib.Path(entry["path"]) / "dataset.json" for entry in mixture.values()]
    names = {json.loads(file.read_text())["templates"]["name"] for file in described if file.is_file()}
    return names.pop() if len(names) == 1 else ""
