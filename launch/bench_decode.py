"""`aromni bench decode`: greedy tokens beside the time it takes to read the weights, and beside `transformers`.

Both sides answer the same prompt with the same weights on the same cores, or the same GPU, in turn, in processes of
their own: an export (`--model`), or random weights of `--config`; one answer, or `--rows` at a time. `text` is what
both can do; `speech` (ours) reads the speech rows of the output head alone, and its real-time factor counts a second of
sound as the tokens of the export's codec, or without one as 40, as the released codec does. With `--weights=int8` our
matrices have 8 bits, and the peer has what we compute in. The limit is the slower of two floors measured in the same
run: the bytes of the weights that a token needs, cache and activations left out, over the rate at which memory is read,
and their products over the rate of matrix products. With `--model`, `stream` is how `generate --stream` would speak.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from launch.bench_sides import Process, ask, available_cores, has_peer, started, versions
from launch.flags import load_config
from launch.host_memory import computes_on_cpu

DEFAULT_CONFIG = "configs/pretrain.py:100m"
PEER_NAME = "transformers.ChameleonForConditionalGeneration.generate, greedy, its cache"
PROMPT_TOKENS, ANSWER_TOKENS = 64, 128


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prints a line for each way; returns them under the keys of `aromni bench --json`.

    Without a peer (`--no_peer`, or no torch and transformers) its figures are None.

    Raises:
      ValueError: `--model` is no export, or a side stopped.
    """
    cores = available_cores(args.num_cores)
    is_beside_peer = has_peer(args.no_peer)
    rows = args.rows or [1]
    if min(rows) < 1:
        raise ValueError(f"--rows must be at least 1, not {min(rows)}")
    on_cores = ",".join(map(str, cores))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        directory = args.model or folder
        if not args.model:
            (Path(folder) / "model.txt").write_text(repr(_model(args)), encoding="utf-8")
        ours = stack.enter_context(
            started(
                "launch.bench_decode_side",
                ["ours", directory, on_cores, "beside" if is_beside_peer else "alone", args.weights or ""],
            )
        )
        described = ask(ours, "describe")
        sides = {"ours": ours}
        if is_beside_peer:
            arguments = ["peer", directory, on_cores, described["platform"], described["dtype"]]
            sides["peer"] = stack.enter_context(started("launch.bench_decode_side", arguments))
        libraries = versions("jax", *(("torch", "transformers") if is_beside_peer else ()))
        device = f"{described['device']}, {len(cores)} of {os.cpu_count()} cores; {libraries}"
        print(f"{device}\n{described['shape']}; {described['parameters']:,} parameters", flush=True)
        results = _measured(sides, described, args.repeats, rows)
    for name, result in results.items():
        shape = f"{described['shape']}, batch {result.pop('rows', 1)}"
        result |= {"device": device, "repeats": args.repeats, "shape": shape}
        print(_describe(name, result), flush=True)
    return results


def _model(args: argparse.Namespace) -> Any:
    """The model of a config, in float32 on a CPU: half precision is slower there, for both sides."""
    model = load_config(args).model
    fields = {"size": model} if isinstance(model, str) else model.to_dict()
    if computes_on_cpu():
        fields["dtype"] = "float32"
    return fields


def _measured(
    sides: dict[str, Process], described: dict[str, Any], repeats: int, rows: list[int]
) -> dict[str, dict[str, Any]]:
    ways = [(way, count, side) for count in rows for way in ("text", "speech") for side in sides]
    ways = [(way, count, side) for way, count, side in ways if way in described["bytes"]]
    ways = [(way, count, side) for way, count, side in ways if (way, side) != ("speech", "peer")]
    for way, count, side in ways:
        ask(sides[side], f"{way} {count}")  # compilation, and the threads' first work
    answers: dict[tuple[str, int, str], list[Any]] = {key: [] for key in ways}
    peaks, rates = [], []
    for _ in range(repeats):
        for way, count, side in ways:
            answers[way, count, side].append(ask(sides[side], f"{way} {count}"))
        peaks.append(ask(sides["ours"], "peak"))
        rates.append(ask(sides["ours"], "bandwidth"))
    results: dict[str, dict[str, Any]] = {}
    for way, count in dict.fromkeys((way, count) for way, count, _ in ways):
        ours = _rate(answers[way, count, "ours"])
        peer = _rate(answers[way, count, "peer"]) if (way, count, "peer") in answers else None
        needed = described["bytes"][way]
        floors = {"memory": needed / max(rates), "compute": count * described["flops"][way] / max(peaks)}
        bound_by = max(floors, key=lambda name: floors[name])
        limit = count / floors[bound_by]
        results[way if count == 1 else f"{way}_{count}"] = {
            "ours": ours,
            "limit": limit,
            "peer": peer,
            "ratio_to_limit": ours / limit,
            "ratio_to_peer": ours / peer if peer else None,
            "unit": "tokens/s",
            "peer_name": PEER_NAME if peer else None,
            "rows": count,
            "bound_by": bound_by,
            "bytes_per_token": needed,
            "memory_bytes_per_second": max(rates),
            "peak_flops": max(peaks),
            "first_token_seconds": statistics.median(a["first_token_seconds"] for a in answers[way, count, "ours"]),
            "rtf": described["speech_tokens_per_second"] * count / ours if way == "speech" else None,
        }
    if described["streams"]:
        ask(sides["ours"], "stream")
        results["stream"] = _median_record([ask(sides["ours"], "stream") for _ in range(repeats)])
    return results


def _rate(answers: list[dict[str, float]]) -> float:
    """Tokens a second after the first, of the median answer."""
    return statistics.median(answer["tokens"] / answer["seconds"] for answer in answers)


def _median_record(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The latency of each kind, the median over answers; the sum of underruns."""
    names = [name for name, value in records[0].items() if isinstance(value, (int, float))]
    record = {name: statistics.median(r[name] for r in records) for name in names}
    total = sum(r["underruns"] for r in records)
    empty = dict.fromkeys(("limit", "peer", "ratio_to_limit", "ratio_to_peer", "peer_name"))
    return (
        empty
        | {"ours": record["rtf"], "unit": "seconds of computing per second of sound"}
        | record
        | {"underruns": total}
    )


def _describe(name: str, result: dict[str, Any]) -> str:
    if name == "stream":
        return (
            f"stream: first token after {1e3 * result['first_token_seconds']:.0f} ms, first sound after "
            f"{1e3 * result['ttfa_seconds']:.0f} ms, real-time factor {result['rtf']:.3f}, "
            f"{result['underruns']} underruns in {result['repeats']} answers of {result['audio_seconds']:.1f} s"
        )
    line = (
        f"{name}: {result['ours']:.1f} tokens/s, {result['ratio_to_limit']:.0%} of {result['limit']:.1f} (bound by "
        f"{result['bound_by']}: {result['bytes_per_token'] / 1e6:,.0f} MB a token at "
        f"{result['memory_bytes_per_second'] / 1e9:.1f} GB/s); first token after "
        f"{1e3 * result['first_token_seconds']:.0f} ms"
    )
    if result["rtf"]:
        line += f", real-time factor {result['rtf']:.3f}"
    if result["peer"]:
        line += f"\n  peer {result['peer']:.1f}: ratio {result['ratio_to_peer']:.2f}"
    return line
