"""What cannot be answered is named before anything runs, and a call that was given up leaves nothing behind."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from aromni_jax.inference.decode import OmniModel, check_request, generate
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.policy import DecodingConfig, Mode, policy_for
from aromni_jax.inference.streaming import SpeechStream, stream_tokens
from aromni_jax.structs import Modality, Task, TokenEvent
from aromni_jax.vocab import JointVocab
from tests.inference.test_decode import CONFIG, VOCAB, model, prompts_of, stacked  # noqa: F401  (fixtures)

ROOM = 30


@pytest.fixture(scope="module")
def grammar():
    return compile_grammar(VOCAB, {task: policy_for(task, DecodingConfig(text=Mode(1.0))) for task in Task})


@pytest.fixture(scope="module")
def small(model) -> OmniModel:  # noqa: F811
    """The model, said to have been made for 30 positions."""
    return dataclasses.replace(model, max_positions=ROOM)


def asked(length: int, task: Task = Task.TEXT_TO_IMAGE):
    ids = np.random.default_rng(length).integers(VOCAB.text.start, VOCAB.text.stop, length)
    return dataclasses.replace(prompts_of([task])[0], tokens_L=ids.astype(np.int32))


def test_a_prompt_that_leaves_no_room_is_named_with_its_length_the_limit_and_the_remedy(small, grammar):
    message = (
        "has 24 tokens, the model 30 positions, of which the shortest answer to text-to-image takes 7; shorten .* "
        "to at most 23 tokens"
    )
    with pytest.raises(ValueError, match=message):
        generate(small, grammar, [asked(3), asked(24)], max_new_tokens=40)
    with pytest.raises(ValueError, match=message):
        next(stream_tokens(small, grammar, asked(24), max_new_tokens=40))


@pytest.mark.parametrize("length", [1, 20, 23])
def test_answers_fill_what_is_left_of_the_positions_and_no_more(model, small, grammar, length):  # noqa: F811
    for task in (Task.TEXT_TO_IMAGE, Task.CHAT) if length < 23 else (Task.TEXT_TO_IMAGE,):
        prompt = asked(length, task)
        limit = check_request(small, grammar, prompt, 40)
        assert limit == min(40, ROOM - length)
        (answer,) = generate(small, grammar, [prompt], max_new_tokens=40)
        assert len(answer) <= ROOM - length and answer[-1] in (VOCAB.eos, VOCAB.end_model)
        # The cut is the one that asking for no more tokens makes.
        np.testing.assert_array_equal(generate(model, grammar, [prompt], max_new_tokens=limit)[0], answer)
        streamed = [e.token_id for run in stream_tokens(small, grammar, prompt, max_new_tokens=40) for e in run]
        assert streamed == answer.tolist()


def test_ids_of_another_vocabulary_are_refused(stacked, model, grammar):  # noqa: F811
    for wrong in (-1, VOCAB.size):
        prompt = dataclasses.replace(asked(3), tokens_L=np.array([0, wrong], np.int32))
        with pytest.raises(ValueError, match=f"has the id {wrong}, outside 0..{VOCAB.size - 1}"):
            generate(model, grammar, [prompt], max_new_tokens=40)
    with pytest.raises(ValueError, match="the vocabulary has .* rows, the model"):
        OmniModel.of(CONFIG, stacked, JointVocab.build(text_size=600))


class GaveUp(Exception):
    """What a consumer of a stream may raise."""


def test_a_stream_given_up_leaves_nothing_behind(model, grammar):  # noqa: F811
    """Closed, dropped by an exception, or left standing while others run: the next calls give the same tokens."""
    prompt, other = asked(9, Task.CHAT), asked(5, Task.TEXT)
    settings = dict(max_new_tokens=40, seed=3, first_run=2, longest_run=4)

    def whole(prompt):
        return [event for run in stream_tokens(model, grammar, prompt, **settings) for event in run]

    wanted, batch = whole(prompt), generate(model, grammar, [prompt, other], max_new_tokens=40, seed=3)
    closed = stream_tokens(model, grammar, prompt, **settings)
    next(closed)
    closed.close()
    assert whole(prompt) == wanted
    with pytest.raises(GaveUp):
        for _ in stream_tokens(model, grammar, prompt, **settings):
            raise GaveUp
    standing = stream_tokens(model, grammar, prompt, **settings)
    begun = list(next(standing))
    assert whole(prompt) == wanted
    for answer, same in zip(generate(model, grammar, [prompt, other], max_new_tokens=40, seed=3), batch, strict=True):
        np.testing.assert_array_equal(answer, same)
    assert begun + [event for run in standing for event in run] == wanted

    def give_up(done, total):
        raise GaveUp

    with pytest.raises(GaveUp):
        generate(model, grammar, [prompt, other], max_new_tokens=40, seed=3, progress=give_up)
    assert whole(prompt) == wanted


def test_codes_of_an_utterance_that_was_given_up_are_in_no_other():
    """A stream of sound that goes on with another answer starts anew, in the middle of a frame as well."""
    vocab = JointVocab.build(text_size=30, speech_codes=(8, 8))

    class Decoder:
        def start(self):
            return []

        def step(self, state, codes_KU):
            return [*state, codes_KU.tolist()], np.zeros(codes_KU.shape[1], np.float32)

        def finish(self, state):
            assert state == [[[3], [4]]]
            return np.zeros(0, np.float32)

    stream = SpeechStream(vocab, Decoder())
    first, second = (span.start for span in vocab.speech)

    def push(*ids):
        events = [TokenEvent(0, 0, token, Modality(int(vocab.modality_V[token]))) for token in ids]
        return len(stream.push(events))

    assert push(vocab.begin_speech, first + 1, second + 1, first + 2) == 1
    assert push(vocab.begin_speech, first + 3, second + 4, vocab.end_speech) == 1
