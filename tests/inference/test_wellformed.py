"""No logits, however bad, make a malformed answer; and no row of a batch notices another."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.config import from_mapping
from aromni_jax.inference.decode import OmniModel, generate
from aromni_jax.inference.grammar import advance, compile_grammar, note_seen
from aromni_jax.inference.machine import choose
from aromni_jax.inference.policy import DecodingConfig, Mode, policy_for
from aromni_jax.inference.sampling import row_keys
from aromni_jax.structs import Task
from aromni_jax.vocab import JointVocab
from configs.decode import get_config
from tests.inference.answers import check
from tests.inference.test_decode import CONFIG, VOCAB, prompts_of, stacked  # noqa: F401  (fixture)

VOCABS = {
    "one codebook": JointVocab.build(text_size=40, image_codes=16, tokens_per_image=4, speech_codes=(8,)),
    "three codebooks": JointVocab.build(text_size=40, image_codes=16, tokens_per_image=6, speech_codes=(8, 8, 4)),
}
EVERYTHING = DecodingConfig(
    text=Mode(1.0, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2, repetition_scope="segment"),
    recognition=Mode(repetition_penalty=2.0),
    transcript=Mode(1e-30),
    speech=Mode(0.7, top_p=0.8, repetition_penalty=1.5, repetition_scope="segment"),
    image=Mode(1e6, top_k=5, min_p=1.0, repetition_penalty=0.5),
)
CONFIGS = {
    "ours": DecodingConfig(),
    "released": from_mapping(DecodingConfig, get_config("released")),
    "everything at once": EVERYTHING,
}
KINDS = (
    "random",
    "one id most likely",
    "one id most likely, another at every step",
    "one id plus infinity",
    "one id NaN, the others minus infinity",
    "all NaN",
    "all plus infinity",
    "all minus infinity",
    "NaN and infinities mixed",
    "all alike",
    "ends are minus infinity",
)
LONGEST = 40


def adversarial(vocab: JointVocab, kind_B: jax.Array, favourite_B: jax.Array, step: jax.Array, noise_BV: jax.Array):
    """Logits [B, V] meant to break the grammar, of one kind of `KINDS` and about one id in each row."""
    ids_V, favourite_B1 = jnp.arange(vocab.size), favourite_B[:, None]
    ends = [vocab.eos, vocab.end_model, vocab.end_speech, vocab.end_image, vocab.begin_response]
    odd_BV = jnp.where(noise_BV > 4, jnp.nan, jnp.where(noise_BV > 0, jnp.inf, jnp.where(noise_BV < -4, -jnp.inf, 1.0)))
    kinds_KBV = [
        noise_BV,
        jnp.where(ids_V == favourite_B1, 100.0, noise_BV),
        jnp.where(ids_V == (favourite_B1 + step) % vocab.size, 100.0, noise_BV),
        jnp.where(ids_V == favourite_B1, jnp.inf, noise_BV),
        jnp.where(ids_V == favourite_B1, jnp.nan, -jnp.inf),
        *(jnp.full_like(noise_BV, value) for value in (jnp.nan, jnp.inf, -jnp.inf)),
        odd_BV,
        jnp.zeros_like(noise_BV),
        jnp.where(jnp.isin(ids_V, jnp.array(ends)), -jnp.inf, noise_BV),
    ]
    assert len(kinds_KBV) == len(KINDS)
    return jnp.select([(kind_B == k)[:, None] for k in range(len(KINDS))], kinds_KBV)


@functools.partial(jax.jit, static_argnames=("vocab",))
def answers_to(tables, state, kind_B, favourite_B, keys_B, limits_B, *, vocab):
    """Tokens [B, LONGEST] of the decode loop with made-up logits in place of a model, and how many each row has."""
    num_rows = len(kind_B)

    def emit(carry, step):
        state, seen_BV = carry
        draws_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, 1_000 + step)
        noise_BV = 5 * jax.vmap(lambda key: jax.random.normal(key, (vocab.size,)))(draws_B)
        logits_BV = adversarial(vocab, kind_B, favourite_B, step, noise_BV)
        step_B = jnp.full(num_rows, step)
        token_B = choose(tables, state, logits_BV, seen_BV, step_B, limits_B, keys_B)
        seen_BV = note_seen(tables, seen_BV, token_B, step_B)
        return (advance(tables, state, token_B), seen_BV), (token_B, tables.done_S[state.state_B])

    start = (state, jnp.zeros((num_rows, vocab.size), jnp.int32))
    _, (tokens_TB, done_TB) = jax.lax.scan(emit, start, jnp.arange(LONGEST))
    return tokens_TB.T, (~done_TB).sum(0)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "vocab_name, config_name", [("one codebook", "released"), ("three codebooks", "everything at once")]
)
def test_ten_thousand_answers_are_well_formed_and_rows_do_not_see_each_other(vocab_name, config_name):
    """Every task, every id as the favourite and every kind of logits: one batch of all of them."""
    vocab = VOCABS[vocab_name]
    config = dataclasses.replace(CONFIGS[config_name], text_budget=7, speech_budget_frames=4)
    policies = {task: policy_for(task, config) for task in Task}
    grammar = compile_grammar(vocab, policies)
    rows = [(t, f, k) for k in range(len(KINDS)) for f in range(vocab.size) for t in Task]
    assert len(rows) >= 10_000
    rng = np.random.default_rng(0)
    tasks = [task for task, _, _ in rows]
    favourite_B, kind_B = (np.array([row[i] for row in rows], np.int32) for i in (1, 2))
    limits_B = np.array([rng.integers(grammar.shortest_answers[task], LONGEST + 1) for task in tasks], np.int32)
    keys_B = row_keys(0, list(range(len(rows))))

    def answers_of(chosen):
        state = grammar.start([tasks[i] for i in chosen])
        given = (kind_B[chosen], favourite_B[chosen], keys_B[chosen], limits_B[chosen])
        return tuple(map(np.asarray, answers_to(grammar.tables, state, *given, vocab=vocab)))

    tokens_BT, lengths_B = answers_of(np.arange(len(rows)))
    for row, task in enumerate(tasks):
        assert lengths_B[row] <= limits_B[row]
        try:
            check(tokens_BT[row, : lengths_B[row]].tolist(), task, vocab, policies[task])
        except (AssertionError, ValueError, IndexError) as error:
            raise AssertionError(f"{task}, {KINDS[kind_B[row]]}, id {favourite_B[row]}: {tokens_BT[row]}") from error
        assert np.all(tokens_BT[row, lengths_B[row] :] == vocab.pad)
    said = set(np.unique(tokens_BT))
    never = {vocab.bos, vocab.unk, vocab.end_human, *range(vocab.text.stop, vocab.size)}
    assert said == set(range(vocab.size)) - never  # every id that means something in an answer was in one
    order = rng.permutation(len(rows))
    np.testing.assert_array_equal(answers_of(order)[0], tokens_BT[order])
    for row in rng.integers(0, len(rows), 40):
        np.testing.assert_array_equal(answers_of(np.array([row]))[0][0], tokens_BT[row])


def test_the_reader_of_answers_refuses_what_is_malformed():
    vocab = VOCABS["three codebooks"]
    policy = policy_for(Task.CHAT, DecodingConfig(text_budget=3, speech_budget_frames=2))
    say, end = vocab.text.start, vocab.end_model
    picture = [vocab.begin_image, *[vocab.image.start] * 6, vocab.end_image]
    frame = [span.start for span in vocab.speech]
    sound = [vocab.begin_speech, *frame, vocab.end_speech]
    heard = [vocab.begin_transcript, say, vocab.begin_response]
    check([*heard, say, *sound, *picture, end], Task.CHAT, vocab, policy)
    for bad in (
        [say],
        [end],
        [say, vocab.bos, end],
        [say, *picture[:-2], vocab.end_image, end],
        [say, *picture[:-1], vocab.image.start, vocab.end_image, end],
        [say, *picture[:-1], end],
        [say, vocab.begin_speech, vocab.end_speech, end],
        [say, vocab.begin_speech, *frame, say, vocab.end_speech, end],
        [say, vocab.begin_speech, *frame[:2], vocab.end_speech, end],
        [say, vocab.begin_speech, *frame * 3, vocab.end_speech, end],
        [say, vocab.begin_speech, *frame, end],
        [*picture, end],
        [say, *picture, *sound, end],
        [say, *picture, *picture, end],
        [say] * 4 + [end],
        [*heard[:-1], end],
        [*heard, *heard, say, end],
        [say, end, end],
    ):
        with pytest.raises((AssertionError, ValueError, IndexError)):
            check(bad, Task.CHAT, vocab, policy)
    for task in (Task.TEXT, Task.CAPTION, Task.TEXT_TO_SPEECH, Task.TEXT_TO_IMAGE):
        wrong = {Task.TEXT_TO_IMAGE: sound, Task.TEXT_TO_SPEECH: picture}.get(task, [say, *picture])
        with pytest.raises(AssertionError):
            check([*wrong, vocab.eos], task, vocab, policy)


DAMAGE = types.MappingProxyType(
    {
        "random weights": lambda x: x,
        "enormous weights": lambda x: x * np.float32(1e15),
        "NaN in the output head": lambda x: np.where(np.arange(x.size).reshape(x.shape) % 7 == 0, np.nan, x),
    }
)


@pytest.mark.parametrize("config_name", CONFIGS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_decoder_of_any_weights_answers_in_form(stacked, damage, config_name):  # noqa: F811
    """Guidance, narrow heads and the cache included: rows of all tasks in each batch, through `generate`."""
    config = dataclasses.replace(CONFIGS[config_name], text_budget=7, speech_budget_frames=4)
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, guidance=3.07))
    policies = {task: policy_for(task, config) for task in Task}
    grammar = compile_grammar(VOCAB, policies)
    params = jax.tree.map(lambda x: DAMAGE[damage](np.array(x)).astype(np.float32), stacked)
    model = OmniModel.of(CONFIG, params, VOCAB)
    prompts = prompts_of(list(Task) * 8)
    answers = generate(model, grammar, prompts, max_new_tokens=32, batch_size=32)
    for prompt, answer in zip(prompts, answers, strict=True):
        check(answer.tolist(), prompt.task, VOCAB, policies[prompt.task])
