"""A head that reads part of its table gives the very logits of the whole one, wherever the grammar lets them count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.head import CONTROLS, WHOLE, narrow_logits, shared_span, spans_of
from aromni_jax.inference.policy import policy_for
from aromni_jax.models.int8 import quantised
from aromni_jax.structs import Task
from aromni_jax.vocab import JointVocab

RELEASED = JointVocab.released()
CONTROL_ROWS = tuple(RELEASED.special_ids.values())


@pytest.fixture(scope="module")
def grammar():
    return compile_grammar(RELEASED, {task: policy_for(task) for task in Task})


def test_every_legal_token_of_a_state_is_read(grammar):
    spans, tables = spans_of(RELEASED), grammar.tables
    class_V = np.asarray(tables.class_V)
    for state, name in enumerate(grammar.state_names):
        legal_C = np.asarray(tables.legal_SC[state] | tables.legal_at_budget_SC[state])
        start, stop = spans[int(tables.span_S[state])]
        read = set(range(start, stop)) | set(CONTROL_ROWS)
        assert set(np.flatnonzero(legal_C[class_V])) <= read, name


def test_speech_and_pictures_read_little(grammar):
    spans = spans_of(RELEASED)
    rows = {
        name: spans[int(span)][1] - spans[int(span)][0]
        for name, span in zip(grammar.state_names, np.asarray(grammar.tables.span_S))
    }
    assert rows["text-to-speech: speech0"] == 4096 and rows["text-to-image: image"] == 8192
    assert rows["text-to-image: after image"] == 0 and rows["chat: text"] == RELEASED.size
    done = grammar.state_names.index("chat: done")
    assert grammar.tables.span_S[done] == CONTROLS


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_logits_equal_those_of_the_whole_table_bit_for_bit(rows, dtype, is_int8):
    rng = np.random.default_rng(0)
    table, scale = jnp.asarray(rng.normal(size=(RELEASED.size, 48)), dtype), None
    if is_int8:
        table, scale = quantised(table, (1,))
    hidden = jnp.asarray(rng.normal(size=(rows, 48)), dtype)
    spans = spans_of(RELEASED)
    compute = jax.jit(
        lambda span: narrow_logits(hidden, table, span, spans=spans, controls=CONTROL_ROWS, scale_V=scale)
    )
    whole = np.asarray(compute(WHOLE))
    for number, (start, stop) in enumerate(spans[1:], 1):
        read = np.union1d(np.arange(start, stop), CONTROL_ROWS)
        found = np.asarray(compute(number))
        np.testing.assert_array_equal(found[:, read], whole[:, read])
        assert not np.delete(found, read, axis=1).any()


def test_rows_share_a_span_only_when_it_serves_them_all():
    speech, image = 2, 3
    cases = {
        (speech, speech): speech,
        (speech, CONTROLS): speech,
        (CONTROLS, CONTROLS): CONTROLS,
        (speech, image): WHOLE,
        (WHOLE, CONTROLS): WHOLE,
        (image,): image,
    }
    for spans, wanted in cases.items():
        assert shared_span(jnp.array(spans), 4) == wanted, spans
