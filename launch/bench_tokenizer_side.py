"""One side of `aromni bench tokenizer`, in a process of its own: answers questions on standard input with numbers.

`amount` is what a batch holds (pictures, or seconds of sound); `encode` and `decode` are seconds of one batch, arrays
on the host to arrays on the host. Results go to files for the parent to compare.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from launch.bench_sides import answer_questions
from launch.host_memory import keep_freed_memory

Functions = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]
"""Encode and decode of a batch of equally long items."""

_CODES_PER_UTTERANCE = 256
_NUM_CODEBOOKS = 8
_CODE_HZ_HOP = {"encodec": (75, 320), "wavtokenizer": (40, 600)}


def _inputs(family: str, items: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if family == "chameleon":
        coarse = rng.integers(0, 256, (items, 32, 32, 3), np.uint8)
        return coarse.repeat(16, axis=1).repeat(16, axis=2)
    _, hop = _CODE_HZ_HOP[family]
    return (0.2 * rng.normal(size=(items, _CODES_PER_UTTERANCE * hop))).astype(np.float32)


def _ours(family: str, directory: Path) -> Functions:
    keep_freed_memory()
    from aromni_jax.interop.encodec_files import load_encodec
    from aromni_jax.interop.vqgan_files import PublishedVQGAN
    from aromni_jax.interop.wavtokenizer_files import load_wavtokenizer

    if family == "chameleon":
        pictures = PublishedVQGAN(directory / "weights.ckpt", 512).tokenizer()
        return pictures.encode, pictures.decode
    if family == "encodec":
        sounds = load_encodec(directory, _NUM_CODEBOOKS)
    else:
        sounds = load_wavtokenizer(directory / "weights.ckpt")
    return lambda batch: np.stack(sounds.encode(list(batch))), lambda codes: np.stack(sounds.decode(list(codes)))


def _peer(family: str, directory: Path, num_threads: int) -> Functions:
    from aromni_jax.peers import throughput

    return throughput.prepare(family, directory, num_threads, _NUM_CODEBOOKS)


def main() -> None:
    """Makes the codec of one side, then answers until standard input closes."""
    side, family, items, place, cores = sys.argv[1:]
    directory, core_ids = Path(place), [int(core) for core in cores.split(",")]
    # Before any library starts its threads: they count the cores they see.
    os.sched_setaffinity(0, core_ids)
    batch = _inputs(family, int(items))
    encode, decode = _ours(family, directory) if side == "ours" else _peer(family, directory, len(core_ids))

    def answer(question: str) -> float:
        if question == "amount":
            each = _CODES_PER_UTTERANCE / _CODE_HZ_HOP[family][0] if family in _CODE_HZ_HOP else 1
            return len(batch) * each
        # Both sides decode the peer's codes: a tie that went the other way is not a difference of decoders.
        given = batch if question == "encode" else np.load(directory / "peer_encode.npy")
        start = time.perf_counter()
        result = (encode if question == "encode" else decode)(given)
        seconds = time.perf_counter() - start
        np.save(directory / f"{side}_{question}.npy", result)
        return seconds

    answer_questions(answer)


if __name__ == "__main__":
    main()
