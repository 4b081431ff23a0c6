"""`aromni bench`: how fast we are beside the reference that others use, in turn on the same cores."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_ITEMS = {"chameleon": 1, "encodec": 4, "wavtokenizer": 4}
"""Family -> items of a batch: pictures of 512 pixels, or utterances of 256 codes, which neither side has to pad."""
_UNITS = {"chameleon": "pictures/s", "encodec": "seconds of sound/s", "wavtokenizer": "seconds of sound/s"}
_PEERS = {
    "chameleon": "transformers.ChameleonVQVAE and the decoder of taming in torch",
    "encodec": "transformers.EncodecModel, 8 codebooks",
    "wavtokenizer": "WavTokenizer small 600 in torch",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `aromni bench`."""
    parser.add_argument("what", choices=("tokenizer", "data", "checkpoint"))
    parser.add_argument("--family", choices=tuple(_ITEMS), action="append", help="only this one (repeat for more)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side; the median counts")
    parser.add_argument("--num_cores", type=int, default=1, help="of codecs, for each side, with as many threads")
    parser.add_argument("--data", default="", metavar="DIR", help="a data set to read (default: one is made)")
    parser.add_argument("--case", action="append", help="of checkpoint: only quickstart, or only 100m")
    parser.add_argument("--json", metavar="FILE", help="also write the table as JSON")


def main(args: argparse.Namespace) -> int:
    """Prints the table of one subject; ValueError says what is missing."""
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {args.repeats}")
    if args.what == "data":
        from launch import bench_data

        device = f"{platform.machine()}; {_versions('grain', 'array_record', 'numpy')}"
        print(device)
        results = {"data": bench_data.measure(args) | {"device": device}}
    elif args.what == "checkpoint":
        from launch import bench_checkpoint

        device = f"{os.cpu_count()} cores, {platform.machine()}; {_versions('jax', 'orbax-checkpoint')}"
        print(device)
        results = {name: row | {"device": device} for name, row in bench_checkpoint.measure(args).items()}
    else:
        results = _bench_tokenizers(args)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def _versions(*libraries: str) -> str:
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    return f"Python {platform.python_version()}; {shown}"


def _bench_tokenizers(args: argparse.Namespace) -> dict[str, Any]:
    """Prints a line for each family and direction."""
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("both sides must run on the same cores, which only Linux lets a process choose")
    available = sorted(os.sched_getaffinity(0))
    if not 1 <= args.num_cores <= len(available):
        raise ValueError(f"--num_cores must be in 1..{len(available)}, not {args.num_cores}")
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise ValueError("the reference is in torch: pip install 'aromni-jax[hf]'")
    cores = available[: args.num_cores]
    versions = _versions("jax", "torch", "transformers")
    device = f"{args.num_cores} of {os.cpu_count()} cores, {platform.machine()}; {versions}"
    print(f"{device}\nmedians of {args.repeats} calls of each side, in turn; {args.num_cores} thread(s) each")
    results: dict[str, Any] = {}
    for family in args.family or tuple(_ITEMS):
        for action, measured in _measure(family, cores, args.repeats).items():
            results[f"{family}/{action}"] = measured | {
                "unit": _UNITS[family],
                "peer_name": _PEERS[family],
                "device": device,
            }
            print(
                f"{family:<13} {action}: ours {measured['ours']:.3f}, peer {measured['peer']:.3f} {_UNITS[family]}, "
                f"ratio {measured['ratio_to_peer']:.2f}; {measured['agreement']}",
                flush=True,
            )
    return results


def _measure(family: str, cores: list[int], repeats: int) -> dict[str, dict[str, Any]]:
    """Direction -> result, with the keys of `aromni bench --json`."""
    results: dict[str, dict[str, Any]] = {}
    items = _ITEMS[family]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        # The peer goes first: it writes the weights that ours reads.
        peer = stack.enter_context(_worker("peer", family, items, directory, cores))
        ours = stack.enter_context(_worker("ours", family, items, directory, cores))
        amount = _ask(peer, "amount")
        for action in ("encode", "decode"):
            _ask(peer, action), _ask(ours, action)  # compilation, and the threads' first work
            pairs = [(_ask(ours, action), _ask(peer, action)) for _ in range(repeats)]
            our_rate, peer_rate = (amount / statistics.median(side) for side in zip(*pairs))
            results[action] = {
                "ours": our_rate,
                "peer": peer_rate,
                "ratio_to_peer": our_rate / peer_rate,
                "limit": None,
                "ratio_to_limit": None,
                "shape": f"batch {items}",
                "repeats": repeats,
                "agreement": _agreement(Path(directory), action),
            }
    return results


def _agreement(directory: Path, action: str) -> str:
    ours, peer = (np.load(directory / f"{side}_{action}.npy") for side in ("ours", "peer"))
    if action == "encode":
        return f"{np.mean(ours == peer):.2%} equal codes"
    return f"largest difference {np.abs(ours.astype(np.float32) - peer.astype(np.float32)).max():.1e}"


@contextlib.contextmanager
def _worker(side: str, family: str, items: int, directory: str, cores: list[int]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.bench_worker", side, family, str(items), directory, ",".join(map(str, cores))],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        _ask(process, "amount")
        yield process
    finally:
        process.kill()
        process.wait()


def _ask(process: subprocess.Popen[str], question: str) -> float:
    assert process.stdin and process.stdout
    process.stdin.write(question + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise ValueError("a side of the comparison stopped; its message is above")
    return float(answer)


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
