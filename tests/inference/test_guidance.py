"""Guidance by words and by pictures: the formula in plain Python, over a decoder without a cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.inference.decode import contexts_of, generate, num_contexts
from aromni_jax.inference.description import as_table, describe
from aromni_jax.inference.grammar import Grammar, compile_grammar
from aromni_jax.inference.machine import guided
from aromni_jax.inference.policy import DecodingConfig, Mode, policy_for
from aromni_jax.inference.streaming import stream_tokens
from aromni_jax.structs import Example, Image, Message, Modality, Role, Span, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.prompts import load_templates
from aromni_jax.tokenizers.text import ByteText
from aromni_jax.vocab import JointVocab
from tests.inference.test_decode import VOCAB, model, prompts_of, stacked, whole_logits  # noqa: F401  (fixtures)

WORDS, PICTURES, LIMIT = 2.5, 1.4, 30


def grammar_of(image: Mode, text: Mode | None = None) -> Grammar:
    decoding = DecodingConfig(image=image, text=text or Mode())
    return compile_grammar(VOCAB, {task: policy_for(task, decoding) for task in Task})


def shown(seed: int, num_pictures: int, task: Task = Task.CHAT) -> Example:
    """A prompt of text, pictures and text, whose spans say which is which."""
    rng = np.random.default_rng(seed)
    pieces, spans, place = [], [], 0

    def add(ids, modality, part):
        nonlocal place
        pieces.append(np.asarray(ids, np.int32))
        spans.append(Span(place, len(ids), modality, Role.PROMPT, 0, part))
        place += len(ids)

    def text(length):
        return rng.integers(VOCAB.text.start, VOCAB.text.stop, length)

    add([VOCAB.bos], Modality.TEXT, -1)
    add(text(3), Modality.TEXT, 0)
    for part in range(num_pictures):
        codes = rng.integers(VOCAB.image.start, VOCAB.image.stop, VOCAB.tokens_per_image)
        add([VOCAB.begin_image, *codes, VOCAB.end_image], Modality.IMAGE, part + 1)
    add(text(int(rng.integers(1, 9))), Modality.TEXT, num_pictures + 1)
    return Example(np.concatenate(pieces), tuple(spans), task, str(seed))


def test_what_is_left_of_a_prompt_without_its_words():
    vocab = JointVocab.build(text_size=256, image_codes=24, tokens_per_image=4, speech_codes=(20,))
    pictures = [Image(codes_P=np.arange(k, k + 4)) for k in (0, 7)]
    asked = [
        Message("user", (Text("first"), pictures[0])),
        Message("assistant", (Text("so"), pictures[1])),
        Message("user", (Text("and?"),)),
    ]
    prompt = joint.prompt(asked, Task.CHAT, vocab, ByteText(), load_templates("quickstart"))
    rows = [[vocab.begin_image, *vocab.image_to_rows(picture.codes_P), vocab.end_image] for picture in pictures]
    assert joint.has_picture(prompt)
    np.testing.assert_array_equal(joint.pictures_prompt(prompt, vocab), [vocab.bos, *rows[0], *rows[1]])
    words = joint.prompt(asked[2:], Task.CHAT, vocab, ByteText(), load_templates("quickstart"))
    assert not joint.has_picture(words)
    np.testing.assert_array_equal(joint.pictures_prompt(words, vocab), joint.unconditional_prompt(vocab))
    # A task that makes a picture names its delimiter in the prompt's opening: that is no picture.
    drawn = joint.prompt(asked[2:], Task.TEXT_TO_IMAGE, vocab, ByteText(), load_templates("official-v0.1"))
    assert not joint.has_picture(drawn)


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_codes_are_those_of_the_formula_in_plain_python(stacked, model, num_pictures):  # noqa: F811
    """u + r (i - u) + s (f - i) for every code of a picture that answers a picture, without a cache; else two rows."""
    grammar = grammar_of(Mode(guidance=WORDS, image_guidance=PICTURES))
    tables = jax.tree.map(np.asarray, grammar.tables)
    prompt = shown(1, num_pictures, Task.TEXT_TO_IMAGE)
    assert num_contexts(grammar, prompt) == (3 if num_pictures else 2)
    (answer,) = generate(model, grammar, [prompt], max_new_tokens=LIMIT)
    pictures = [
        i for span in prompt.spans if span.modality == Modality.IMAGE for i in range(span.start, span.start + 6)
    ]
    contexts = [prompt.tokens_L, np.array([VOCAB.bos]), np.array([VOCAB.bos, *prompt.tokens_L[pictures]])]
    logits_of = jax.jit(lambda tokens_BL: whole_logits(stacked, tokens_BL))
    differ = 0
    state = grammar.start_states[prompt.task]
    for step, token in enumerate(answer):
        full_V, unasked_V, shown_V = (
            np.asarray(logits_of(np.pad(row := np.concatenate([context, answer[:step]]), (0, 64 - len(row)))[None]))[
                0, len(row) - 1
            ]
            for context in contexts
        )
        mixed_V = full_V
        if grammar.kinds[state] == "image" and num_pictures:
            mixed_V = unasked_V + PICTURES * (shown_V - unasked_V) + WORDS * (full_V - shown_V)
        elif grammar.kinds[state] == "image":
            mixed_V = unasked_V + WORDS * (full_V - unasked_V)
        legal_V = np.isin(
            tables.class_V, np.flatnonzero(tables.legal_SC[state] & (tables.cost_SC[state] < LIMIT - step))
        )
        if grammar.kinds[state] == "image" and step - 1 == VOCAB.tokens_per_image:
            legal_V = np.arange(VOCAB.size) == VOCAB.end_image
        best = int(np.where(legal_V, mixed_V, -np.inf).argmax())
        assert token == best, f"step {step}"
        differ += best != int(np.where(legal_V, full_V, -np.inf).argmax())
        state = int(tables.next_SC[state, tables.class_V[token]])
    assert tables.done_S[state] and differ  # or guidance had nothing to say


def test_equal_scales_are_the_two_rows_of_guidance_bit_by_bit(model):  # noqa: F811
    rng = np.random.default_rng(0)
    apart = grammar_of(Mode(1.0, guidance=WORDS, image_guidance=PICTURES))
    alike = grammar_of(Mode(1.0, guidance=WORDS, image_guidance=WORDS))
    plain = grammar_of(Mode(1.0, guidance=WORDS))
    state_B = jnp.array([alike.kinds.index("image"), alike.kinds.index("text"), alike.kinds.index("image")])
    logits_RV = jnp.asarray(rng.normal(size=(9, VOCAB.size)), jnp.float32)
    places_R = jnp.array([20, 20, 20, 1, 1, 1, 7, 7, 1])
    two_BV = guided(plain.tables, state_B, logits_RV[:6], places_R[:6])
    np.testing.assert_array_equal(guided(alike.tables, state_B, logits_RV, places_R), two_BV)
    three_BV = guided(apart.tables, state_B, logits_RV, places_R)
    # The second is text and the third has seen no picture.
    np.testing.assert_array_equal(three_BV[1:], two_BV[1:])
    full_V, unasked_V, shown_V = (np.asarray(logits_RV[row]) for row in (0, 3, 6))
    wanted_V = unasked_V + PICTURES * (shown_V - unasked_V) + WORDS * (full_V - shown_V)
    np.testing.assert_allclose(three_BV[0], wanted_V, atol=1e-5)

    prompts = [shown(seed, 1) for seed in range(6)]
    assert {num_contexts(alike, prompt) for prompt in prompts} == {2}
    for one, other in zip(*(generate(model, g, prompts, max_new_tokens=LIMIT) for g in (alike, plain)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_with_and_without_pictures_do_not_notice_each_other(model):  # noqa: F811
    """Three rows of cache for some, two or one for others: in batches, in turns, in streams and alone."""
    grammar = grammar_of(Mode(1.0, top_p=0.96, guidance=WORDS, image_guidance=PICTURES), Mode(1.0))
    prompts = [shown(seed, seed % 3, (Task.CHAT, Task.TEXT_TO_IMAGE)[seed % 2]) for seed in range(8)]
    prompts += prompts_of([Task.TEXT, Task.CAPTION, Task.TEXT_TO_IMAGE], seed=9)
    assert {num_contexts(grammar, prompt) for prompt in prompts} == {1, 2, 3}
    together = generate(model, grammar, prompts, max_new_tokens=LIMIT, seed=2)
    in_turns = generate(model, grammar, prompts, max_new_tokens=LIMIT, seed=2, batch_size=3)
    for i, prompt in enumerate(prompts):
        (alone,) = generate(model, grammar, [prompt], max_new_tokens=LIMIT, seed=2, row_ids=[i])
        runs = stream_tokens(model, grammar, prompt, max_new_tokens=LIMIT, seed=2, row_id=i)
        streamed = [event.token_id for run in runs for event in run]
        for answer in (together[i], in_turns[i], streamed):
            np.testing.assert_array_equal(answer, alone, err_msg=f"row {i}")
    drawn = [answer for answer in together if VOCAB.begin_image in answer]
    assert len(drawn) > 4


def test_the_second_scale_matters_and_is_described(model):  # noqa: F811
    prompts = [shown(seed, 1, Task.TEXT_TO_IMAGE) for seed in range(6)]

    def drawn(*scales):
        return generate(
            model, grammar_of(Mode(guidance=WORDS, image_guidance=scales[0])), prompts, max_new_tokens=LIMIT
        )

    assert any(not np.array_equal(one, other) for one, other in zip(drawn(0.0), drawn(3.0), strict=True))
    grammar = grammar_of(Mode(1.0, guidance=3.07, image_guidance=1.15))
    assert "guidance 3.07, of pictures 1.15" in as_table(describe(grammar, [Task.CHAT]))
    assert "of pictures" not in as_table(describe(grammar_of(Mode(1.0, guidance=3.07)), [Task.CHAT]))
    with pytest.raises(ValueError, match="^image_guidance=-1.0 is not allowed; give a number of at least 0"):
        Mode(image_guidance=-1.0)


def test_contexts_are_as_many_as_are_asked_for():
    prompt = dataclasses.replace(shown(0, 1), key="x")
    assert [len(contexts_of(prompt, VOCAB, count)) for count in (1, 2, 3)] == [1, 2, 3]
    assert [len(ids) for ids in contexts_of(prompt, VOCAB, 3)] == [len(prompt.tokens_L), 1, 7]
