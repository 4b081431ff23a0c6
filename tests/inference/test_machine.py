"""The machine may stop and go on anywhere: in the middle of a prompt, of an answer, of a dialogue."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from aromni_jax.inference import machine as machines
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.machine import begin, decode_jitted, extend_jitted
from aromni_jax.inference.policy import policy_for
from aromni_jax.inference.sampling import row_keys
from aromni_jax.structs import Task
from tests.inference.test_decode import VOCAB, model, stacked, whole_logits  # noqa: F401  (fixtures)

TASKS = [Task.CAPTION, Task.TEXT_TO_IMAGE, Task.TEXT_TO_SPEECH]


@pytest.fixture(scope="module")
def grammar():
    return compile_grammar(VOCAB, {task: policy_for(task) for task in Task})


def fresh(model, grammar, *, num_contexts=1, limit=24, cache_length=128):  # noqa: F811
    return begin(
        model.machine,
        grammar.start(TASKS),
        np.full(len(TASKS), limit, np.int32),
        row_keys(5, list(range(len(TASKS)))),
        cache_length=cache_length,
        max_new_tokens=limit,
        num_contexts=num_contexts,
    )


def questions(num_rows: int, longest: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(longest // 2, longest + 1, num_rows).astype(np.int32)
    lengths[0] = longest
    return rng.integers(VOCAB.text.start, VOCAB.text.stop, (num_rows, longest)).astype(np.int32), lengths


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_in_chunks_is_the_prompt(model, grammar, monkeypatch, chunk):  # noqa: F811
    tokens, lengths = questions(3, 40)
    whole = extend_jitted(model.machine, model.params, fresh(model, grammar), tokens, lengths)
    monkeypatch.setattr(machines, "PREFILL_TOKENS", chunk)
    jax.clear_caches()
    pieces = extend_jitted(model.machine, model.params, fresh(model, grammar), tokens, lengths)
    np.testing.assert_allclose(pieces.hidden_RD, whole.hidden_RD, atol=1e-5)
    np.testing.assert_array_equal(pieces.place_R, whole.place_R)


def test_cached_logits_equal_a_full_forward_pass_at_every_position(stacked, model, grammar):  # noqa: F811
    tokens, lengths = questions(3, 12)
    state = fresh(model, grammar)
    found = []
    for place in range(12):
        is_in = (place < lengths).astype(np.int32)
        state = extend_jitted(model.machine, model.params, state, tokens[:, place : place + 1], is_in)
        found.append(np.asarray(state.hidden_RD @ model.params["unembedding"].T))
    whole = np.asarray(whole_logits(stacked, tokens))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(np.stack(found, axis=1)[row, :length], whole[row, :length], atol=1e-4)


@pytest.mark.parametrize("num_contexts", [1, 2, 3])
def test_an_answer_in_pieces_is_the_answer(model, grammar, num_contexts):  # noqa: F811
    tokens, lengths = questions(3 * num_contexts, 9)

    def start():
        state = fresh(model, grammar, num_contexts=num_contexts)
        return extend_jitted(model.machine, model.params, state, tokens, lengths)

    whole = decode_jitted(model.machine, model.params, grammar.tables, start(), 24)
    state, steps = start(), [np.zeros(3, np.int32)]
    for count in (1, 2, 5, 16):
        state = decode_jitted(model.machine, model.params, grammar.tables, state, count)
        steps.append(np.asarray(state.step_B))
        assert np.all(steps[-1] - steps[-2] <= count)
    np.testing.assert_array_equal(state.tokens_BT, whole.tokens_BT)
    np.testing.assert_array_equal(state.step_B, whole.step_B)
    assert np.all(np.asarray(grammar.tables.done_S)[np.asarray(state.grammar.state_B)])


def test_a_second_question_is_read_behind_the_first_answer(model, grammar):  # noqa: F811
    """Cache, places and hidden states are those of a machine that reads question, answer and question at once."""
    first, first_lengths = questions(3, 9, seed=1)
    second, second_lengths = questions(3, 6, seed=2)
    state = extend_jitted(model.machine, model.params, fresh(model, grammar), first, first_lengths)
    state = decode_jitted(model.machine, model.params, grammar.tables, state, 24)
    answers, answer_lengths = np.asarray(state.tokens_BT), np.asarray(state.step_B)
    state = extend_jitted(model.machine, model.params, state, second, second_lengths)
    for row in range(3):
        said = [
            first[row, : first_lengths[row]],
            answers[row, : answer_lengths[row]],
            second[row, : second_lengths[row]],
        ]
        at_once = np.concatenate(said)[None]
        alone = dataclasses.replace(
            fresh(model, grammar),
            **{name: getattr(fresh(model, grammar), name)[:1] for name in ("hidden_RD", "place_R")},
            caches=jax.tree.map(lambda x: x[:, :1] if x.ndim > 1 else x[:1], fresh(model, grammar).caches),
        )
        wanted = extend_jitted(model.machine, model.params, alone, at_once, np.array([at_once.shape[1]], np.int32))
        assert int(state.place_R[row]) == int(wanted.place_R[0]) == at_once.shape[1]
        np.testing.assert_allclose(state.hidden_RD[row], wanted.hidden_RD[0], atol=1e-4)
