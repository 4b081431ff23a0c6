"""A dialogue over one cache: what it holds is what a fresh reading would hold, within a budget, for 200 turns."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from aromni_jax.inference import conversation as conversations
from aromni_jax.inference.conversation import Conversation, forget
from aromni_jax.inference.decode import OmniModel, contexts_of
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.machine import begin, decode_jitted, extend_jitted
from aromni_jax.inference.policy import DecodingConfig, Mode, policy_for
from aromni_jax.inference.sampling import row_keys
from aromni_jax.inference.streaming import made_since, stream_tokens
from aromni_jax.models.config import ModelConfig
from aromni_jax.structs import Image, Message, Speech, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.prompts import load_templates
from aromni_jax.tokenizers.text import ByteText
from aromni_jax.vocab import JointVocab
from tests.fixtures.small_models import random_params
from tests.inference.answers import check

VOCAB = JointVocab.build(text_size=256, image_codes=24, tokens_per_image=4, speech_codes=(20, 20))


class Latin(ByteText):
    """A character for every id, so that whatever a model makes up is written back with the same ids."""

    def encode(self, text):
        return list(text.encode("latin-1"))

    def decode(self, ids):
        return bytes(ids).decode("latin-1")


TEXT, TEMPLATES = Latin(), load_templates("official-v0.1")
DECODING = DecodingConfig(
    text=Mode(1.0, top_p=0.9), speech=Mode(1.0), transcript=Mode(1.0), text_budget=5, speech_budget_frames=3
)
POLICY = policy_for(Task.CHAT, DECODING)
MAX_NEW = 40


def config_of(num_layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB.size, num_layers=num_layers, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48
    )


@pytest.fixture(scope="module")
def model() -> OmniModel:
    return OmniModel.of(config_of(2), random_params(config_of(2)), VOCAB)


@pytest.fixture(scope="module")
def grammar():
    return compile_grammar(VOCAB, {Task.CHAT: POLICY})


def started(model, grammar, *, budget=160, max_new=MAX_NEW, seed=0, templates=TEMPLATES) -> Conversation:
    return Conversation(model, grammar, TEXT, templates, budget_tokens=budget, max_new_tokens=max_new, seed=seed)


def questions(seed: int = 0):
    """Parts of questions without end: text, pictures and speech, alone and together, in any order."""
    rng = np.random.default_rng(seed)
    while True:
        parts = [
            Text("".join(rng.choice(list("abc "), rng.integers(1, 30)))),
            Image(codes_P=rng.integers(0, 24, 4).astype(np.int32)),
            Speech(codes_KU=rng.integers(0, 20, (2, rng.integers(1, 9))).astype(np.int32)),
        ]
        yield [parts[i] for i in rng.permutation(3)[: rng.integers(1, 4)]]


def say(conversation: Conversation, parts, **runs) -> list[int]:
    return [event.token_id for run in conversation.ask(parts, **runs) for event in run]


def encoded(conversation: Conversation) -> np.ndarray:
    """The history as training has it."""
    return joint.encode(conversation.messages, Task.CHAT, VOCAB, TEXT, TEMPLATES).tokens_L


def reread(model: OmniModel, grammar, tokens_L: np.ndarray, budget: int):
    """The state of a machine that reads `tokens_L` at once."""
    state = begin(
        model.machine,
        grammar.start([Task.CHAT]),
        np.array([MAX_NEW], np.int32),
        row_keys(0, [0]),
        cache_length=budget,
        max_new_tokens=MAX_NEW,
    )
    return extend_jitted(model.machine, model.params, state, tokens_L[None], np.array([len(tokens_L)], np.int32))


def cached(state, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values [length, K, H] of the asked row, layer by layer."""
    return [(np.asarray(c.keys[0, 0, :length]), np.asarray(c.values[0, 0, :length])) for c in state.caches]


