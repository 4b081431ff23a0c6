"""A streamed answer is the answer, its sound is the sound of all its codes, and latency is counted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from aromni_jax.inference.decode import generate
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.policy import policy_for
from aromni_jax.inference.streaming import LatencyClock, SpeechStream, stream_tokens
from aromni_jax.structs import Modality, Task, TokenEvent
from aromni_jax.tokenizers.shipped import shipped_directory
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.vocab import JointVocab
from tests.inference.test_decode import VOCAB, model, prompts_of, stacked  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def grammar():
    return compile_grammar(VOCAB, {task: policy_for(task) for task in Task})


@pytest.mark.parametrize("task", [Task.CHAT, Task.TEXT_TO_IMAGE, Task.TEXT_TO_SPEECH])
def test_runs_add_up_to_the_answer(model, grammar, task):  # noqa: F811
    prompt = prompts_of([task], seed=4)[0]
    (wanted,) = generate(model, grammar, [prompt], max_new_tokens=40, seed=3, row_ids=[9])
    runs = list(stream_tokens(model, grammar, prompt, max_new_tokens=40, seed=3, row_id=9, first_run=1, longest_run=8))
    events = [event for run in runs for event in run]
    assert [event.token_id for event in events] == wanted.tolist()
    assert [event.step for event in events] == list(range(len(wanted)))
    assert [len(run) for run in runs[:3]] == [1, 2, 4][: len(runs)] or len(wanted) < 7
    assert all(event.modality == Modality(int(VOCAB.modality_V[event.token_id])) for event in events)


def test_bad_requests_are_errors_before_anything_runs(model, grammar):  # noqa: F811
    with pytest.raises(ValueError, match="too few for text-to-image"):
        next(stream_tokens(model, grammar, prompts_of([Task.TEXT_TO_IMAGE])[0], max_new_tokens=3))


def test_sound_of_a_stream_is_the_sound_of_the_whole_without_a_gap():
    """Codes of two utterances, cut at odd places, and text between them, through the shipped codec."""
    tokenizer = SpeechTokenizer.load(shipped_directory("speech"))
    size = tokenizer.num_codes
    vocab = JointVocab.build(text_size=30, speech_codes=(size,))
    rng = np.random.default_rng(0)
    spoken = [rng.integers(0, size, (1, length)).astype(np.int32) for length in (37, 5)]
    special, ids = vocab.special_ids, []
    for codes_KU in spoken:
        ids += [special["begin_speech"], *(codes_KU[0] + vocab.speech[0].start).tolist(), special["end_speech"]]
        ids += [vocab.text.start]
    events = [TokenEvent(0, i, token, Modality(int(vocab.modality_V[token]))) for i, token in enumerate(ids)]
    stream = SpeechStream(vocab, tokenizer.stream_decoder())
    cuts = [0, 3, 4, 11, 30, 44, len(events)]
    heard = np.concatenate([stream.push(events[start:stop]) for start, stop in itertools.pairwise(cuts)])
    wanted = np.concatenate([tokenizer.decode([codes_KU])[0] for codes_KU in spoken])
    assert len(heard) == len(wanted)
    np.testing.assert_allclose(heard, wanted, atol=1e-4)


def test_latency_by_hand():
    """At 10 samples a second: sound for 1 s at 2 s, and again at 4 s, a second after it was needed."""
    moments = iter([0.0, 1.0, 2.0, 4.0, 4.5, 6.0])
    vocab = VOCAB
    code = vocab.speech[0].start

    def events(*ids):
        return [TokenEvent(0, 0, token, Modality(int(vocab.modality_V[token]))) for token in ids]

    clock = LatencyClock(vocab, 10, now=lambda: next(moments))
    clock.heard(events(vocab.special_ids["begin_speech"]), 0)
    clock.heard(events(code, code), 10)
    clock.heard(events(code), 20)
    clock.heard(events(vocab.eos), 5)
    record = clock.record()
    assert record["first_token_seconds"] == 1.0 and record["ftl_seconds"] == record["ttfa_seconds"] == 2.0
    assert record["underruns"] == 1
    assert record["audio_seconds"] == 3.5 and record["rtf"] == pytest.approx(6.0 / 3.5)
    assert record["tokens"] == 5 and record["token_seconds_p50"] == 0.5
