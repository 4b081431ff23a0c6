"""Decoding over a cache equals the plain forward pass, and no row notices its neighbours."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.inference.decode import OmniModel, bucket_of, generate
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.policy import DecodingConfig, Mode, policy_for
from aromni_jax.models.config import ModelConfig
from aromni_jax.models.decoder import Decoder
from aromni_jax.structs import Example, Task
from aromni_jax.vocab import JointVocab
from tests.fixtures.small_models import random_params

VOCAB = JointVocab.build(text_size=60, image_codes=24, tokens_per_image=4, speech_codes=(20,))


CONFIG = ModelConfig(
    vocab_size=VOCAB.size, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48
)


@pytest.fixture(scope="module")
def stacked() -> Any:
    """Parameters as training has them, as arrays of numpy."""
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def model(stacked) -> OmniModel:
    return OmniModel.of(CONFIG, stacked, VOCAB)


def whole_logits(stacked: Any, tokens_BL: jax.Array) -> jax.Array:
    """Logits [B, L, V] of the decoder as training runs it, without a cache."""
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    decoder = Decoder(CONFIG)
    hidden: Any = decoder.apply({"params": stacked}, tokens_BL, positions_BL, jnp.ones_like(tokens_BL))
    logits: Any = decoder.apply({"params": stacked}, hidden, method=Decoder.logits)
    return logits


@pytest.fixture(scope="module")
def grammar():
    decoding = DecodingConfig(text=Mode(1.0, top_p=0.9))
    return compile_grammar(VOCAB, {task: policy_for(task, decoding) for task in Task})


def prompts_of(tasks: list[Task], seed: int = 0, longest: int = 25) -> list[Example]:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(VOCAB.text.start, VOCAB.text.stop, rng.integers(1, longest)) for _ in tasks]
    return [
        Example(row.astype(np.int32), (), task, str(i)) for i, (row, task) in enumerate(zip(rows, tasks, strict=True))
    ]


def test_cached_greedy_decoding_equals_full_forward(stacked, model, grammar):
    """Every greedy token is the argmax, among legal ids, of a forward pass without a cache over all tokens so far."""
    tasks = [Task.CAPTION, Task.TEXT_TO_SPEECH, Task.CAPTION, Task.SPEECH_TO_TEXT, Task.TEXT_TO_SPEECH]
    prompts = prompts_of(tasks)
    answers = generate(model, grammar, prompts, max_new_tokens=24)
    tables = jax.tree.map(np.asarray, grammar.tables)

    full_forward = jax.jit(lambda tokens_BL: whole_logits(stacked, tokens_BL))
    for prompt, answer in zip(prompts, answers, strict=True):
        row_L = np.concatenate([prompt.tokens_L, answer])
        logits_LV = np.asarray(full_forward(np.pad(row_L, (0, 64 - len(row_L)))[None]))[0]
        state = grammar.start_states[prompt.task]
        for step, token in enumerate(answer):
            legal_C = np.asarray(tables.legal_SC[state] & (tables.cost_SC[state] <= 24 - step - 1))
            legal_V = legal_C[np.asarray(tables.class_V)]
            best = int(np.where(legal_V, logits_LV[len(prompt.tokens_L) + step - 1], -np.inf).argmax())
            is_sampled = tables.temperature_S[state] > 0  # What follows an answer in speech is text.
            assert token == best or is_sampled, f"row {prompt.key}, step {step}"
            state = int(tables.next_SC[state, tables.class_V[token]])
        assert tables.done_S[state]


def test_rows_do_not_depend_on_their_neighbours(model, grammar):
    """A row's tokens are the same beside any neighbours and in any order: its number and the seed decide them."""
    tasks = [Task.CHAT, Task.TEXT_TO_IMAGE, Task.TEXT, Task.SPEECH_TO_IMAGE, Task.TEXT_TO_SPEECH, Task.CHAT]
    prompts = prompts_of(tasks, seed=3)
    together = generate(model, grammar, prompts, max_new_tokens=32, seed=7, batch_size=4)
    reverse = list(range(len(prompts)))[::-1]
    turned = generate(
        model, grammar, [prompts[i] for i in reverse], max_new_tokens=32, seed=7, row_ids=reverse, batch_size=4
    )
    for i, answer in zip(reverse, turned, strict=True):
        np.testing.assert_array_equal(answer, together[i])
    for i, prompt in enumerate(prompts):
        alone = generate(model, grammar, [prompt], max_new_tokens=32, seed=7, row_ids=[i])
        np.testing.assert_array_equal(alone[0], together[i])


def test_seed_changes_sampled_rows_only(model, grammar):
    prompts = prompts_of([Task.TEXT_TO_IMAGE, Task.CAPTION])
    answers = [generate(model, grammar, prompts, max_new_tokens=32, seed=seed) for seed in range(8)]
    assert len({tuple(picture) for picture, _ in answers}) > 1
    for _, caption in answers:
        np.testing.assert_array_equal(caption, answers[0][1])


def test_answers_close_within_their_own_limits(model, grammar):
    tasks = list(Task)
    limits = {task: grammar.shortest_answers[task] + 3 for task in tasks}
    prompts = prompts_of(tasks)
    for prompt, answer in zip(prompts, generate(model, grammar, prompts, max_new_tokens=limits), strict=True):
        assert len(answer) <= limits[prompt.task]
        assert answer[-1] in (VOCAB.eos, VOCAB.end_model)


def test_bad_requests_are_named(model, grammar):
    with pytest.raises(ValueError, match="too few for text-to-image: the shortest answer has 7"):
        generate(model, grammar, prompts_of([Task.TEXT_TO_IMAGE]), max_new_tokens=6)
    empty = dataclasses.replace(prompts_of([Task.CAPTION])[0], tokens_L=np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="empty"):
        generate(model, grammar, [empty], max_new_tokens=8)
    only_captions = compile_grammar(VOCAB, {Task.CAPTION: policy_for(Task.CAPTION)})
    with pytest.raises(ValueError, match="text-to-image is not in this grammar"):
        generate(model, only_captions, prompts_of([Task.TEXT_TO_IMAGE]), max_new_tokens=16)


def test_buckets():
    assert [bucket_of(n) for n in (1, 32, 33, 4096, 4097)] == [32, 32, 64, 4096, 8192]