@pytest.mark.parametrize("name", ["official-v0.1", "paper", "quickstart"])
def test_without_eviction_the_cache_is_that_of_a_fresh_reading_of_the_whole_history(model, grammar, name):
    """Keys, values and the last hidden state, after turns of all kinds, one of them cut short."""
    templates = load_templates(name)
    conversation = started(model, grammar, budget=512, templates=templates)
    for number, parts in enumerate(itertools.islice(questions(), 6)):
        runs = conversation.ask(parts, first_run=3)
        for _ in itertools.islice(runs, 1 if number == 2 else None):
            pass
        del runs
        assert conversation.last_turn.evicted_turns == 0
    history_L = joint.encode(conversation.messages, Task.CHAT, VOCAB, TEXT, templates).tokens_L
    assert len(history_L) == conversation.occupancy_tokens
    wanted = reread(model, grammar, history_L, 512)
    state = conversation._state
    for found, new in zip(cached(state, len(history_L)), cached(wanted, len(history_L)), strict=True):
        np.testing.assert_allclose(found[0], new[0], atol=1e-4)
        np.testing.assert_allclose(found[1], new[1], atol=1e-4)
    np.testing.assert_allclose(state.hidden_RD[0], wanted.hidden_RD[0], atol=1e-4)


def test_the_first_answer_is_the_answer_of_a_stream(model, grammar):
    parts = [Text("what is this?"), Image(codes_P=np.array([1, 2, 3, 4], np.int32))]
    prompt = joint.prompt([Message("user", tuple(parts))], Task.CHAT, VOCAB, TEXT, TEMPLATES)
    for seed in range(3):
        runs = stream_tokens(model, grammar, prompt, max_new_tokens=MAX_NEW, seed=seed)
        assert say(started(model, grammar, seed=seed), parts) == [event.token_id for run in runs for event in run]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_what_is_kept_moves_up(grammar, num_layers):
    """Keys are the old ones, turned; of one layer, which knows nothing of its past, also those of a fresh reading."""
    config = config_of(num_layers)
    model = OmniModel.of(config, random_params(config), VOCAB)
    rng = np.random.default_rng(3)
    tokens_L = rng.integers(VOCAB.text.start, VOCAB.text.stop, 60).astype(np.int32)
    start, count = 1, 23
    kept_L = np.delete(tokens_L, np.arange(start, start + count))
    before = cached(reread(model, grammar, tokens_L, 64), 60)
    state = forget(model.machine, reread(model, grammar, tokens_L, 64), np.int32(start), np.int32(count))
    assert int(state.place_R[0]) == len(kept_L) and int(state.caches[0].lengths_B[0]) == len(kept_L)
    after = cached(state, len(kept_L))
    angles = count * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    for (old_keys, old_values), (keys, values) in zip(before, after, strict=True):
        np.testing.assert_array_equal(keys[:start], old_keys[:start])
        np.testing.assert_array_equal(values, np.delete(old_values, np.arange(start, start + count), axis=0))
        # As complex numbers a rotation is a product.
        old = (old_keys[..., :4] + 1j * old_keys[..., 4:])[start + count :] * np.exp(-1j * angles)
        np.testing.assert_allclose(keys[start:], np.concatenate([old.real, old.imag], axis=-1), atol=1e-5)
    if num_layers > 1:
        return
    fresh = reread(model, grammar, kept_L, 64)
    for found, new in zip(after, cached(fresh, len(kept_L)), strict=True):
        np.testing.assert_allclose(found[0], new[0], atol=1e-4)
    more_L = rng.integers(VOCAB.text.start, VOCAB.text.stop, (1, 9)).astype(np.int32)
    for place in range(9):
        token, one = more_L[:, place : place + 1], np.ones(1, np.int32)
        state = extend_jitted(model.machine, model.params, state, token, one)
        fresh = extend_jitted(model.machine, model.params, fresh, token, one)
        found, new = (s.hidden_RD @ model.params["unembedding"].T for s in (state, fresh))
        np.testing.assert_allclose(found, new, atol=1e-4)


def test_a_dialogue_of_one_layer_is_after_evictions_that_of_the_kept_turns(grammar):
    model = OmniModel.of(config_of(1), random_params(config_of(1)), VOCAB)
    conversation = started(model, grammar, budget=160)
    evictions = 0
    for parts in itertools.islice(questions(5), 30):
        say(conversation, parts)
        evictions += conversation.last_turn.evicted_turns > 0
        history_L = encoded(conversation)
        assert len(history_L) == conversation.occupancy_tokens
    assert evictions >= 5
    fresh = reread(model, grammar, history_L, 160)
    for found, new in zip(cached(conversation._state, len(history_L)), cached(fresh, len(history_L)), strict=True):
        np.testing.assert_allclose(found[0], new[0], atol=2e-4)
        np.testing.assert_allclose(found[1], new[1], atol=2e-4)


