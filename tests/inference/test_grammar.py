"""No logits, however bad, make a malformed answer; checked against a reader of answers that knows no tables."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.inference.grammar import Mode, Policy, advance, allowed_tokens, compile_grammar, policy_for
from aromni_jax.inference.sampling import row_keys, sample
from aromni_jax.structs import Task
from aromni_jax.vocab import JointVocab

VOCABS = {
    "one codebook": JointVocab.build(text_size=40, image_codes=16, tokens_per_image=4, speech_codes=(8,)),
    "three codebooks": JointVocab.build(text_size=40, image_codes=16, tokens_per_image=6, speech_codes=(8, 8, 4)),
}
SAMPLED = Mode(temperature=1.0, top_p=0.9, top_k=20, repetition_penalty=1.2)


@functools.partial(jax.jit, static_argnames=("num_steps",))
def run(tables, state, logits_TBV, keys_B, limits_B, num_steps):
    """Drives the tables with given logits, as the decode loop does, without a model."""

    def emit(state, step):
        token_B = sample(
            logits_TBV[step % len(logits_TBV)],
            allowed_tokens(tables, state, limits_B - step),
            jax.vmap(jax.random.fold_in, (0, None))(keys_B, step),
            temperature_B=tables.temperature_S[state.state_B],
            top_k_B=tables.top_k_S[state.state_B],
            top_p_B=tables.top_p_S[state.state_B],
        )
        done_B = tables.done_S[state.state_B]
        return advance(tables, state, token_B), (token_B, done_B)

    _, (tokens_TB, done_TB) = jax.lax.scan(emit, state, jnp.arange(num_steps))
    return tokens_TB.T, (~done_TB).sum(0)


def read(tokens: list[int], vocab: JointVocab) -> list[tuple[str, list[int]]]:
    """An answer's segments; raises AssertionError where it is malformed. Says METHOD section 6 in plain Python."""
    assert tokens[-1] in (vocab.eos, vocab.end_model)
    segments: list[tuple[str, list[int]]] = []
    i, body = 0, tokens[:-1]
    while i < len(body):
        token = body[i]
        if token == vocab.begin_image:
            codes = body[i + 1 : i + 1 + vocab.tokens_per_image]
            assert len(codes) == vocab.tokens_per_image and all(code in vocab.image for code in codes)
            assert body[i + 1 + len(codes)] == vocab.end_image
            segments.append(("image", codes))
            i += len(codes) + 2
        elif token == vocab.begin_speech:
            stop = body.index(vocab.end_speech, i)
            codes = body[i + 1 : stop]
            assert codes and len(codes) % len(vocab.speech) == 0
            assert all(code in vocab.speech[k % len(vocab.speech)] for k, code in enumerate(codes))
            segments.append(("speech", codes))
            i = stop + 1
        elif token == vocab.begin_transcript:
            stop = body.index(vocab.begin_response, i)
            assert all(piece in vocab.text for piece in body[i + 1 : stop])
            segments.append(("transcript", body[i + 1 : stop]))
            i = stop + 1
        else:
            start = i
            while i < len(body) and body[i] in vocab.text:
                i += 1
            assert i > start, f"token {token} may not stand here"
            segments.append(("text", body[start:i]))
    return segments


def check(tokens: list[int], task: Task, vocab: JointVocab, policy: Policy) -> None:
    kinds = [kind for kind, _ in read(tokens, vocab)]
    allowed = {
        Task.TEXT_TO_IMAGE: [["image"]],
        Task.SPEECH_TO_IMAGE: [["image"], ["transcript", "image"]],
        Task.TEXT_TO_SPEECH: [["speech"]],
    }.get(task, [["text"]])
    if task == Task.CHAT:
        rank = ["transcript", "text", "speech", "image"]
        assert kinds and kinds == sorted(set(kinds), key=rank.index) and kinds[0] in ("transcript", "text")
    else:
        assert kinds in allowed
    for kind, body in read(tokens, vocab):
        if kind == "speech":
            assert len(body) <= policy.speech_budget_frames * len(vocab.speech)
        if kind in ("text", "transcript"):
            assert len(body) <= policy.text_budget


