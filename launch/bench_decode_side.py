"""One side of `aromni bench decode`, in a process of its own (`launch.bench_sides`).

`describe` (ours) says what is measured, and where no export is given one of random weights is written for the peer;
`text N` and `speech N` make N answers at a time and say {tokens, seconds, first_token_seconds}, the first tokens apart
from the others; `stream` gives a latency record; `peak` and `bandwidth` are FLOP/s of matrix products and bytes/s of
reading.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from launch.bench_decode import ANSWER_TOKENS, PROMPT_TOKENS
from launch.bench_sides import answer_questions
from launch.host_memory import keep_freed_memory_on_cpu

_WEIGHTS = "weights"
_READ_BYTES = {"cpu": 1 << 30, "gpu": 8 << 30, "tpu": 4 << 30}
_PEAK_WIDTHS = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
_RELEASED_SPEECH_TOKENS_PER_SECOND = 40.0


def main() -> None:
    """Prepares one side, then answers until standard input closes."""
    side, folder, cores, *rest = sys.argv[1:]
    # Before any library starts its threads: they count the cores they see.
    os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    answer_questions(_ours(Path(folder), rest[0] == "beside") if side == "ours" else _peer(Path(folder), *rest))


def _prompt(text_start: int, text_stop: int) -> np.ndarray:
    return np.random.default_rng(0).integers(text_start, text_stop, PROMPT_TOKENS).astype(np.int32)


def _peer(directory: Path, platform: str, dtype: str) -> Callable[[str], Any]:
    from aromni_jax.peers.decoding import ChameleonGenerator

    weights = directory / _WEIGHTS if (directory / _WEIGHTS).is_dir() else directory
    generator = ChameleonGenerator(weights, "cuda" if platform == "gpu" else "cpu", dtype)
    prompt_L = _prompt(4, 1000)

    def answer(question: str) -> Any:
        rows = int(question.split()[1])
        start = time.perf_counter()
        generator.answer(prompt_L, 1, rows=rows)
        first = time.perf_counter() - start
        start = time.perf_counter()
        made_T = generator.answer(prompt_L, ANSWER_TOKENS, rows=rows)
        seconds = time.perf_counter() - start - first
        return {"tokens": rows * (len(made_T) - 1), "seconds": seconds, "first_token_seconds": first}

    return answer


def _ours(directory: Path, is_beside_peer: bool) -> Callable[[str], Any]:
    keep_freed_memory_on_cpu()
    # The peer lives beside us.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    from aromni_jax.inference.grammar import compile_grammar
    from aromni_jax.inference.machine import begin, decode_jitted, extend_jitted
    from aromni_jax.inference.policy import GREEDY, DecodingConfig, policy_for
    from aromni_jax.inference.sampling import row_keys
    from aromni_jax.inference.streaming import LatencyClock, SpeechStream, stream_tokens
    from aromni_jax.models.config import ModelConfig, num_parameters
    from aromni_jax.structs import Example, Task

    model, bundle = _load(directory, is_beside_peer)
    config, vocab, machine = model.config, model.vocab, model.machine
    tasks = {"text": Task.TEXT} | ({"speech": Task.TEXT_TO_SPEECH} if vocab.speech else {})
    grammar = compile_grammar(vocab, {task: policy_for(task, DecodingConfig(text=GREEDY)) for task in tasks.values()})
    prompt_L = _prompt(vocab.text.start, vocab.text.stop)
    # Answers of exactly so many tokens, as the peer's: nothing that closes a segment, and room enough to need none.
    closing = [grammar.class_names.index(name) for name in ("eos", "end_model", "end_speech")]
    endless = dataclasses.replace(grammar.tables, legal_SC=grammar.tables.legal_SC.at[:, jnp.array(closing)].set(False))
    room = 2 * ANSWER_TOKENS
    itemsize = jnp.dtype(config.dtype).itemsize
    platform = jax.default_backend()

    def run(name: str, rows: int) -> dict[str, float]:
        state = begin(
            machine,
            grammar.start([tasks[name]] * rows),
            np.full(rows, room, np.int32),
            row_keys(0, list(range(rows))),
            cache_length=PROMPT_TOKENS + room,
            max_new_tokens=room,
        )
        start = time.perf_counter()
        prompts_RL = np.tile(prompt_L, (rows, 1))
        state = extend_jitted(machine, model.params, state, prompts_RL, np.full(rows, PROMPT_TOKENS, np.int32))
        state = decode_jitted(machine, model.params, endless, state, 1)
        state.step_B.block_until_ready()
        first = time.perf_counter() - start
        start = time.perf_counter()
        state = decode_jitted(machine, model.params, endless, state, ANSWER_TOKENS - 1)
        made = int(state.step_B.sum())
        assert made == rows * ANSWER_TOKENS, f"an answer ended early: {made} tokens of {rows * ANSWER_TOKENS}"
        return {"tokens": made - rows, "seconds": time.perf_counter() - start, "first_token_seconds": first}

    def stream() -> dict[str, Any]:
        prompt = Example(prompt_L, (), Task.TEXT_TO_SPEECH, "bench")
        speech = SpeechStream(vocab, bundle.speech.stream_decoder())
        clock = LatencyClock(vocab, bundle.speech.sample_rate_hz)
        for events in stream_tokens(model, grammar, prompt, max_new_tokens=ANSWER_TOKENS):
            clock.heard(events, len(speech.push(events)))
        return clock.record()

    def narrowed(rows: int) -> ModelConfig:
        return dataclasses.replace(config, vocab_size=rows)

    # Of two tables one is only looked up.
    whole = num_parameters(config) - vocab.size * config.d_model
    read = {"text": whole}
    if vocab.speech:
        rows = sum(span.size for span in vocab.speech) + len(vocab.special_ids)
        read["speech"] = num_parameters(narrowed(rows)) - rows * config.d_model
    tokens_per_second = _RELEASED_SPEECH_TOKENS_PER_SECOND
    if bundle and bundle.speech:
        tokens_per_second = bundle.speech.num_codebooks * bundle.speech.codes_per_second
    product = jax.jit(lambda x: x @ x)
    total = jax.jit(lambda x: x.sum())

    def timed(function: Callable[[], Any]) -> float:
        function().block_until_ready()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function().block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    def answer(question: str) -> Any:
        if question == "describe":
            return {
                "device": jax.devices()[0].device_kind,
                "platform": platform,
                "dtype": config.dtype,
                "parameters": num_parameters(config),
                "shape": f"{config.num_layers} layers of {config.d_model}, {vocab.size} rows of vocabulary, "
                f"{config.dtype}, prompt {PROMPT_TOKENS}, answer {ANSWER_TOKENS}",
                "bytes": {name: count * itemsize for name, count in read.items()},
                "flops": {name: 2 * count for name, count in read.items()},
                "streams": bool(bundle and bundle.speech),
                "speech_tokens_per_second": tokens_per_second,
            }
        if question == "peak":
            width = _PEAK_WIDTHS[platform]
            x = jax.random.normal(jax.random.key(0), (width, width), config.dtype)
            return 2.0 * width**3 / timed(lambda: product(x))
        if question == "bandwidth":
            x = jnp.ones(_READ_BYTES[platform] // 4, jnp.float32)
            return _READ_BYTES[platform] / timed(lambda: total(x))
        if question == "stream":
            return stream()
        name, rows = question.split()
        return run(name, int(rows))

    return answer


def _load(directory: Path, is_beside_peer: bool) -> tuple[Any, Any]:
    """(model, tokenizers) of an export; or, of the shape in `model.txt`, random weights, exported for a peer."""
    if not (directory / "model.txt").is_file():
        from launch.loading import load_model

        loaded = load_model(directory)
        return loaded.model, loaded.bundle
    import jax

    from aromni_jax.inference.decode import OmniModel
    from aromni_jax.interop.chameleon import Provenance, TreeSource, export_chameleon
    from aromni_jax.models.config import resolve_model
    from aromni_jax.models.decoder import Decoder
    from aromni_jax.partitioning import unbox
    from aromni_jax.vocab import JointVocab

    vocab = JointVocab.released()
    fields = ast.literal_eval((directory / "model.txt").read_text(encoding="utf-8"))
    config = resolve_model(fields, vocab.size, 0)
    config = dataclasses.replace(config, remat="none", param_dtype=config.dtype)
    ids = np.zeros((1, 2), np.int32)
    params = unbox(jax.jit(Decoder(config).init)(jax.random.key(0), ids, ids, ids)["params"])
    if is_beside_peer:
        export_chameleon(
            TreeSource(jax.device_get(params)),
            config,
            vocab,
            directory / _WEIGHTS,
            provenance=Provenance(step=0, max_positions=4096),
            dtype=config.dtype,
        )
    return OmniModel.of(config, params, vocab), None


if __name__ == "__main__":
    main()