@pytest.fixture
def compiled():
    """Grows by one with every program that is compiled."""
    events: list[str] = []

    def listen(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 41)(1)
    assert events, "jax tells it by another name"
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_two_hundred_turns_hold_budget_memory_and_programs(model, grammar, compiled):
    conversation = started(model, grammar, budget=160)
    programs = (extend_jitted, decode_jitted, forget)
    asked, kinds, evicted = questions(7), set(), 0
    sizes: list[int] = []
    for number in range(200):
        occupancy = conversation.occupancy_tokens
        ids = say(conversation, next(asked))
        check(ids, Task.CHAT, VOCAB, POLICY)
        record = conversation.last_turn
        kinds |= {type(part) for part in conversation.messages[-1].parts}
        evicted += record.evicted_turns
        assert record.number == number and not record.was_cut and record.tokens_made == len(ids)
        read = record.tokens_read + len(ids)
        assert record.occupancy_tokens == occupancy + read - record.evicted_tokens <= 160
        if number == 4:
            jax.block_until_ready(conversation._state)
            compiled.clear()
            counts = [program._cache_size() for program in programs]
        sizes.append(sum(array.nbytes for array in jax.live_arrays()))
    assert kinds == {Text, Image, Speech}
    assert evicted == 200 - len(conversation.messages) // 2 > 150
    # Two sizes, 172 bytes apart: what the host fetched last is alive twice, unless the turn's end was read after it.
    assert set(sizes[100:]) <= set(sizes[5:100]) and max(sizes) - min(sizes[5:]) < 1000
    assert [program._cache_size() for program in programs] == counts and not compiled
    np.testing.assert_array_equal(encoded(conversation)[0], VOCAB.bos)


def test_answers_depend_on_seed_and_turn_and_not_on_runs(model, grammar):
    """With evictions in the middle of answers."""

    def answers(seed, **runs):
        conversation = started(model, grammar, budget=100, seed=seed)
        made = [say(conversation, parts, **runs) for parts in itertools.islice(questions(2), 12)]
        return made, conversation

    made, conversation = answers(1)
    again, other = answers(1, first_run=1, longest_run=7)
    assert made == again and made != answers(2)[0]
    assert conversation.last_turn == other.last_turn
    same = [Text("again")]
    conversation = started(model, grammar, budget=512)
    assert len({tuple(say(conversation, same)) for _ in range(4)}) > 1


def test_guidance_serves_every_turn(model):
    """The twins of each turn read their part of its question, and its answer: nothing of an earlier turn stays."""
    config = dataclasses.replace(DECODING, image=Mode(1.0, guidance=3.0, image_guidance=1.5), text_budget=1)
    grammar = compile_grammar(VOCAB, {Task.CHAT: policy_for(Task.CHAT, config)})
    conversation = started(model, grammar, budget=160)
    lengths = set()
    for parts in itertools.islice(questions(4), 8):
        ids = say(conversation, parts)
        prompt = joint.prompt([Message("user", tuple(parts))], Task.CHAT, VOCAB, TEXT, TEMPLATES)
        contexts = contexts_of(prompt, VOCAB, 3)
        lengths.add(len(contexts[2]))
        for row in (1, 2):
            own_L = np.array([*contexts[row], *ids], np.int32)
            twin = reread(model, grammar, own_L, 160)
            found = conversation._state.caches[1].keys[0, row, : len(own_L) - 1]
            np.testing.assert_allclose(found, twin.caches[1].keys[0, 0, : len(own_L) - 1], atol=1e-4)
    assert len(lengths) == 2  # with a picture, and without


