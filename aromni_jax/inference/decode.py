"""Batched generation: one prefill, then a jitted loop over a key-value cache that cannot leave the grammar.

Rows start at slot 0 of the cache and may have different lengths. Rows of different tasks decode together: the tables
of the grammar are arguments, and every row carries its own state. Shapes come from a few buckets, so a handful of
programs serves everything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import IntArray, PyTree
from aromni_jax.inference.grammar import Grammar, GrammarState, GrammarTables, advance, allowed_tokens
from aromni_jax.inference.sampling import repetition_penalised, row_keys, sample
from aromni_jax.models.decoder import Decoder
from aromni_jax.models.kv_cache import KVCache
from aromni_jax.structs import Example, Task
from aromni_jax.vocab import JointVocab

LENGTH_BUCKETS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Prompts and answers are padded to the next of these (and to multiples of the last one)."""


@dataclasses.dataclass(frozen=True, eq=False)
class OmniModel:
    """A trained decoder with what is needed to ask it: its parameters and the vocabulary they were trained on."""

    decoder: Decoder
    params: PyTree
    vocab: JointVocab


def bucket_of(length: int, buckets: tuple[int, ...] = LENGTH_BUCKETS) -> int:
    """Smallest bucket that holds `length`; above the largest, the next multiple of it."""
    fitting = [bucket for bucket in buckets if bucket >= length]
    return fitting[0] if fitting else -(-length // buckets[-1]) * buckets[-1]


def generate(
    model: OmniModel,
    grammar: Grammar,
    prompts: Sequence[Example],
    *,
    max_new_tokens: int | dict[Task, int],
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Answers every prompt; rows of any tasks and lengths may stand side by side.

    Args:
      grammar: compiled from `model.vocab` for at least the tasks of the prompts.
      prompts: what `joint.prompt` encodes.
      max_new_tokens: most tokens of an answer, for all tasks or for each one. No answer is cut off there: the grammar
        closes it in time.
      row_ids: numbers that, with `seed`, fix each row's randomness (its index by default).
      batch_size: rows per device call; the last call is padded to it when there is more than one.
      progress: called with (answers done, answers in all) after each batch.

    Returns:
      int32 ids of each answer, from its first token to its end token (eos or end_model) included, in prompt order.

    Raises:
      ValueError: an empty prompt, or fewer tokens allowed than the shortest answer of a task has.
    """
    limits = [max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[p.task] for p in prompts]
    for example, limit in zip(prompts, limits, strict=True):
        if not len(example.tokens_L):
            raise ValueError(f"prompt {example.key!r} is empty")
        shortest = grammar.shortest_answers.get(example.task, 0)
        if limit < shortest:
            raise ValueError(
                f"max_new_tokens={limit} is too few for {example.task.command}: "
                f"the shortest answer has {shortest} tokens"
            )
    row_ids = list(range(len(prompts)) if row_ids is None else row_ids)
    # Rows of like length stand together: a batch costs as much as its longest prompt and its longest answer.
    order = sorted(range(len(prompts)), key=lambda i: (limits[i], len(prompts[i].tokens_L)))
    rows_per_call = batch_size if len(prompts) > batch_size else bucket_of(len(prompts), (1, 2, 4, 8, 16, batch_size))
    is_guided = any(example.task in grammar.guided_tasks for example in prompts)
    # One program for the whole call: compiling another one would cost more than some padding.
    width = bucket_of(max((len(p.tokens_L) for p in prompts), default=1))
    max_new = bucket_of(max(limits, default=1))
    answers: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for first in range(0, len(order), rows_per_call):
        chosen = order[first : first + rows_per_call]
        tokens_BT, lengths_B = _generate_batch(
            model,
            grammar,
            [prompts[i] for i in chosen],
            np.array([limits[i] for i in chosen], np.int32),
            row_keys(seed, [row_ids[i] for i in chosen] + [0] * (rows_per_call - len(chosen))),
            width,
            max_new,
            is_guided,
        )
        for row, i in enumerate(chosen):
            answers[i] = tokens_BT[row, : lengths_B[row]]
        if progress:
            progress(first + len(chosen), len(order))
    return answers


def _generate_batch(
    model: OmniModel,
    grammar: Grammar,
    prompts: list[Example],
    limits_B: np.ndarray,
    keys_B: jax.Array,
    width: int,
    max_new_tokens: int,
    is_guided: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Pads one batch to `width` tokens and one row per key, and runs it: tokens [B, T] and each answer's length."""
    spare = len(keys_B) - len(prompts)
    prompt_BL = np.full((len(keys_B), width), model.vocab.pad, np.int32)
    lengths_B = np.ones(len(keys_B), np.int32)
    for row, example in enumerate(prompts):
        prompt_BL[row, : len(example.tokens_L)] = example.tokens_L
        lengths_B[row] = len(example.tokens_L)
    start = grammar.start([example.task for example in prompts])
    # Spare rows are born done: they cost their share of the batch and nothing else.
    done_state = int(np.flatnonzero(np.asarray(grammar.tables.done_S))[0])
    state = GrammarState(
        jnp.pad(start.state_B, (0, spare), constant_values=done_state), jnp.pad(start.count_B, (0, spare))
    )
    tokens_BT, steps_B = decode_loop(
        model.decoder,
        model.params,
        grammar.tables,
        prompt_BL,
        lengths_B,
        state,
        np.pad(limits_B, (0, spare)),
        keys_B,
        bos=model.vocab.bos,
        max_new_tokens=max_new_tokens,
        is_guided=is_guided,
    )
    return np.asarray(tokens_BT), np.asarray(steps_B)


@functools.partial(jax.jit, static_argnames=("decoder", "bos", "max_new_tokens", "is_guided"))
def decode_loop(
    decoder: Decoder,
    params: PyTree,
    tables: GrammarTables,
    prompt_BL: IntArray,
    lengths_B: IntArray,
    grammar: GrammarState,
    limits_B: IntArray,
    keys_B: jax.Array,
    *,
    bos: int,
    max_new_tokens: int,
    is_guided: bool,
) -> tuple[jax.Array, jax.Array]:
    """Prefills the prompts and decodes until every row is done.

    With `is_guided` every row has a twin in the cache whose prompt is the beginning of sequence alone and whose answer
    is the row's own: what the model would say unasked. It serves states with guidance other than 1.

    Args:
      prompt_BL: row b holds `lengths_B[b]` tokens, at least one, then padding.
      limits_B: most tokens of each answer, at most `max_new_tokens` (the width of the result).

    Returns:
      tokens [B, max_new_tokens] and the number of tokens of each answer, end token included.
    """
    num_rows, width = prompt_BL.shape
    rows_B = jnp.arange(num_rows)
    if is_guided:
        prompt_BL = jnp.concatenate([prompt_BL, jnp.full_like(prompt_BL, bos)])
        lengths_B = jnp.concatenate([lengths_B, jnp.ones_like(lengths_B)])
    positions_BL = jnp.broadcast_to(jnp.arange(width), prompt_BL.shape)
    segments_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
    cache = KVCache.create(decoder.config, len(prompt_BL), width + max_new_tokens)

    def read(ids: IntArray, positions: IntArray, segments: IntArray, cache: KVCache) -> tuple[jax.Array, KVCache]:
        found: Any = decoder.apply({"params": params}, ids, positions, segments, cache=cache)
        return found

    def logits_of(hidden_BD: jax.Array, guidance_B: jax.Array) -> jax.Array:
        logits_B1V: Any = decoder.apply({"params": params}, hidden_BD[:, None], method=Decoder.logits)
        asked_BV, unasked_BV = logits_B1V[:num_rows, 0], logits_B1V[num_rows:, 0]
        if not is_guided:
            return asked_BV
        guided_BV = unasked_BV + guidance_B[:, None] * (asked_BV - unasked_BV)
        return jnp.where(guidance_B[:, None] == 1, asked_BV, guided_BV)

    def with_twins(ids_B: jax.Array) -> jax.Array:
        return jnp.concatenate([ids_B, ids_B]) if is_guided else ids_B

    hidden_BLD, cache = read(prompt_BL, positions_BL, segments_BL, cache)

    Carry = tuple[jax.Array, jax.Array, GrammarState, KVCache, jax.Array, jax.Array, jax.Array]

    def unfinished(carry: Carry) -> jax.Array:
        step, _, grammar, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(tables.done_S[grammar.state_B])

    def emit(carry: Carry) -> Carry:
        step, hidden_BD, grammar, cache, seen_BV, tokens_BT, steps_B = carry
        state_B = grammar.state_B
        live_B = ~tables.done_S[state_B]
        allowed_BV = allowed_tokens(tables, grammar, limits_B - step)
        logits_BV = logits_of(hidden_BD, tables.guidance_S[state_B])
        logits_BV = repetition_penalised(logits_BV, seen_BV, tables.repetition_penalty_S[state_B])
        chosen_B = sample(
            logits_BV,
            allowed_BV,
            jax.vmap(jax.random.fold_in, (0, None))(keys_B, step),
            temperature_B=tables.temperature_S[state_B],
            top_k_B=tables.top_k_S[state_B],
            top_p_B=tables.top_p_S[state_B],
        )
        hidden_B1D, cache = read(
            with_twins(chosen_B)[:, None], (lengths_B + step)[:, None], jnp.ones((len(lengths_B), 1), jnp.int32), cache
        )
        return (
            step + 1,
            hidden_B1D[:, 0],
            advance(tables, grammar, chosen_B),
            cache,
            seen_BV.at[rows_B, chosen_B].set(True),
            tokens_BT.at[:, step].set(chosen_B),
            steps_B + live_B,
        )

    start = (
        jnp.int32(0),
        hidden_BLD[jnp.arange(len(lengths_B)), lengths_B - 1],
        grammar,
        cache,
        jnp.zeros((num_rows, tables.class_V.shape[0]), bool),
        jnp.zeros((num_rows, max_new_tokens), jnp.int32),
        jnp.zeros(num_rows, jnp.int32),
    )
    *_, tokens_BT, steps_B = jax.lax.while_loop(unfinished, emit, start)
    return tokens_BT, steps_B
