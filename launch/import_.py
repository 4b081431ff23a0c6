"""`aromni import`: published Chameleon weights become a workdir with one checkpoint, to train on or decode."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

    from aromni_jax.interop.chameleon import ChameleonDirectory
    from aromni_jax.interop.stored_model import Rotary
    from aromni_jax.vocab import JointVocab


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `aromni import`."""
    parser.add_argument(
        "--source",
        required=True,
        metavar="DIR",
        help="Hugging Face Chameleon, Anole or AR-Omni directory, or Meta's folder with params.json",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="workdir to create; init_from takes it")
    parser.add_argument(
        "--tokenizers",
        metavar="DIR",
        help="vocab.json and tokenizers of a source that has none; text/, image/, speech/ alone speak Chameleon's rows",
    )
    parser.add_argument(
        "--rotary",
        choices=("half_split", "interleaved"),
        help="order of query and key rows, where the source cannot say (the error asks for it)",
    )


def main(args: argparse.Namespace) -> int:
    """Imports, and prints what was found and what can be done with the result."""
    opened = import_directory(args.source, args.output, tokenizers=args.tokenizers, rotary=args.rotary)
    model, rotary = opened.model, opened.rotary.replace("_", "-")
    print(
        f"{args.source}: {opened.layout}, {model.num_layers} layers of width {model.d_model}, "
        f"{'Swin-Norm' if model.norm_position == 'swin' else 'pre-norm'}, QK-norm, {rotary} rotation, {opened.dtype}"
    )
    if opened.assumed_vocab:
        print(f"nothing says what the {model.vocab_size} rows mean: taken as those of Chameleon and AR-Omni")
    print(f"{args.output}: checkpoint of step {opened.provenance.step}; train from it with", end=" ")
    print(f"--config.init_from={args.output}")
    if opened.left_out:
        print(
            f"left out: {len(opened.left_out)} tensors of the source's own image tokenizer ({opened.left_out[0]}, ...)"
        )
    return 0


def import_directory(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizers: str | os.PathLike[str] | None = None,
    rotary: Rotary | None = None,
) -> ChameleonDirectory:
    """Writes workdir `output` with the weights of `source` in the dtype they are stored in.

    Tensors are read one by one, into files that stand in for memory until the checkpoint is written: beside the page
    cache, this takes as much memory as two copies of the largest parameter, all layers of it.

    Args:
      tokenizers: directory with `vocab.json`, tokenizers or both, for a source that has none of its own.
      rotary: as `ChameleonDirectory`.

    Returns:
      What was imported.

    Raises:
      ValueError: `source` is not a Chameleon directory our decoder can compute, or `output` is taken.
    """
    from aromni_jax.config import CheckpointConfig
    from aromni_jax.interop import names
    from aromni_jax.interop.chameleon import ChameleonDirectory
    from aromni_jax.interop.container import whole_directory
    from aromni_jax.train import workdir as workdirs
    from aromni_jax.train.checkpoint import Checkpointer
    from aromni_jax.train.saved_step import RunFacts

    given = pathlib.Path(tokenizers) if tokenizers is not None else None
    opened = ChameleonDirectory(pathlib.Path(source), vocabulary_of(given) if given else None, rotary)
    fields = dataclasses.asdict(opened.model)
    # The two fields that follow from vocabulary and weights are derived again wherever the config is read.
    model = {name: value for name, value in fields.items() if name not in ("vocab_size", "perceptual_dim")}
    config = {
        "model": model,
        "sequence_length": opened.provenance.max_positions,
        "imported": {"template": opened.provenance.template, "uses_ema": opened.provenance.uses_ema},
    }
    with whole_directory(pathlib.Path(output).absolute()) as directory:
        params = names.nested({path: _on_disk(opened, path, directory) for path in opened.shapes()})
        checkpointer = Checkpointer(
            directory, CheckpointConfig(save_every_steps=1, keep_last=1, keep_every_steps=0, asynchronous=False)
        )
        facts = RunFacts(
            config=config,
            vocab_fingerprint=opened.vocab.fingerprint,
            data_fingerprint=opened.provenance.data_fingerprint,
            data_position={},
            metrics_window={},
        )
        try:
            checkpointer.save(opened.provenance.step, {"params": params}, facts)
        finally:
            checkpointer.close()
        beside = directory / workdirs.TOKENIZERS
        origin = opened.tokenizers or given
        if origin is not None:
            shutil.copytree(origin, beside)
        else:
            beside.mkdir()
        (beside / "vocab.json").write_text(opened.vocab.to_json(), encoding="utf-8")
        (directory / workdirs.CONFIG_FILE).write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    return opened


def _on_disk(opened: ChameleonDirectory, path: str, directory: pathlib.Path) -> jax.Array:
    """Parameter `path`, layer by layer, as an array whose memory is a file in `directory` that has no name any more."""
    import jax
    import numpy as np

    with tempfile.TemporaryFile(dir=directory) as file:
        array = np.memmap(file, opened.numpy_dtype, "w+", shape=opened.shapes()[path])
    if opened.is_stacked(path):
        for layer in range(opened.model.num_layers):
            array[layer] = opened.read(path, layer)
    else:
        array[...] = opened.read(path, None)
    # On the CPU, whatever else there is: jax takes the memory as it is.
    return jax.device_put(array, jax.local_devices(backend="cpu")[0])


def vocabulary_of(tokenizers: pathlib.Path) -> JointVocab:
    """The vocabulary in `tokenizers`; without a `vocab.json`, the released rows of the tokenizers that are there.

    A Chameleon without speech (Anole) has the same rows as AR-Omni: those of speech codes then mean nothing.

    Raises:
      FileNotFoundError: neither `vocab.json` nor `text/`.
      ValueError: a file is damaged, or a tokenizer is not one that speaks the released rows.
    """
    from aromni_jax.tokenizers.bundle import TokenizerBundle
    from aromni_jax.vocab import JointVocab

    file = tokenizers / "vocab.json"
    if file.is_file():
        return JointVocab.from_json(file.read_text(encoding="utf-8"))
    bundle = TokenizerBundle.from_parts(tokenizers)
    vocab = JointVocab.released(bundle.fingerprints)
    assert vocab.image is not None
    if getattr(bundle.text, "text_ids", None) != (vocab.text.start, vocab.text.stop):
        raise ValueError(
            f"{tokenizers / 'text'} is not the text tokenizer of Chameleon, whose ids are the rows from "
            f"{vocab.text.start} on; import that one with aromni tokenizer import, or give a vocab.json that says "
            "which rows this one has"
        )
    if bundle.image:
        _check_codebooks(tokenizers / "image", [bundle.image.num_codes], [vocab.image.size])
    if bundle.speech:
        codebooks = [bundle.speech.num_codes] * bundle.speech.num_codebooks
        _check_codebooks(tokenizers / "speech", codebooks, [span.size for span in vocab.speech])
    return dataclasses.replace(
        vocab,
        image=vocab.image if bundle.image else None,
        tokens_per_image=bundle.image.tokens_per_image if bundle.image else 0,
        speech=vocab.speech if bundle.speech else (),
    )


def _check_codebooks(path: pathlib.Path, codes: list[int], rows: list[int]) -> None:
    if codes != rows:
        raise ValueError(
            f"{path} has codebooks of {codes} codes, Chameleon's layout has {rows} rows; leave it out, or give a "
            "vocab.json that says which rows they have"
        )


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
