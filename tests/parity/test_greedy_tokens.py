"""Greedy tokens of an export by transformers are ours, over hundreds of tokens and every way we have to make them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from aromni_jax.inference import machine as machines
from aromni_jax.inference.decode import OmniModel, generate
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.policy import GREEDY, DecodingConfig, policy_for
from aromni_jax.inference.streaming import stream_tokens
from aromni_jax.interop.chameleon import Provenance, TreeSource, export_chameleon
from aromni_jax.peers.decoding import ChameleonGenerator
from aromni_jax.structs import Example, Task
from tests.fixtures.small_models import random_params, small_model, small_vocab

NUM_TOKENS = 260
PROMPT_LENGTHS = (3, 17, 40, 41)


@pytest.fixture(scope="module", params=["swin", "pre"])
def sides(request, tmp_path_factory):
    """(our model, transformers' model) of the same random weights."""
    model = small_model(norm_position=request.param, perceptual_dim=0)
    params, vocab = random_params(model), small_vocab()
    # A head of large weights keeps the most likely token far from the second: no ties.
    params["unembedding"] *= 20
    directory = tmp_path_factory.mktemp("export")
    export_chameleon(
        TreeSource(params), model, vocab, directory, provenance=Provenance(step=1, max_positions=512), dtype="float32"
    )
    return OmniModel.of(model, params, vocab), ChameleonGenerator(directory, "cpu", "float32")


def prompts() -> list[Example]:
    vocab, rng = small_vocab(), np.random.default_rng(0)
    rows = [rng.integers(0, vocab.size, length).astype(np.int32) for length in PROMPT_LENGTHS]
    return [Example(row, (), Task.TEXT, str(i)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("way", ["batch of mixed lengths", "prompt in chunks", "stream"])
def test_greedy_tokens_are_those_of_transformers(sides, way, monkeypatch):
    ours, theirs = sides
    vocab = ours.vocab
    policy = dataclasses.replace(policy_for(Task.TEXT, DecodingConfig(text=GREEDY)), text_budget=NUM_TOKENS)
    grammar = compile_grammar(vocab, {Task.TEXT: policy})
    text = np.arange(vocab.text.start, vocab.text.stop)
    if way == "prompt in chunks":
        monkeypatch.setattr(machines, "PREFILL_TOKENS", 16)
        jax.clear_caches()
    # One more token than compared: the last one closes the answer.
    if way == "stream":
        answers = [
            np.array(
                [e.token_id for run in stream_tokens(ours, grammar, p, max_new_tokens=NUM_TOKENS + 1) for e in run]
            )
            for p in prompts()
        ]
    else:
        answers = generate(ours, grammar, prompts(), max_new_tokens=NUM_TOKENS + 1)
    if way == "prompt in chunks":
        jax.clear_caches()
    for prompt, answer in zip(prompts(), answers, strict=True):
        forbidden = np.setdiff1d(np.arange(vocab.size), [*text, vocab.eos, vocab.special_ids["end_model"]])
        length = len(answer) - 1
        wanted = theirs.answer(prompt.tokens_L, length, forbidden.tolist())
        np.testing.assert_array_equal(answer[:length], wanted)
    assert max(map(len, answers)) > 256
