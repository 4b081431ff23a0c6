"""`aromni bench tokenizer`: the published shapes of the codecs at random weights, beside torch on the same cores."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from launch.bench_sides import Process, ask, available_cores, started, versions

ITEMS = {"chameleon": 1, "encodec": 4, "wavtokenizer": 4}
"""Family -> items of a batch: pictures of 512 pixels, or utterances of 256 codes, which neither side has to pad."""
_UNITS = {"chameleon": "pictures/s", "encodec": "seconds of sound/s", "wavtokenizer": "seconds of sound/s"}
_PEERS = {
    "chameleon": "transformers.ChameleonVQVAE and the decoder of taming in torch",
    "encodec": "transformers.EncodecModel, 8 codebooks",
    "wavtokenizer": "WavTokenizer small 600 in torch",
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prints a line for each family and direction; returns them under the keys of `aromni bench --json`.

    Raises:
      ValueError: torch is missing, or there are not that many cores.
    """
    cores = available_cores(args.num_cores, default=1)
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise ValueError("the reference is in torch: pip install 'aromni-jax[hf]'")
    libraries = versions("jax", "torch", "transformers")
    device = f"{len(cores)} of {os.cpu_count()} cores, {platform.machine()}; {libraries}"
    print(f"{device}\nmedians of {args.repeats} calls of each side, in turn; {len(cores)} thread(s) each")
    results: dict[str, Any] = {}
    for family in args.family or tuple(ITEMS):
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
    items = ITEMS[family]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        # The peer goes first: it writes the weights that ours reads.
        peer = stack.enter_context(_worker("peer", family, items, directory, cores))
        ours = stack.enter_context(_worker("ours", family, items, directory, cores))
        amount = ask(peer, "amount")
        for action in ("encode", "decode"):
            ask(peer, action), ask(ours, action)  # compilation, and the threads' first work
            pairs = [(ask(ours, action), ask(peer, action)) for _ in range(repeats)]
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


def _worker(
    side: str, family: str, items: int, directory: str, cores: list[int]
) -> contextlib.AbstractContextManager[Process]:
    arguments = [side, family, str(items), directory, ",".join(map(str, cores))]
    return started("launch.bench_tokenizer_side", arguments, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
