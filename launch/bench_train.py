"""`aromni bench train`: the train step beside the authors' stack, and beside the rate of matrix products.

The peer is Hugging Face's Chameleon (`swin_norm=True`) in torch, which starts from the same weights and takes the same
steps: AdamW, one norm for clipping, cross-entropy. Sides run in turn on the same cores, or the same GPU. Two batches:

* `dense`: every row is one document, the same for both sides; the peer takes 2 rows at a time and adds gradients up.
* `packed`: documents of the recipe's lengths. Ours are packed into rows; the peer gets the very same documents as the
  published training batches them (METHOD fault 5): 2 at a time, padded on the right to the longest of the 16
  that 8 processes would read together; and also (`micro_batch_padding`) only to the longer of each 2. It needs no mask,
  because padding stands after all that counts. Tokens that count are the targets of documents.

On CPUs our side keeps the memory that it frees (`launch.host_memory`), and the peer gives it back, as torch does where
nobody tells it not to. `--keep_peer_memory` tells it.

MFU is METHOD section 9: FLOPs of the model, causal, within documents, without padding and without what is computed
again, over the time and the rate of the faster side's matrix products in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from launch.bench_sides import Process, ask, available_cores, chosen_cases, has_peer, started, versions
from launch.flags import load_config

DEFAULT_CONFIG = "configs/bench.py"
_DOCUMENTS = 4_000
MICRO_BATCH = 2
PEER_NAME = "transformers.ChameleonForConditionalGeneration(swin_norm=True) in torch, AdamW"
_BATCHES = ("dense", "packed")
_WARM_UP = 3
"""Steps of a side before it is timed: the first compiles, and all may still ask the system for memory."""
PADDINGS = {"packed": 16, "micro_batch_padding": MICRO_BATCH}
"""Question to the peer -> among how many documents the longest is sought."""
KEEPING_PEER = "peer_that_keeps_memory"
"""What `launch.bench_train_side` calls a peer that keeps the memory it frees."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the table; returns {"dense": result, "packed": result} under the keys of `aromni bench --json`, with
    `--case` only one of them.

    Without a peer (`--no_peer`, or no torch and transformers) its figures are None.

    Raises:
      ValueError: the config does not suit a run without a vocabulary of its own, no such case, or a side stopped.
    """
    names = chosen_cases(args.case, _BATCHES)
    config = _config(args)
    cores = available_cores(args.num_cores)
    is_beside_peer = has_peer(args.no_peer)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        directory = Path(folder)
        _tell("the documents")
        _write_inputs(directory, config, args.data)
        on_cores = ",".join(map(str, cores))
        _tell("our side compiles its step")
        ours = stack.enter_context(started("launch.bench_train_side", ["ours", folder, on_cores]))
        described = ask(ours, "describe")
        print(f"{described['device']}, {len(cores)} of {os.cpu_count()} cores; {described['parameters']:,} parameters")
        sides = {"ours": ours}
        keeps = args.keep_peer_memory and described["platform"] == "cpu"
        if is_beside_peer:
            arguments = [KEEPING_PEER if keeps else "peer", folder, on_cores, described["platform"]]
            _tell("the peer reads our weights")
            sides["peer"] = stack.enter_context(started("launch.bench_train_side", arguments))
        libraries = versions("jax", *(("torch", "transformers") if is_beside_peer else ()))
        device = f"{described['device']}, {len(cores)} of {os.cpu_count()} cores; {libraries}"
        peer_name = PEER_NAME + (", which keeps freed memory" if keeps else "")
        common = {"device": device, "peer_name": peer_name if is_beside_peer else None, "repeats": args.repeats}
        results = {}
        for name in names:
            results[name] = _measured(name, sides, described[name], args.repeats)
            results[name] |= common | {"shape": described["shape"]}
            print(_describe(name, results[name]), flush=True)
        if "dense" in names:
            _tell("the step by its parts")
            parts, peak = ask(ours, "parts"), results["dense"]["peak_flops"]
            results["dense"] |= {"parts": _judge(parts, peak), "bound_by": _bound_by(parts, peak)}
            print(_describe_parts(results["dense"]), flush=True)
    return results


def _config(args: argparse.Namespace) -> Any:
    """The training config, with what both sides can do: a constant rate, and cross-entropy that counts targets once."""
    config = load_config(args)
    with config.ignore_type():  # Where the config names data sets.
        config.data.mixture = "synthetic"
    config.loss.update(weighting="uniform", perceptual_weight=0.0, z_loss_weight=0.0)
    config.optimizer.update(name="adamw", schedule="constant", warmup_steps=0, learning_rate=1e-4)
    return config


def _write_inputs(directory: Path, config: Any, data: str) -> None:
    """config.json, vocab.json, and the fields of a PackedBatch in `dense.npz` and `packed.npz`."""
    from aromni_jax.config import DataConfig, LossConfig, TrainConfig, from_mapping, to_json
    from aromni_jax.structs import PackedBatch
    from aromni_jax.vocab import JointVocab
    from data_pipelines.pipeline import make_train_iterator
    from data_pipelines.recipe_corpus import write_recipe_corpus

    train = from_mapping(TrainConfig, config)
    (directory / "config.json").write_text(to_json(train), encoding="utf-8")
    corpus = Path(data) if data else directory / "recipe"
    if not data:
        write_recipe_corpus(corpus, _DOCUMENTS)
    vocab = JointVocab.from_json((corpus / "vocab.json").read_text(encoding="utf-8"))
    (directory / "vocab.json").write_text(vocab.to_json(), encoding="utf-8")
    packed = next(
        make_train_iterator(
            DataConfig({"corpus": {"path": str(corpus)}}, "examples", num_workers=0, prefetch_batches=1),
            vocab,
            loss=LossConfig("uniform", 0.0, "predict", 0.0, 1024),
            seed=train.seed,
            sequence_length=train.sequence_length,
            global_batch_size=train.global_batch_size,
        )
    )
    shape = packed.inputs_BL.shape
    ids = np.random.default_rng(0).integers(vocab.text.start, vocab.size, (shape[0], shape[1] + 1), np.int32)
    dense = dataclasses.replace(
        packed,
        inputs_BL=ids[:, :-1],
        targets_BL=ids[:, 1:],
        segment_ids_BL=np.ones(shape, np.int32),
        positions_BL=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        loss_weights_BL=np.ones(shape, np.float32),
    )
    for name, batch in (("dense", dense), ("packed", packed)):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(PackedBatch)}
        np.savez(directory / f"{name}.npz", **fields)


def _measured(name: str, sides: dict[str, Process], counted: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The result of one batch; warm calls of every side first, whose losses say whether both do the same."""
    steps = [(name, "ours")]
    if "peer" in sides:
        steps += [(question, "peer") for question in (PADDINGS if name == "packed" else [name])]
    first_losses = {}
    for question, side in steps:
        # torch.compile works a minute or more.
        _tell(f"first steps: {question}, {side}")
        first_losses[question, side] = [ask(sides[side], question)["loss"] for _ in range(_WARM_UP)]
    seconds: dict[tuple[str, str], list[float]] = {step: [] for step in steps}
    positions: dict[tuple[str, str], int] = {}
    peaks = []
    for number in range(repeats):
        for question, side in steps:
            answer = ask(sides[side], question)
            _tell(f"round {number + 1} of {repeats}: {question}, {side}: {answer['seconds']:.3f} s")
            seconds[question, side].append(answer["seconds"])
            positions[question, side] = answer["positions"]
        peaks += [ask(process, "peak") for process in sides.values()]
    peak, tokens, flops = max(peaks), counted["tokens"], counted["flops"]
    rates = {step: tokens / statistics.median(times) for step, times in seconds.items()}
    fills = {step: tokens / number for step, number in positions.items()}
    ours, peer = rates[name, "ours"], rates.get((name, "peer"))
    result = {
        "ours": ours,
        "limit": tokens * peak / flops,
        "peer": peer,
        "ratio_to_limit": ours * flops / (tokens * peak),
        "ratio_to_peer": ours / peer if peer else None,
        "unit": "useful tokens/s",
        "mfu_peer": peer * flops / (tokens * peak) if peer else None,
        "peak_flops": peak,
        "fill": fills[name, "ours"],
        "fill_peer": fills.get((name, "peer")),
    }
    if peer and name == "dense":
        pairs = zip(first_losses[name, "ours"], first_losses[name, "peer"])
        result["largest_loss_difference"] = max(abs(ours - peer) for ours, peer in pairs)
    elif peer:
        milder = ("micro_batch_padding", "peer")
        result |= {
            "peer_micro_batch_padding": rates[milder],
            "ratio_to_micro_batch_padding": ours / rates[milder],
            "fill_micro_batch_padding": fills[milder],
        }
    return result


