"""The output head, as narrow as the states of all rows allow: rows that speak read the speech rows of the table alone.

Reading the table is much of what a small batch waits for: of 65,536 rows of the released layout an utterance needs
4,108 and a picture 8,204. Logits of rows that are not read are 0; the grammar forbids their tokens in these states.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import IntArray
from aromni_jax.models.int8 import read_here, scaled
from aromni_jax.partitioning import constrain, num_shards
from aromni_jax.vocab import JointVocab

Spans = tuple[tuple[int, int], ...]
"""(start, stop) of the rows that each kind of state reads besides the control tokens; the first is the whole table."""

WHOLE, CONTROLS, FIRST_MEDIUM = 0, 1, 2


def spans_of(vocab: JointVocab) -> Spans:
    """The whole table, nothing but controls, then one span for each medium that the vocabulary has: speech, image."""
    spans = [(0, vocab.size), (0, 0)]
    if vocab.speech:
        spans.append((min(span.start for span in vocab.speech), max(span.stop for span in vocab.speech)))
    if vocab.image:
        spans.append((vocab.image.start, vocab.image.stop))
    return tuple(spans)


def span_of_rows(spans: Spans, rows: np.ndarray, controls: np.ndarray) -> int:
    """The index of the narrowest span that, with the controls, holds all of `rows` (ids of the vocabulary)."""
    content = np.setdiff1d(rows, controls)
    fitting = [i for i, (start, stop) in enumerate(spans) if np.all((content >= start) & (content < stop))]
    return min(fitting, key=lambda i: spans[i][1] - spans[i][0])


def shared_span(span_B: IntArray, num_spans: int) -> jax.Array:
    """The index of the span that serves every row of a batch: theirs when they agree, else the whole table."""
    wants_S = jnp.any(span_B[:, None] == jnp.arange(num_spans), axis=0)
    is_mixed = wants_S[WHOLE] | (wants_S[FIRST_MEDIUM:].sum() > 1)
    return jnp.where(is_mixed, WHOLE, jnp.max(span_B))


def narrow_logits(
    hidden_RD: jax.Array,
    table_VD: jax.Array,
    span: jax.Array,
    *,
    spans: Spans,
    controls: tuple[int, ...],
    scale_V: jax.Array | None = None,
) -> jax.Array:
    """float32 logits [R, V] of the rows of span number `span` and of the controls, each as the whole head gives it.

    `scale_V` belongs to a table of 8 bits (`models.int8`).

    On a mesh that splits the table every device reads its own rows: one that holds the whole span would keep the
    others waiting. The choice among the logits is then made by every device for itself.
    """

    def product(rows: Any = slice(None)) -> jax.Array:
        x_RD, rows_WD = read_here(hidden_RD, table_VD[rows], hidden_RD.dtype)
        logits_RW = jnp.einsum("RD,WD->RW", x_RD, rows_WD, preferred_element_type=jnp.float32)
        return scaled(logits_RW, None if scale_V is None else scale_V[rows])

    def narrow(start: int, stop: int) -> jax.Array:
        ids = jnp.asarray(controls)
        logits_RV = jnp.zeros((hidden_RD.shape[0], table_VD.shape[0]), jnp.float32)
        logits_RV = logits_RV.at[:, ids].set(product(ids))
        if start == stop:
            return logits_RV
        return logits_RV.at[:, start:stop].set(product(slice(start, stop)))

    if num_shards("vocab") > 1:
        # Named in between, or the compiler gathers the table instead of the logits.
        return constrain(constrain(product(), "batch", "vocab"), "batch", None)
    branches = [product, *(lambda where=where: narrow(*where) for where in spans[1:])]
    return jax.lax.switch(span, branches)
