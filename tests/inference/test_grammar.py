"""The compiled automaton: the released layout, its limits, its penalties, and what it says about itself."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.inference.description import as_table, describe
from aromni_jax.inference.grammar import advance, allowed_tokens, compile_grammar, note_seen, repeated
from aromni_jax.inference.policy import DecodingConfig, Mode, Policy, policy_for
from aromni_jax.structs import Task
from aromni_jax.vocab import JointVocab

VOCAB = JointVocab.build(text_size=40, image_codes=16, tokens_per_image=4, speech_codes=(8,))


def walk(grammar, task, tokens):
    """State of one row after `tokens`, and what it has seen."""
    state, seen_BV = grammar.start([task]), jnp.zeros((1, VOCAB.size), jnp.int32)
    for step, token in enumerate(tokens):
        seen_BV = note_seen(grammar.tables, seen_BV, jnp.array([token]), jnp.array([step]))
        state = advance(grammar.tables, state, jnp.array([token]))
    return state, seen_BV


def penalised_ids(grammar, task, tokens):
    state, seen_BV = walk(grammar, task, tokens)
    return np.flatnonzero(repeated(grammar.tables, state, seen_BV, jnp.array([len(tokens)]))[0]).tolist()


@pytest.mark.parametrize("scope", ["answer", "segment"])
def test_penalties_bear_on_the_pieces_of_their_scope_and_never_on_controls(scope):
    said, replied, picture = VOCAB.text.start, VOCAB.text.start + 1, VOCAB.image.start
    mode = Mode(1.0, repetition_penalty=1.3, repetition_scope=scope)
    grammar = compile_grammar(VOCAB, {Task.CHAT: policy_for(Task.CHAT, DecodingConfig(text=mode, image=mode))})
    answer = [VOCAB.begin_transcript, said, said, VOCAB.begin_response]
    answer += [replied, replied, VOCAB.begin_image, picture, picture]
    wanted = {
        "answer": [[], [], [said], [said], [said], [said, replied], [said, replied], [said, replied]],
        "segment": [[], [], [], [], [], [replied], [replied], []],
    }[scope]
    wanted += [[picture, said, replied] if scope == "answer" else [picture]] * 2
    # The transcript's own mode is greedy with the scope of any mode that names none.
    wanted[2:4] = [[said], [said]]
    for length, ids in enumerate(wanted):
        assert penalised_ids(grammar, Task.CHAT, answer[:length]) == sorted(ids), length


def test_both_end_tokens_end_an_answer():
    grammar = compile_grammar(VOCAB, {Task.CAPTION: policy_for(Task.CAPTION)})
    for end in (VOCAB.eos, VOCAB.end_model):
        state, _ = walk(grammar, Task.CAPTION, [VOCAB.text.start])
        assert allowed_tokens(grammar.tables, state, jnp.array([9]))[0, end]
        assert grammar.tables.done_S[advance(grammar.tables, state, jnp.array([end])).state_B[0]]


def test_what_is_printed_is_what_decodes():
    grammar = compile_grammar(JointVocab.released(), {task: policy_for(task) for task in Task})
    table = as_table(describe(grammar, [Task.TEXT_TO_IMAGE]))
    assert [line.split()[1] for line in table.splitlines() if line.startswith("text-to-image")] == [
        "start",
        "image",
        "after",
        "done",
    ]
    for words in ("begin_image 8197 image always, forced", "end_image 8196 after image at budget, forced 1024 sampled"):
        assert words in " ".join(table.split())
    assert "image 4..8195 image below budget" in " ".join(table.split())
    states = describe(grammar)
    assert len(states) == len(grammar.state_names)
    moves = sum(len(move.names) for state in states for move in state.moves)
    assert moves == int(np.sum(np.asarray(grammar.tables.legal_SC | grammar.tables.legal_at_budget_SC)))
    chat = {state.name: state for state in describe(grammar, [Task.CHAT])}
    assert chat["text"].mode == DecodingConfig().text and chat["text"].budget == 512
    assert "min-p 0.05, repetition penalty 1.1 (segment)" in as_table(list(chat.values()))


def test_only_tasks_that_make_pictures_pay_for_their_guidance():
    pictures = {Task.TEXT_TO_IMAGE, Task.SPEECH_TO_IMAGE, Task.CHAT}

    def contexts(decoding: DecodingConfig):
        return compile_grammar(VOCAB, {task: policy_for(task, decoding) for task in Task}).contexts

    assert contexts(DecodingConfig()) == {task: (2, 2) if task in pictures else (1, 1) for task in Task}
    unguided = DecodingConfig(image=Mode(1.0), text=Mode(1.0, guidance=2.0))
    assert {task for task, counts in contexts(unguided).items() if counts == (2, 2)} == {Task.TEXT, Task.CHAT}
    apart = DecodingConfig(image=Mode(1.0, guidance=3.07, image_guidance=1.15))
    assert contexts(apart) == {task: (2, 3) if task in pictures else (1, 1) for task in Task}
    alike = DecodingConfig(image=Mode(1.0, guidance=3.07, image_guidance=3.07))
    assert contexts(alike) == contexts(DecodingConfig())
    only_seen = DecodingConfig(image=Mode(1.0, image_guidance=2.0))
    assert contexts(only_seen)[Task.CHAT] == (1, 3)


def test_released_layout_compiles():
    grammar = compile_grammar(JointVocab.released(), {task: policy_for(task) for task in Task})
    assert grammar.shortest_answers[Task.TEXT_TO_IMAGE] == 1024 + 3


def test_bad_policies_are_named():
    with pytest.raises(ValueError, match="what follows 'speech'"):
        Policy(start=("text",), after={"text": ("speech", "end")})
    with pytest.raises(ValueError, match="ever ends"):
        Policy(start=("text",), after={"text": ("image",), "image": ("image",)})
    for wrong in ({"top_p": 0.0}, {"min_p": 1.5}, {"temperature": float("inf")}, {"repetition_scope": "row"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Mode(**wrong)
    text_only = JointVocab.build(text_size=40)
    with pytest.raises(ValueError, match="no image codes"):
        compile_grammar(text_only, {Task.TEXT_TO_IMAGE: policy_for(Task.TEXT_TO_IMAGE)})
    with pytest.raises(ValueError, match="no speech codes"):
        compile_grammar(text_only, {Task.TEXT_TO_SPEECH: policy_for(Task.TEXT_TO_SPEECH)})
