"""A trained model ready to be asked: from an export directory or from the workdir of a run."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING

from launch.saved_run import SavedRun

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from aromni_jax.inference.decode import OmniModel, Weights
    from aromni_jax.tokenizers.bundle import TokenizerBundle
    from aromni_jax.tokenizers.prompts import Templates
    from aromni_jax.vocab import JointVocab


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """Weights, tokenizers and prompt templates that belong together, and the step the weights are from."""

    model: OmniModel
    bundle: TokenizerBundle
    templates: Templates
    step: int


def load_model(
    directory: str | os.PathLike[str],
    *,
    template: str = "",
    mesh: Mesh | None = None,
    weights: Weights | None = None,
) -> LoadedModel:
    """Loads `directory`: an export (`aromni export`), or a workdir, whose newest readable checkpoint is taken.

    `template` names the prompt templates where the directory does not (or to override it). With a mesh no device ever
    holds more than its part of the weights; of an export the host holds one array at a time. `weights` is their type
    (`OmniModel.of`).

    Raises:
      ValueError: not a model, damaged, without tokenizers, tokenizers of another vocabulary, no templates known, or a
        mesh that does not divide the model.
    """
    from aromni_jax.tokenizers.bundle import TokenizerBundle
    from aromni_jax.tokenizers.prompts import load_templates

    path = _existing(directory)
    open_model = _from_workdir if (path / "checkpoints").is_dir() else _from_export
    model, step, tokenizers, name = open_model(path, template, mesh, weights)
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


def load_vocab(directory: str | os.PathLike[str]) -> JointVocab:
    """The vocabulary of what `load_model` loads, without its weights; ValueError where that is not a model."""
    from aromni_jax.interop.chameleon import ChameleonDirectory

    path = _existing(directory)
    return SavedRun(path).vocab if (path / "checkpoints").is_dir() else ChameleonDirectory(path).vocab


def _existing(directory: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise ValueError(f"no model directory {path}; give an export directory or the workdir of a run")
    return path


def _from_export(
    path: pathlib.Path, template: str, mesh: Mesh | None, weights: Weights | None
) -> tuple[OmniModel, int, pathlib.Path | None, str]:
    from aromni_jax.inference.decode import OmniModel
    from aromni_jax.interop.chameleon import ChameleonDirectory

    opened = ChameleonDirectory(path)
    config = dataclasses.replace(opened.model, param_dtype=opened.dtype)
    model = OmniModel.read(
        config, opened.read, opened.vocab, mesh=mesh, weights=weights, max_positions=opened.provenance.max_positions
    )
    return model, opened.provenance.step, opened.tokenizers, template or opened.provenance.template


def _from_workdir(
    path: pathlib.Path, template: str, mesh: Mesh | None, weights: Weights | None
) -> tuple[OmniModel, int, pathlib.Path, str]:
    from aromni_jax.inference.decode import OmniModel
    from aromni_jax.models.unstacked import stacked_params

    run = SavedRun(path)
    config, wanted = run.model, None
    if mesh is not None:
        placed = stacked_params(config, mesh)
        wanted = {name: leaf.update(sharding=placed[name].sharding) for name, leaf in run.params.shapes.items()}
    model = OmniModel.of(
        config, run.params.load(wanted), run.vocab, mesh=mesh, weights=weights, max_positions=run.max_positions
    )
    return model, run.params.step, run.tokenizers, template or run.template()