def adversarial(kind: str, rng: np.random.Generator, num_rows: int, vocab: JointVocab) -> np.ndarray:
    """[T, B, V] logits meant to break the grammar."""
    logits = rng.normal(size=(7, num_rows, vocab.size)).astype(np.float32) * 5
    favourite = np.arange(num_rows) % vocab.size
    if kind == "each id most likely in turn":
        logits[:, np.arange(num_rows), favourite] = 100
    elif kind == "each id infinite":
        logits[:, np.arange(num_rows), favourite] = np.inf
    elif kind == "all NaN":
        logits[:] = np.nan
    elif kind == "all minus infinity":
        logits[:] = -np.inf
    elif kind == "NaN and infinities mixed":
        logits[rng.random(logits.shape) < 0.3] = np.nan
        logits[rng.random(logits.shape) < 0.3] = np.inf
        logits[rng.random(logits.shape) < 0.3] = -np.inf
    elif kind == "never ends":
        logits[:, :, [vocab.eos, vocab.end_model, vocab.end_speech, vocab.begin_response]] = -np.inf
    return logits


KINDS = (
    "random",
    "each id most likely in turn",
    "each id infinite",
    "all NaN",
    "all minus infinity",
    "NaN and infinities mixed",
    "never ends",
)


@pytest.mark.parametrize("vocab_name", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_well_formed(vocab_name, kind):
    vocab, tasks = VOCABS[vocab_name], list(Task) * 128
    for mode, budget in ((Mode(), 5), (SAMPLED, 9)):
        policies = {
            task: dataclasses.replace(
                policy_for(task, image=mode, text=mode), text_budget=budget, speech_budget_frames=4
            )
            for task in Task
        }
        grammar = compile_grammar(vocab, policies)
        rng = np.random.default_rng(len(kind))
        limits = np.array([rng.integers(grammar.shortest_answers[task], 40) for task in tasks], np.int32)
        logits = adversarial(kind, rng, len(tasks), vocab)
        keys = row_keys(0, list(range(len(tasks))))
        answers = run(grammar.tables, grammar.start(tasks), logits, keys, limits, num_steps=42)
        tokens_BT, lengths_B = (np.asarray(array) for array in answers)
        for row, task in enumerate(tasks):
            assert lengths_B[row] <= limits[row]
            answer = [int(t) for t in tokens_BT[row, : lengths_B[row]]]
            check(answer, task, vocab, policies[task])
            assert all(int(t) == vocab.pad for t in tokens_BT[row, lengths_B[row] :])


def test_both_end_tokens_end_an_answer():
    vocab = VOCABS["one codebook"]
    grammar = compile_grammar(vocab, {Task.CAPTION: policy_for(Task.CAPTION)})
    for end in (vocab.eos, vocab.end_model):
        logits = np.zeros((1, 1, vocab.size), np.float32)
        logits[..., end] = 9
        tokens, length = run(grammar.tables, grammar.start([Task.CAPTION]), logits, row_keys(0, [0]), np.array([9]), 9)
        assert int(tokens[0, int(length[0]) - 1]) == end and int(length[0]) == 2


def test_describe_names_every_state():
    grammar = compile_grammar(VOCABS["one codebook"], {Task.TEXT_TO_IMAGE: policy_for(Task.TEXT_TO_IMAGE)})
    text = grammar.describe()
    assert "start [greedy]: begin_image -> text-to-image: image" in text
    assert "end_image -> text-to-image: after image (only at budget)" in text


def test_released_layout_compiles():
    grammar = compile_grammar(JointVocab.released(), {task: policy_for(task) for task in Task})
    assert grammar.shortest_answers[Task.TEXT_TO_IMAGE] == 1024 + 3


def test_bad_policies_are_named():
    with pytest.raises(ValueError, match="what follows 'speech'"):
        Policy(start=("text",), after={"text": ("speech", "end")})
    with pytest.raises(ValueError, match="ever ends"):
        Policy(start=("text",), after={"text": ("image",), "image": ("image",)})
    with pytest.raises(ValueError, match="top_p"):
        Mode(top_p=0.0)
    text_only = JointVocab.build(text_size=40)
    with pytest.raises(ValueError, match="no image codes"):
        compile_grammar(text_only, {Task.TEXT_TO_IMAGE: policy_for(Task.TEXT_TO_IMAGE)})
    with pytest.raises(ValueError, match="no speech codes"):
        compile_grammar(text_only, {Task.TEXT_TO_SPEECH: policy_for(Task.TEXT_TO_SPEECH)})
