"""Answers to many prompts: batches of like length, each one call of a program that reads, decodes and cannot err.

Rows start at slot 0 of the cache and may have different lengths. Rows of different tasks decode together: the tables
of the grammar are arguments, and every row carries its own state. Shapes come from a few buckets, so a handful of
programs serves everything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import IntArray, PyTree
from aromni_jax.inference.grammar import Grammar, GrammarState, GrammarTables
from aromni_jax.inference.head import spans_of
from aromni_jax.inference.machine import Machine, begin, decode, extend
from aromni_jax.inference.sampling import row_keys
from aromni_jax.models.config import ModelConfig
from aromni_jax.models.unstacked import unstack
from aromni_jax.structs import Example, Task
from aromni_jax.vocab import JointVocab

LENGTH_BUCKETS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Prompts and answers are padded to the next of these (and to multiples of the last one)."""


@dataclasses.dataclass(frozen=True, eq=False)
class OmniModel:
    """A trained decoder ready to be asked: its shape, its parameters (`models.unstacked`) and their vocabulary.

    `max_positions` is the longest sequence it was made for, question and answer together; None where nobody knows.
    """

    config: ModelConfig
    params: PyTree
    vocab: JointVocab
    max_positions: int | None = None

    @classmethod
    def of(cls, config: ModelConfig, stacked: PyTree, vocab: JointVocab, max_positions: int | None = None) -> OmniModel:
        """From parameters as training has them; arrays of jax among them are used up."""
        return cls(config, unstack(config, stacked), vocab, max_positions)

    @property
    def machine(self) -> Machine:
        """What the compiled programs need to know of it."""
        return Machine(self.config, spans_of(self.vocab), tuple(self.vocab.special_ids.values()))


def bucket_of(length: int, buckets: tuple[int, ...] = LENGTH_BUCKETS) -> int:
    """Smallest bucket that holds `length`; above the largest, the next multiple of it."""
    fitting = [bucket for bucket in buckets if bucket >= length]
    return fitting[0] if fitting else -(-length // buckets[-1]) * buckets[-1]


def check_request(grammar: Grammar, prompt: Example, max_new_tokens: int) -> None:
    """ValueError for an empty prompt, or for fewer tokens than the shortest answer of its task has."""
    if not len(prompt.tokens_L):
        raise ValueError(f"prompt {prompt.key!r} is empty")
    shortest = grammar.shortest_answers.get(prompt.task, 0)
    if max_new_tokens < shortest:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} is too few for {prompt.task.command}: "
            f"the shortest answer has {shortest} tokens"
        )


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
        check_request(grammar, example, limit)
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
    tokens_BT, steps_B = answer(
        model.machine,
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


@functools.partial(jax.jit, static_argnames=("machine", "bos", "max_new_tokens", "is_guided"))
def answer(
    machine: Machine,
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
    """Reads the prompts and decodes until every row is done.

    With `is_guided` every row has a twin in the cache whose prompt is the beginning of sequence alone and whose answer
    is the row's own: what the model would say unasked. It serves states with guidance other than 1.

    Args:
      prompt_BL: row b holds `lengths_B[b]` tokens, at least one, then padding.
      limits_B: most tokens of each answer, at most `max_new_tokens` (the width of the result).

    Returns:
      tokens [B, max_new_tokens] and the number of tokens of each answer, end token included.
    """
    cache_length = prompt_BL.shape[1] + max_new_tokens
    state = begin(
        machine,
        grammar,
        limits_B,
        keys_B,
        cache_length=cache_length,
        max_new_tokens=max_new_tokens,
        is_guided=is_guided,
    )
    if is_guided:
        prompt_BL = jnp.concatenate([prompt_BL, jnp.full_like(prompt_BL, bos)])
        lengths_B = jnp.concatenate([lengths_B, jnp.ones_like(lengths_B)])
    state = decode(machine, params, tables, extend(machine, params, state, prompt_BL, lengths_B), max_new_tokens)
    return state.tokens_BT, state.step_B
