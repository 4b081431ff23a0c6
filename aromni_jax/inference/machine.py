"""The decoding machine: prompts go into a key-value cache in chunks, then tokens come out of it, a few at a time.

Everything that decoding remembers is one value on the device (`DecodeState`), so that a call may stop after any token:
a stream reads what is there, a dialogue appends the next turn (`extend`), and the next call goes on. Rows have a place,
a state of the grammar, randomness and a limit of their own; no row notices its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from aromni_jax.arrays import IntArray, PyTree
from aromni_jax.inference.grammar import GrammarState, GrammarTables, advance, allowed_tokens, note_seen, repeated
from aromni_jax.inference.head import Spans, narrow_logits, shared_span
from aromni_jax.inference.sampling import repetition_penalised, sample
from aromni_jax.models.config import ModelConfig
from aromni_jax.models.unstacked import Caches, forward, make_caches

PREFILL_TOKENS = 512
"""Prompts are read this many tokens at a time: scores of longer ones would not fit beside a large model."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """B answers in the making, over a cache of R rows: R = B, or 2 B with guidance, where the second half are twins
    that read the answers but not the questions, or 3 B, where the last third are twins that read of the questions the
    pictures alone.

    `hidden_RD` is what the decoder made of the last token of each cached row, `place_R` where the next one goes;
    `step_B` counts the tokens of each answer, `limit_B` is how many it may have, `tokens_BT` holds them; `seen_BV` is
    when each token was last made (`grammar.note_seen`).
    """

    caches: Caches
    hidden_RD: jax.Array
    place_R: IntArray
    grammar: GrammarState
    step_B: IntArray
    limit_B: IntArray
    keys_B: jax.Array
    seen_BV: IntArray
    tokens_BT: IntArray


@dataclasses.dataclass(frozen=True)
class Machine:
    """What does not change from token to token: the shape of the decoder, and which rows of its head serve a state."""

    config: ModelConfig
    spans: Spans
    controls: tuple[int, ...]


def begin(
    machine: Machine,
    grammar: GrammarState,
    limit_B: IntArray,
    keys_B: jax.Array,
    *,
    cache_length: int,
    max_new_tokens: int,
    num_contexts: int = 1,
) -> DecodeState:
    """A state that has read nothing, with `num_contexts` cached rows for each answer: `extend` it with prompts."""
    config = machine.config
    num_rows = len(limit_B)
    num_cached = num_rows * num_contexts
    return DecodeState(
        caches=make_caches(config, num_cached, cache_length),
        hidden_RD=jnp.zeros((num_cached, config.d_model), jnp.dtype(config.dtype)),
        place_R=jnp.zeros(num_cached, jnp.int32),
        grammar=grammar,
        step_B=jnp.zeros(num_rows, jnp.int32),
        limit_B=jnp.asarray(limit_B),
        keys_B=keys_B,
        seen_BV=jnp.zeros((num_rows, config.vocab_size), jnp.int32),
        tokens_BT=jnp.zeros((num_rows, max_new_tokens), jnp.int32),
    )


def extend(
    machine: Machine,
    params: PyTree,
    state: DecodeState,
    tokens_RL: IntArray,
    lengths_R: IntArray,
    *,
    chunk_tokens: int | None = None,
) -> DecodeState:
    """Reads `lengths_R` tokens into each cached row, behind what it holds; a row of none stays as it is.

    Rows are read together, `chunk_tokens` (`PREFILL_TOKENS` without it) at a time, as far as the longest one goes.
    """
    num_rows, width = tokens_RL.shape
    chunk = min(width, chunk_tokens or PREFILL_TOKENS)
    num_chunks = -(-width // chunk)
    padded_RL = jnp.pad(jnp.asarray(tokens_RL), ((0, 0), (0, num_chunks * chunk - width)))

    def body(number: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        hidden_RD, caches = carry
        first = number * chunk
        tokens = jax.lax.dynamic_slice_in_dim(padded_RL, first, chunk, axis=1)
        offsets_L = first + jnp.arange(chunk)
        is_token_RL = (offsets_L < lengths_R[:, None]).astype(jnp.int32)
        places_RL = state.place_R[:, None] + offsets_L
        hidden_RLD, caches = forward(machine.config, params, tokens, places_RL, is_token_RL, caches)
        last_R = lengths_R - 1 - first
        found_RD = hidden_RLD[jnp.arange(num_rows), jnp.clip(last_R, 0, chunk - 1)]
        return jnp.where(((last_R >= 0) & (last_R < chunk))[:, None], found_RD, hidden_RD), caches

    start = (state.hidden_RD, state.caches)
    if num_chunks == 1:
        hidden_RD, caches = body(jnp.int32(0), start)
    else:
        num_needed = (jnp.max(lengths_R) + chunk - 1) // chunk
        hidden_RD, caches = jax.lax.fori_loop(0, num_needed, body, start)
    return dataclasses.replace(state, hidden_RD=hidden_RD, caches=caches, place_R=state.place_R + lengths_R)


def decode(
    machine: Machine,
    params: PyTree,
    tables: GrammarTables,
    state: DecodeState,
    num_tokens: int | jax.Array,
    num_done: int | jax.Array | None = None,
) -> DecodeState:
    """Up to `num_tokens` more tokens of every answer that is not done; fewer when `num_done` rows (all) are done."""
    enough = len(state.step_B) if num_done is None else num_done

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        count, state = carry
        return (count < num_tokens) & (jnp.sum(tables.done_S[state.grammar.state_B]) < enough)

    def emit(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        count, state = carry
        return count + 1, _emit(machine, params, tables, state)

    return jax.lax.while_loop(unfinished, emit, (jnp.int32(0), state))[1]


def _emit(machine: Machine, params: PyTree, tables: GrammarTables, state: DecodeState) -> DecodeState:
    """One token of each row; rows that are done get padding, which is kept nowhere."""
    num_rows = len(state.step_B)
    copies = len(state.place_R) // num_rows
    state_B = state.grammar.state_B
    live_B = ~tables.done_S[state_B]
    # Rows that are done read controls alone, and so never widen what the others read.
    span = shared_span(tables.span_S[state_B], len(machine.spans))
    logits_RV = narrow_logits(
        state.hidden_RD, params["unembedding"], span, spans=machine.spans, controls=machine.controls
    )
    logits_BV = guided(tables, state_B, logits_RV, state.place_R)
    chosen_B = choose(tables, state.grammar, logits_BV, state.seen_BV, state.step_B, state.limit_B, state.keys_B)
    rows_B = jnp.arange(num_rows)
    live_R = jnp.tile(live_B, copies).astype(jnp.int32)
    tokens_R1 = jnp.tile(chosen_B, copies)[:, None]
    hidden_R1D, caches = forward(
        machine.config, params, tokens_R1, state.place_R[:, None], live_R[:, None], state.caches
    )
    # A row that is done has no place left for its padding.
    slot_B = jnp.where(live_B, state.step_B, state.tokens_BT.shape[1])
    return dataclasses.replace(
        state,
        caches=caches,
        hidden_RD=hidden_R1D[:, 0],
        place_R=state.place_R + live_R,
        grammar=advance(tables, state.grammar, chosen_B),
        step_B=state.step_B + live_B,
        seen_BV=note_seen(tables, state.seen_BV, chosen_B, state.step_B),
        tokens_BT=state.tokens_BT.at[rows_B, slot_B].set(chosen_B, mode="drop"),
    )


def guided(tables: GrammarTables, state_B: IntArray, logits_RV: jax.Array, place_R: IntArray) -> jax.Array:
    """Logits [B, V] of each row from those of its contexts, as `Mode.guidance` and `Mode.image_guidance` say."""
    num_rows = len(state_B)
    asked_BV, *twins = jnp.split(logits_RV, len(logits_RV) // num_rows)
    if not twins:
        return asked_BV
    unasked_BV, guidance_B1 = twins[0], tables.guidance_S[state_B][:, None]
    logits_BV = jnp.where(guidance_B1 == 1, asked_BV, unasked_BV + guidance_B1 * (asked_BV - unasked_BV))
    if len(twins) == 1:
        return logits_BV
    shown_BV, picture_B1 = twins[1], tables.image_guidance_S[state_B][:, None]
    # The twins differ by the pictures of the question: where they are equally far, it has none.
    sees_B = place_R[2 * num_rows :] > place_R[num_rows : 2 * num_rows]
    apart_BV = unasked_BV + picture_B1 * (shown_BV - unasked_BV) + guidance_B1 * (asked_BV - shown_BV)
    return jnp.where(sees_B[:, None] & (picture_B1 != guidance_B1), apart_BV, logits_BV)


def choose(
    tables: GrammarTables,
    grammar: GrammarState,
    logits_BV: jax.Array,
    seen_BV: IntArray,
    step_B: IntArray,
    limit_B: IntArray,
    keys_B: jax.Array,
) -> IntArray:
    """The next token of each row, as its state says; legal whatever the logits are."""
    state_B = grammar.state_B
    repeated_BV = repeated(tables, grammar, seen_BV, step_B)
    return sample(
        repetition_penalised(logits_BV, repeated_BV, tables.repetition_penalty_S[state_B]),
        allowed_tokens(tables, grammar, limit_B - step_B),
        jax.vmap(jax.random.fold_in)(keys_B, step_B),
        temperature_B=tables.temperature_S[state_B],
        top_k_B=tables.top_k_S[state_B],
        top_p_B=tables.top_p_S[state_B],
        min_p_B=tables.min_p_S[state_B],
    )


extend_jitted = functools.partial(jax.jit, static_argnames=("machine", "chunk_tokens"), donate_argnames=("state",))(
    extend
)
decode_jitted = functools.partial(jax.jit, static_argnames=("machine",), donate_argnames=("state",))(decode)