def _tell(line: str) -> None:
    """Progress, apart from the table."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _judge(parts: dict[str, dict[str, float]], peak: float) -> dict[str, dict[str, Any]]:
    """Each part of the step with the share of the peak that its model FLOPs reach; None for a part without any."""

    def share(part: dict[str, float]) -> float | None:
        return part["flops"] / (part["seconds"] * peak) if part["flops"] and part["seconds"] else None

    return {name: {**part, "share_of_peak": share(part)} for name, part in parts.items()}


def _bound_by(parts: dict[str, dict[str, float]], peak: float) -> str:
    """The part that loses most time against the rate of matrix products."""
    return max(parts, key=lambda name: parts[name]["seconds"] - parts[name]["flops"] / peak)


def _describe(name: str, result: dict[str, Any]) -> str:
    lines = [
        f"{name}: {result['shape']}, {result['fill']:.1%} full; {result['ours']:,.0f} {result['unit']}, MFU "
        f"{result['ratio_to_limit']:.0%} of {result['peak_flops'] / 1e9:,.0f} GFLOP/s"
    ]
    if result["peer"]:
        lines.append(
            f"  peer {result['peer']:,.0f} at {result['fill_peer']:.1%} full, MFU {result['mfu_peer']:.0%}: "
            f"ratio {result['ratio_to_peer']:.2f}"
        )
    if "ratio_to_micro_batch_padding" in result:
        lines.append(
            f"  padded only to the longer of each {MICRO_BATCH}: peer {result['peer_micro_batch_padding']:,.0f} at "
            f"{result['fill_micro_batch_padding']:.1%} full: ratio {result['ratio_to_micro_batch_padding']:.2f}"
        )
    if "largest_loss_difference" in result:
        difference = result["largest_loss_difference"]
        lines.append(f"  losses of the first {_WARM_UP} steps differ by at most {difference:.1e}")
    return "\n".join(lines)


def _describe_parts(result: dict[str, Any]) -> str:
    shown = ", ".join(
        f"{part} {values['seconds']:.2f} s"
        + (f" ({values['share_of_peak']:.0%} of peak)" if values["share_of_peak"] else "")
        for part, values in result["parts"].items()
    )
    return f"the dense step by its parts: {shown}; most time is lost in {result['bound_by']}"
