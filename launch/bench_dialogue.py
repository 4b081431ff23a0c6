"""`aromni bench dialogue --model=DIR`: one conversation of 200 turns, and whether its turns stay alike."""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.bench_sides import available_cores, versions

if TYPE_CHECKING:
    from aromni_jax.structs import Part
    from launch.loading import LoadedModel

NUM_TURNS, COMPARED_TURNS, ANSWER_TOKENS = 200, 50, 16
_QUESTION_PIECES, _QUESTION_FRAMES = 12, 40
_SETTLED = 10
"""Turns after which memory may not grow."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Holds `--repeats` dialogues after one that does not count; returns medians, with the keys of `aromni bench`.

    Raises:
      ValueError: no `--model`, or one that is no export.
    """
    if not args.model:
        raise ValueError("bench dialogue asks a trained model: name an export with --model")
    if args.num_cores:
        os.sched_setaffinity(0, available_cores(args.num_cores))
    from launch.host_memory import keep_freed_memory_on_cpu
    from launch.loading import load_model

    keep_freed_memory_on_cpu()
    loaded = load_model(args.model)
    hold_dialogue(loaded)  # the process's own first work
    records = [hold_dialogue(loaded) for _ in range(args.repeats)]
    result: dict[str, Any] = dict.fromkeys(("limit", "peer", "ratio_to_limit", "ratio_to_peer", "peer_name"))
    result |= {name: statistics.median(record[name] for record in records) for name in records[0]}
    config, cores = loaded.model.config, len(os.sched_getaffinity(0))
    result |= {
        "ours": result["turn_seconds_last"],
        "unit": "seconds a turn",
        "shape": f"{config.num_layers} layers of {config.d_model}, {config.vocab_size} rows, {config.dtype}",
        "device": f"{_device()}, {cores} of {os.cpu_count()} cores; {versions('jax')}",
        "repeats": args.repeats,
    }
    print(f"{result['device']}\n{result['shape']}\n{describe(result)}")
    return {"dialogue": result}


def _device() -> str:
    import jax

    return jax.devices()[0].device_kind


def describe(result: dict[str, Any]) -> str:
    """The record of a dialogue in a line."""
    return (
        f"dialogue: {1e3 * result['turn_seconds_last']:.1f} ms a turn at the end of {result['turns']}, "
        f"{1e3 * result['turn_seconds_first']:.1f} at its beginning: ratio {result['ratio_last_to_first']:.2f}; at "
        f"most {result['occupancy_tokens_most']} of {result['budget_tokens']} tokens, {result['evicted_turns']} turns "
        f"evicted; {result['device_bytes'] / 1e6:,.1f} MB on the device, {result['device_bytes_growth']} bytes more "
        "at most"
    )


def hold_dialogue(loaded: LoadedModel) -> dict[str, Any]:
    """Seconds a turn takes among the first and among the last turns, and what the cache and the device hold.

    Questions are text, pictures and sound in turn, then all three, made up; answers are short texts.
    """
    import jax

    from aromni_jax.inference.conversation import Conversation
    from aromni_jax.inference.grammar import compile_grammar
    from aromni_jax.inference.policy import Policy
    from aromni_jax.structs import Task
    from launch.generate_dialogue import DEFAULT_BUDGET

    model = loaded.model
    policy = Policy(start=("text",), after={"text": ("end",)}, text_budget=ANSWER_TOKENS - 1)
    budget = model.max_positions or DEFAULT_BUDGET
    conversation = Conversation(
        model,
        compile_grammar(model.vocab, {Task.CHAT: policy}),
        loaded.bundle.text,
        loaded.templates,
        budget_tokens=budget,
        max_new_tokens=ANSWER_TOKENS,
    )
    turn_seconds, first_token_seconds, records, device_bytes = [], [], [], []
    for parts in itertools.islice(_questions(loaded), NUM_TURNS):
        start = time.perf_counter()
        runs = conversation.ask(parts)
        next(runs)
        first_token_seconds.append(time.perf_counter() - start)
        for _ in runs:
            pass
        turn_seconds.append(time.perf_counter() - start)
        records.append(conversation.last_turn)
        device_bytes.append(sum(array.nbytes for array in jax.live_arrays()))
    first, last = (float(np.median(part)) for part in _ends(turn_seconds))
    first_token, last_token = (float(np.median(part)) for part in _ends(first_token_seconds))
    made = [record.tokens_made for record in records if record is not None]
    return {
        "turns": NUM_TURNS,
        "turn_seconds_first": first,
        "turn_seconds_last": last,
        "ratio_last_to_first": last / first,
        "first_token_seconds_first": first_token,
        "first_token_seconds_last": last_token,
        "tokens_made_first": float(np.mean(made[:COMPARED_TURNS])),
        "tokens_made_last": float(np.mean(made[-COMPARED_TURNS:])),
        "budget_tokens": budget,
        "occupancy_tokens_most": max(record.occupancy_tokens for record in records if record is not None),
        "evicted_turns": sum(record.evicted_turns for record in records if record is not None),
        "device_bytes": device_bytes[_SETTLED],
        "device_bytes_growth": max(device_bytes[_SETTLED:]) - device_bytes[_SETTLED],
    }


def _ends(values: list[float]) -> tuple[list[float], list[float]]:
    return values[:COMPARED_TURNS], values[-COMPARED_TURNS:]


def _questions(loaded: LoadedModel) -> Iterator[list[Part]]:
    from aromni_jax.structs import Image, Speech, Text

    vocab, rng = loaded.model.vocab, np.random.default_rng(0)
    for number in itertools.count():
        parts: list[Part] = []
        if number % 4 in (0, 3):
            rows = rng.integers(vocab.text.start, vocab.text.stop, _QUESTION_PIECES)
            parts.append(Text(loaded.bundle.text.decode(vocab.rows_to_text(rows))))
        if number % 4 in (1, 3) and vocab.image:
            parts.append(Image(codes_P=rng.integers(0, vocab.image.size, vocab.tokens_per_image).astype(np.int32)))
        if number % 4 in (2, 3) and vocab.speech:
            codes_KU = [rng.integers(0, span.size, _QUESTION_FRAMES) for span in vocab.speech]
            parts.append(Speech(codes_KU=np.array(codes_KU, np.int32)))
        yield parts or [Text("?")]