def test_an_answer_cut_anywhere_is_closed_in_form(model, grammar):
    """Cut after each number of tokens: what is kept is what was made, but for unfinished frames and pictures."""
    asked, kept_less = list(itertools.islice(questions(9), 40)), 0
    closers = {VOCAB.begin_response, VOCAB.end_speech, VOCAB.end_image, VOCAB.end_model}
    for number, parts in enumerate(asked):
        conversation = started(model, grammar, seed=number)
        runs = conversation.ask(parts, first_run=1 + number % 17)
        made = [event.token_id for event in next(runs)]
        runs.close()
        history_L = encoded(conversation)
        question = joint.prompt(conversation.messages[:1], Task.CHAT, VOCAB, TEXT, TEMPLATES).tokens_L
        kept = history_L[len(question) :].tolist()
        assert len(history_L) == conversation.occupancy_tokens and kept[-1] == VOCAB.end_model
        while kept and (not made[len(kept) - 1 :] or kept[-1] != made[len(kept) - 1]):
            assert kept.pop() in closers
        assert kept == made[: len(kept)]
        lost = made[len(kept) :]
        # At most a begun segment without a whole frame or picture, or the token that ended the answer otherwise.
        assert lost in ([], [VOCAB.eos]) or lost[0] in (VOCAB.begin_image, VOCAB.begin_speech) or len(lost) == 1
        kept_less += bool(lost)
        record = conversation.last_turn
        assert record.was_cut == (made[-1] not in (VOCAB.eos, VOCAB.end_model)) and record.tokens_made == len(made)
        check(say(conversation, parts), Task.CHAT, VOCAB, POLICY)
        assert len(conversation.messages) == 4
    assert kept_less > 3


def test_what_fails_or_is_left_does_no_harm(model, grammar):
    conversation = started(model, grammar)
    with pytest.raises(RuntimeError, match="deaf"):
        for _ in conversation.ask([Text("one")], first_run=1):
            raise RuntimeError("deaf")
    left = conversation.ask([Text("two")], first_run=1)
    conversation.ask([Text("three")])  # never read: an empty answer
    assert list(left) == []
    before = conversation.messages, conversation.occupancy_tokens
    for parts, message in (
        ([], "at least one part"),
        ([Text("x" * 150)], r"has 160 tokens, but a budget of 160 leaves 119.*raise the budget"),
        ([Text("heard", is_transcript=True)], "no place"),
    ):
        with pytest.raises(ValueError, match=message):
            conversation.ask(parts)
    assert conversation.messages == before[0] and conversation.occupancy_tokens == before[1]
    ids = say(conversation, [Text("four")])
    check(ids, Task.CHAT, VOCAB, POLICY)
    texts = [message.parts[0].text for message in conversation.messages[::2]]
    assert texts == ["one", "two", "three", "four"]
    assert conversation.messages[3].parts == conversation.messages[5].parts == ()
    assert len(encoded(conversation)) == conversation.occupancy_tokens and conversation.last_turn.number == 3


def test_an_interrupted_wait_loses_nothing(model, grammar, monkeypatch):
    """Ctrl-C comes while the device works: what it made is in the cache, and so in the history."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made_since(*args)

    monkeypatch.setattr(conversations, "made_since", interrupted)
    for number, parts in enumerate(itertools.islice(questions(6), 8)):
        calls.clear()
        conversation = started(model, grammar, seed=number)
        told = []
        try:
            for run in conversation.ask(parts, first_run=3):
                told += run
        except KeyboardInterrupt:
            assert conversation.last_turn.tokens_made > len(told)
        assert len(encoded(conversation)) == conversation.occupancy_tokens
        check(say(conversation, parts), Task.CHAT, VOCAB, POLICY)


def test_impossible_sizes_are_named(model, grammar):
    short = dataclasses.replace(model, max_positions=100)
    with pytest.raises(ValueError, match="more than the 100 positions"):
        started(short, grammar, budget=101)
    with pytest.raises(ValueError, match="max_new_tokens=1 does not fit: the shortest answer has 2"):
        started(model, grammar, max_new=1)
    with pytest.raises(ValueError, match="budget of 160"):
        started(model, grammar, max_new=160)


def test_a_question_wider_than_a_chunk_is_read_whole(model, grammar, monkeypatch):
    monkeypatch.setattr(conversations, "READ_WIDTHS", (8, 32))
    conversation = started(model, grammar)
    runs = conversation.ask([Text("y" * 70)])
    question_L = joint.prompt(conversation.messages[:1], Task.CHAT, VOCAB, TEXT, TEMPLATES).tokens_L
    hidden_D = np.asarray(conversation._state.hidden_RD[0])
    np.testing.assert_allclose(hidden_D, reread(model, grammar, question_L, 160).hidden_RD[0], atol=1e-4)
    runs.close()
