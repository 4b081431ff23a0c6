"""`aromni import`: a Hugging Face Chameleon directory becomes a workdir with one checkpoint, to train on or decode."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `aromni import`."""
    parser.add_argument(
        "--source", required=True, metavar="DIR", help="Hugging Face Chameleon, Anole or AR-Omni directory"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="workdir to create; init_from takes it")


def main(args: argparse.Namespace) -> int:
    """Imports, and prints what can be done with the result."""
    step, left_out = import_directory(args.source, args.output)
    print(f"{args.output}: checkpoint of step {step}; train from it with --config.init_from={args.output}")
    if left_out:
        print(f"left out: {len(left_out)} tensors of the source's own image tokenizer ({left_out[0]}, ...)")
    return 0


def import_directory(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> tuple[int, tuple[str, ...]]:
    """Writes workdir `output` with the weights of `source` in the dtype they are stored in.

    Tensors are read one by one; the checkpoint that is written holds the whole model in memory once.

    Returns:
      (step of the checkpoint, names of tensors that were left out).

    Raises:
      ValueError: `source` is not a Chameleon directory our decoder can compute, or `output` is taken.
    """
    import jax

    from aromni_jax.config import CheckpointConfig
    from aromni_jax.interop import names
    from aromni_jax.interop.chameleon import ChameleonDirectory
    from aromni_jax.interop.container import whole_directory
    from aromni_jax.train import workdir as workdirs
    from aromni_jax.train.checkpoint import Checkpointer, RunFacts

    opened = ChameleonDirectory(pathlib.Path(source))
    fields = dataclasses.asdict(opened.model)
    # The two fields that follow from vocabulary and weights are derived again wherever the config is read.
    model = {name: value for name, value in fields.items() if name not in ("vocab_size", "perceptual_dim")}
    config = {
        "model": model,
        "sequence_length": opened.provenance.max_positions,
        "imported": {"template": opened.provenance.template, "uses_ema": opened.provenance.uses_ema},
    }
    with whole_directory(pathlib.Path(output).absolute()) as directory:
        params = names.nested({path: jax.device_put(opened.read(path, None)) for path in opened.shapes()})
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
        tokenizers = directory / workdirs.TOKENIZERS
        if opened.tokenizers is not None:
            shutil.copytree(opened.tokenizers, tokenizers)
        else:
            tokenizers.mkdir()
        (tokenizers / "vocab.json").write_text(opened.vocab.to_json(), encoding="utf-8")
        (directory / workdirs.CONFIG_FILE).write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    return opened.provenance.step, opened.left_out


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
