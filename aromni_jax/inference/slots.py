"""Slots: a fixed number of rows on the device, each of which takes the next question as soon as its answer is done.

A batch that waits for its longest answer leaves the device to one row in the end. Here new questions are read apart, in
a small state of their own, and put into the rows that have become free, while the others stay as they are: nothing is
compiled again, and a row's tokens depend on nothing but its question, its number and the seed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from aromni_jax.arrays import IntArray, PyTree
from aromni_jax.inference.grammar import GrammarState
from aromni_jax.inference.machine import DecodeState, Machine, begin, extend

REFILL_TOKENS = 128
"""New questions are read this many tokens at a time: a short one costs no more than that beside a long one."""


def refill(
    machine: Machine,
    params: PyTree,
    state: DecodeState,
    grammar: GrammarState,
    limit_G: IntArray,
    keys_G: jax.Array,
    tokens_XL: IntArray,
    lengths_X: IntArray,
    slots_G: IntArray,
) -> DecodeState:
    """`state` with G new questions in its rows `slots_G`, ready for the first token of their answers.

    Args:
      tokens_XL: row g holds `lengths_X[g]` tokens of question g; behind the G questions stand those of their twins, as
        in `extend` (X = G times what the cache has rows for each answer).
      slots_G: a place that the state does not have (B) makes a question that goes nowhere, for the sake of the shape.
    """
    num_slots, num_cached = len(state.step_B), len(state.place_R)
    contexts = num_cached // num_slots
    fresh = begin(
        machine,
        grammar,
        limit_G,
        keys_G,
        cache_length=tokens_XL.shape[1],
        max_new_tokens=0,
        num_contexts=contexts,
    )
    fresh = extend(machine, params, fresh, tokens_XL, lengths_X, chunk_tokens=REFILL_TOKENS)
    rows_CG = jnp.where(slots_G < num_slots, slots_G + num_slots * jnp.arange(contexts)[:, None], num_cached)

    def put_B(held: jax.Array, new: jax.Array | int) -> jax.Array:
        return held.at[slots_G].set(new, mode="drop")

    def put_R(held: jax.Array, new: jax.Array) -> jax.Array:
        return held.at[rows_CG.reshape(-1)].set(new, mode="drop")

    return DecodeState(
        caches=tuple(held.put(rows_CG.reshape(-1), new) for held, new in zip(state.caches, fresh.caches, strict=True)),
        hidden_RD=put_R(state.hidden_RD, fresh.hidden_RD),
        place_R=put_R(state.place_R, fresh.place_R),
        grammar=jax.tree.map(put_B, state.grammar, grammar),
        step_B=put_B(state.step_B, 0),
        limit_B=put_B(state.limit_B, limit_G),
        keys_B=put_B(state.keys_B, keys_G),
        seen_BV=put_B(state.seen_BV, 0),
        tokens_BT=put_B(state.tokens_BT, 0),
    )


refill_jitted = functools.partial(jax.jit, static_argnames=("machine",), donate_argnames=("state",))(refill)
