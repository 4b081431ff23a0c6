"""Rows that take turns on the device say what each says alone, whatever stood in their place before."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from aromni_jax.inference import decode
from aromni_jax.inference.decode import generate
from aromni_jax.inference.grammar import GrammarState, compile_grammar
from aromni_jax.inference.machine import begin, decode_jitted, extend_jitted
from aromni_jax.inference.policy import DecodingConfig, Mode, policy_for
from aromni_jax.inference.sampling import row_keys
from aromni_jax.inference.slots import refill_jitted
from aromni_jax.structs import Example, Task
from tests.inference.test_decode import VOCAB, model, prompts_of, stacked  # noqa: F401  (fixtures)

SAMPLED = Mode(1.0, top_p=0.9, repetition_penalty=1.3)
"""A penalty shows what a row has seen: a slot that remembered its last answer would say something else."""


@pytest.fixture(scope="module")
def grammar():
    decoding = DecodingConfig(text=SAMPLED, image=Mode(1.0, top_p=0.96, guidance=3.07))
    return compile_grammar(VOCAB, {task: policy_for(task, decoding) for task in Task})


LIMITS = {task: 12 for task in Task} | {Task.TEXT: 40, Task.CHAT: 33, Task.TEXT_TO_SPEECH: 4}


def rows(num: int) -> list[Example]:
    """Prompts of all tasks, of one token and of many."""
    tasks = [list(Task)[i % len(Task)] for i in range(num)]
    prompts = prompts_of(tasks, seed=num, longest=60)
    return [dataclasses.replace(p, tokens_L=p.tokens_L[:1]) if i % 5 == 0 else p for i, p in enumerate(prompts)]


@pytest.fixture(scope="module")
def alone(model, grammar):  # noqa: F811
    """What each of 21 rows says in a call of its own."""
    return [
        generate(model, grammar, [prompt], max_new_tokens=LIMITS, seed=5, row_ids=[i])[0]
        for i, prompt in enumerate(rows(21))
    ]


@pytest.mark.parametrize("num_slots", [1, 3, 8, 16])
def test_more_rows_than_slots_say_what_each_says_alone(model, grammar, alone, num_slots):  # noqa: F811
    prompts = rows(21)
    order = np.random.default_rng(num_slots).permutation(len(prompts)).tolist()
    progress: list[tuple[int, int]] = []
    answers = generate(
        model,
        grammar,
        [prompts[i] for i in order],
        max_new_tokens=LIMITS,
        seed=5,
        row_ids=order,
        batch_size=num_slots,
        progress=lambda done, total: progress.append((done, total)),
    )
    for i, answer in zip(order, answers, strict=True):
        np.testing.assert_array_equal(answer, alone[i], err_msg=f"row {i}")
    assert progress == sorted(set(progress)) and progress[-1] == (21, 21)
    assert len({len(answer) for answer in alone}) > 5  # lengths that differ, or nobody took turns


def test_rows_fill_the_cache_to_its_last_place(model, grammar):  # noqa: F811
    """Prompt and longest answer have the length of the cache, and the row before in the same slot was as long."""
    said = dataclasses.replace(policy_for(Task.TEXT), text=Mode(), after={"text": ("text", "end")})
    endless = compile_grammar(VOCAB, {Task.TEXT: said})
    rng = np.random.default_rng(0)
    prompts = [Example(rng.integers(0, VOCAB.size, 24).astype(np.int32), (), Task.TEXT, str(i)) for i in range(5)]
    together = generate(model, endless, prompts, max_new_tokens=40, batch_size=2)
    assert max(map(len, together)) == 40
    for prompt, answer in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(generate(model, endless, [prompt], max_new_tokens=40)[0], answer)
    exact = dataclasses.replace(model, max_positions=64)
    for answer, same in zip(generate(exact, endless, prompts, max_new_tokens=99, batch_size=2), together, strict=True):
        np.testing.assert_array_equal(answer, same)


def test_taking_turns_compiles_nothing_and_looks_at_the_device_seldom(model, grammar, monkeypatch):  # noqa: F811
    prompts = rows(48)
    calls = {"decode": 0, "refill": 0}

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    jax.clear_caches()
    monkeypatch.setattr(decode, "decode_jitted", counted("decode", decode_jitted))
    monkeypatch.setattr(decode, "refill_jitted", counted("refill", refill_jitted))
    answers = generate(model, grammar, prompts, max_new_tokens=LIMITS, batch_size=16)
    assert decode_jitted._cache_size() == 1
    assert extend_jitted._cache_size() == 1  # for all rows
    assert refill_jitted._cache_size() == 1  # for the two that may stand idle
    assert calls["refill"] >= (len(prompts) - 16) / 2
    assert calls["decode"] <= len(prompts) / 2 + 1
    assert sum(map(len, answers)) > 4 * calls["decode"]


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_refilled_row_is_a_fresh_one_and_the_others_stay(model, grammar, copies):  # noqa: F811
    """Every field of the state, by hand: three rows in the middle of their answers, new questions for two of them."""
    machine = model.machine
    rng = np.random.default_rng(3)

    def start(tasks, seed, tokens, lengths, cache_length):
        state = begin(
            machine,
            grammar.start(tasks),
            np.full(len(tasks), 30, np.int32),
            row_keys(seed, list(range(len(tasks)))),
            cache_length=cache_length,
            max_new_tokens=30,
            num_contexts=copies,
        )
        return extend_jitted(machine, model.params, state, tokens, lengths)

    old = rng.integers(VOCAB.text.start, VOCAB.text.stop, (3 * copies, 20)).astype(np.int32)
    new = rng.integers(VOCAB.text.start, VOCAB.text.stop, (2 * copies, 9)).astype(np.int32)
    old_lengths = np.array([20, 11, 17] * copies, np.int32)
    new_lengths = np.array([4, 9] * copies, np.int32)
    held = start([Task.TEXT, Task.CHAT, Task.TEXT_TO_IMAGE], 1, old, old_lengths, 64)
    held = decode_jitted(machine, model.params, grammar.tables, held, 5)
    tasks = [Task.TEXT_TO_IMAGE, Task.TEXT]
    fresh = start(tasks, 2, new, new_lengths, 64)
    begun = grammar.start([*tasks, Task.TEXT])  # and one that goes nowhere
    before = jax.tree.map(np.asarray, dataclasses.replace(held, keys_B=jax.random.key_data(held.keys_B)))
    nowhere = np.concatenate([new, new[:copies]]).reshape(-1, 9)
    order = np.concatenate([[*range(2 * c, 2 * c + 2), 2 * copies + c] for c in range(copies)])
    state = refill_jitted(
        machine,
        model.params,
        held,
        GrammarState(begun.state_B, begun.count_B),
        np.full(3, 30, np.int32),
        row_keys(2, [0, 1, 7]),
        nowhere[order],
        np.concatenate([new_lengths, np.ones(copies, np.int32)])[order],
        np.array([2, 0, 3], np.int32),
    )
    state, fresh = (dataclasses.replace(s, keys_B=jax.random.key_data(s.keys_B)) for s in (state, fresh))
    places = {(c, 2): 2 * c for c in range(copies)} | {(c, 0): 2 * c + 1 for c in range(copies)}
    for name in ("step_B", "limit_B", "keys_B", "seen_BV", "tokens_BT"):
        found, kept, wanted = (np.asarray(getattr(s, name)) for s in (state, before, fresh))
        np.testing.assert_array_equal(found, np.stack([wanted[1], kept[1], wanted[0]]), err_msg=name)
    np.testing.assert_array_equal(
        state.grammar.state_B, [begun.state_B[1], before.grammar.state_B[1], begun.state_B[0]]
    )
    np.testing.assert_array_equal(state.grammar.count_B[::2], 0)
    for c in range(copies):
        for slot in range(3):
            source, row = (fresh, places[c, slot]) if (c, slot) in places else (before, 3 * c + slot)
            place = int(source.place_R[row])
            assert state.place_R[3 * c + slot] == place
            np.testing.assert_allclose(state.hidden_RD[3 * c + slot], source.hidden_RD[row], atol=1e-5)
            for ours, theirs in zip(state.caches, source.caches, strict=True):
                np.testing.assert_allclose(ours.keys[:, 3 * c + slot, :place], theirs.keys[:, row, :place], atol=1e-5)
                assert int(ours.lengths_B[3 * c + slot]) == int(theirs.lengths_B[row])
