"""Answers to many prompts, with as many rows on the device as fit: when one is done, the next prompt takes its place.

Rows start at the beginning of the cache and may have different lengths. Rows of different tasks decode together: the
tables of the grammar are arguments, and every row carries its own state. Shapes come from a few buckets, and a call of
any number of prompts needs three programs: one that reads prompts for all rows, one for a few, and one that decodes.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aromni_jax.arrays import PyTree
from aromni_jax.inference.grammar import Grammar, GrammarState
from aromni_jax.inference.head import spans_of
from aromni_jax.inference.machine import DecodeState, Machine, begin, decode_jitted, extend_jitted
from aromni_jax.inference.sampling import row_keys
from aromni_jax.inference.slots import REFILL_TOKENS, refill_jitted
from aromni_jax.models.config import ModelConfig
from aromni_jax.models.unstacked import Read, load, unstack
from aromni_jax.structs import Example, Task
from aromni_jax.tokenizers import joint
from aromni_jax.vocab import JointVocab

Weights = Literal["float32", "bfloat16", "int8"]

LENGTH_BUCKETS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Prompts and answers are padded to the next of these (and to multiples of the last one)."""

ROWS_PER_REFILL = 8
"""One row in this many may stand idle before new prompts are read. With s rows and answers of n tokens, reading costs
about a token of every row (weights are read once more), so that s sqrt(2 / n) idle ones are best: an eighth at 128."""


@dataclasses.dataclass(frozen=True, eq=False)
class OmniModel:
    """A trained decoder ready to be asked: its shape, its parameters (`models.unstacked`), their vocabulary, and the
    mesh they are spread over (None: one device).

    `max_positions` is the longest sequence it was made for, question and answer together; None where nobody knows.

    Raises:
      ValueError: a vocabulary of another size than the model's.
    """

    config: ModelConfig
    params: PyTree
    vocab: JointVocab
    mesh: Mesh | None = None
    max_positions: int | None = None

    def __post_init__(self) -> None:
        # A table answers for ids that it does not have: nothing later would notice.
        if self.vocab.size != self.config.vocab_size:
            raise ValueError(
                f"the vocabulary has {self.vocab.size} rows, the model {self.config.vocab_size}: ids of the one mean "
                "nothing to the other; use the tokenizers that the model was trained with"
            )

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        stacked: PyTree,
        vocab: JointVocab,
        *,
        mesh: Mesh | None = None,
        weights: Weights | None = None,
        max_positions: int | None = None,
    ) -> OmniModel:
        """From parameters as training has them; arrays of jax among them are used up.

        With a mesh parameters and caches are split by the rules of `partitioning`; ValueError where it does not divide
        them. `weights` is the type of the matrices, by default the compute type of the model; "float32" and "bfloat16"
        are also what is computed in, "int8" leaves that as it is (`models.int8`).
        """
        config, is_int8 = _in_type(config, weights)
        return cls(config, unstack(config, stacked, mesh=mesh, is_int8=is_int8), vocab, mesh, max_positions)

    @classmethod
    def read(
        cls,
        config: ModelConfig,
        read: Read,
        vocab: JointVocab,
        *,
        mesh: Mesh | None = None,
        weights: Weights | None = None,
        max_positions: int | None = None,
    ) -> OmniModel:
        """From parameters that lie in files: one at a time is read, and placed as `of` places it."""
        config, is_int8 = _in_type(config, weights)
        return cls(config, load(config, read, mesh=mesh, is_int8=is_int8), vocab, mesh, max_positions)

    @property
    def machine(self) -> Machine:
        """What the compiled programs need to know of it."""
        return Machine(self.config, spans_of(self.vocab), tuple(self.vocab.special_ids.values()), self.mesh)


def _in_type(config: ModelConfig, weights: Weights | None) -> tuple[ModelConfig, bool]:
    """The model as it computes with weights of that type, and whether its matrices have 8 bits."""
    # What the backward pass keeps is training's affair, and the ways that spare its memory know no scales.
    config = dataclasses.replace(config, remat="none")
    if weights is None or weights == "int8":
        return config, weights == "int8"
    return dataclasses.replace(config, dtype=weights), False


def bucket_of(length: int, buckets: tuple[int, ...] = LENGTH_BUCKETS) -> int:
    """Smallest bucket that holds `length`; above the largest, the next multiple of it."""
    fitting = [bucket for bucket in buckets if bucket >= length]
    return fitting[0] if fitting else -(-length // buckets[-1]) * buckets[-1]


def check_request(model: OmniModel, grammar: Grammar, prompt: Example, max_new_tokens: int) -> int:
    """The most tokens that an answer to `prompt` may have: `max_new_tokens`, or what is left of the model's positions.

    Raises:
      ValueError: an empty prompt, ids that the vocabulary does not have, a task that the grammar does not have, or no
        room for the shortest answer of the task: below `max_new_tokens`, or behind a prompt that is too long.
    """
    length = len(prompt.tokens_L)
    if not length:
        raise ValueError(f"prompt {prompt.key!r} is empty")
    lowest, highest = int(np.min(prompt.tokens_L)), int(np.max(prompt.tokens_L))
    if lowest < 0 or highest >= model.vocab.size:
        raise ValueError(
            f"prompt {prompt.key!r} has the id {lowest if lowest < 0 else highest}, outside 0..{model.vocab.size - 1}; "
            "it was not encoded with the vocabulary of this model"
        )
    grammar.start_of(prompt.task)
    shortest = grammar.shortest_answers[prompt.task]
    if max_new_tokens < shortest:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} is too few for {prompt.task.command}: "
            f"the shortest answer has {shortest} tokens"
        )
    if model.max_positions is None:
        return max_new_tokens
    longest = model.max_positions - shortest
    if length > longest:
        raise ValueError(
            f"prompt {prompt.key!r} is too long: it has {length} tokens, the model {model.max_positions} positions, of "
            f"which the shortest answer to {prompt.task.command} takes {shortest}; shorten what is asked (a shorter "
            f"text or sound, fewer turns) to at most {longest} tokens"
        )
    return min(max_new_tokens, model.max_positions - length)


def num_contexts(grammar: Grammar, prompt: Example) -> int:
    """Rows of the cache that an answer to `prompt` takes (`Policy.num_contexts`)."""
    without, with_picture = grammar.contexts[prompt.task]
    return with_picture if joint.has_picture(prompt) else without


def contexts_of(prompt: Example, vocab: JointVocab, count: int) -> list[np.ndarray]:
    """What the first `count` rows of an answer read: the prompt, nothing of it, and its pictures alone."""
    return [prompt.tokens_L, joint.unconditional_prompt(vocab), joint.pictures_prompt(prompt, vocab)][:count]


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
      max_new_tokens: most tokens of an answer, for all tasks or for each one; no answer is longer than the model has
        positions left. None is cut off there: the grammar closes it in time.
      row_ids: numbers that, with `seed`, fix each row's randomness (its index by default).
      batch_size: most rows on the device at once; a row that is done makes room for the next prompt.
      progress: called with (answers done, answers in all) as answers become ready.

    Returns:
      int32 ids of each answer, from its first token to its end token (eos or end_model) included, in prompt order.

    Raises:
      ValueError: a request that cannot be answered (`check_request`), before any is.
    """
    limits = [
        check_request(model, grammar, p, max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[p.task])
        for p in prompts
    ]
    row_ids = list(range(len(prompts)) if row_ids is None else row_ids)
    answers: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    if not prompts:
        return answers
    slots = _Slots(model, grammar, prompts, limits, row_keys(seed, row_ids), batch_size)
    # The longest answers begin first: what begins last should not keep the others waiting.
    waiting = collections.deque(sorted(range(len(prompts)), key=lambda i: (-limits[i], -len(prompts[i].tokens_L))))
    num_done = 0
    while num_done < len(prompts):
        slots.fill(waiting)
        for i, answer in slots.run():
            answers[i] = answer
            num_done += 1
        if progress:
            progress(num_done, len(prompts))
    return answers


class _Slots:
    """The rows on the device, and which prompt each of them is answering."""

    def __init__(
        self,
        model: OmniModel,
        grammar: Grammar,
        prompts: Sequence[Example],
        limits: Sequence[int],
        keys_N: jax.Array,
        most: int,
    ) -> None:
        self._model, self._machine, self._grammar = model, model.machine, grammar
        self._prompts, self._limits, self._keys_N = prompts, limits, keys_N
        self._num = most if len(prompts) > most else bucket_of(len(prompts), (1, 2, 4, 8, 16, most))
        # Reading prompts stops all rows: to wait for a few costs less than to stop for each.
        self._few = max(1, self._num // ROWS_PER_REFILL)
        self._asked: list[int | None] = [None] * self._num
        self._contexts = max(num_contexts(grammar, prompt) for prompt in prompts)
        self._width = bucket_of(max(len(prompt.tokens_L) for prompt in prompts))
        self._room = bucket_of(max(len(p.tokens_L) + limit for p, limit in zip(prompts, limits, strict=True)))
        self._done_S = np.asarray(grammar.tables.done_S)
        self._state: DecodeState | None = None

    def fill(self, waiting: collections.deque[int]) -> None:
        """Gives the free rows the next prompts, if there are any."""
        free = [slot for slot, asked in enumerate(self._asked) if asked is None]
        pairs = [(slot, waiting.popleft()) for slot in free[: len(waiting)]]
        self._asked = [dict(pairs).get(slot, asked) for slot, asked in enumerate(self._asked)]
        if len(free) == self._num:
            self._begin(pairs)
            return
        for first in range(0, len(pairs), self._few):
            group = pairs[first : first + self._few]
            slots = np.pad([slot for slot, _ in group], (0, self._few - len(group)), constant_values=self._num)
            self._state = refill_jitted(
                self._machine,
                self._model.params,
                self._state,
                *self._questions([i for _, i in group], self._few),
                slots.astype(np.int32),
            )

    def _begin(self, pairs: list[tuple[int, int]]) -> None:
        """Reads the first prompts, or the next ones when all rows are free at once, where they are to stay."""
        self._state = None  # or two caches would be alive
        grammar, limit_B, keys_B, tokens_RL, lengths_R = self._questions([i for _, i in pairs], self._num)
        state = begin(
            self._machine,
            grammar,
            limit_B,
            keys_B,
            cache_length=self._room,
            max_new_tokens=bucket_of(max(self._limits)),
            num_contexts=self._contexts,
        )
        self._state = extend_jitted(
            self._machine, self._model.params, state, tokens_RL, lengths_R, chunk_tokens=REFILL_TOKENS
        )

    def _questions(
        self, chosen: list[int], count: int
    ) -> tuple[GrammarState, np.ndarray, jax.Array, np.ndarray, np.ndarray]:
        """Grammar, limits, keys, tokens and lengths of the chosen prompts and of idle rows, `count` of them together.

        A row without a prompt is one that is done: it costs its share of the batch and nothing else.
        """
        spare = count - len(chosen)
        tokens_CGL = np.full((self._contexts, count, self._width), self._model.vocab.bos, np.int32)
        lengths_CG = np.ones((self._contexts, count), np.int32)
        for row, i in enumerate(chosen):
            for context, tokens_L in enumerate(contexts_of(self._prompts[i], self._model.vocab, self._contexts)):
                tokens_CGL[context, row, : len(tokens_L)] = tokens_L
                lengths_CG[context, row] = len(tokens_L)
        idle = int(np.flatnonzero(self._done_S)[0])
        start = self._grammar.start([self._prompts[i].task for i in chosen])
        return (
            GrammarState(jnp.pad(start.state_B, (0, spare), constant_values=idle), jnp.pad(start.count_B, (0, spare))),
            np.pad(np.array([self._limits[i] for i in chosen], np.int32), (0, spare)),
            self._keys_N[np.pad(np.array(chosen, np.int32), (0, spare))],
            tokens_CGL.reshape(-1, self._width),
            lengths_CG.reshape(-1),
        )

    def run(self) -> list[tuple[int, np.ndarray]]:
        """Decodes until a few rows more are done; the prompts that they answer, and the answers."""
        num_busy = sum(asked is not None for asked in self._asked)
        enough = self._num - max(num_busy - self._few, 0)
        assert self._state is not None
        state = self._state = decode_jitted(
            self._machine, self._model.params, self._grammar.tables, self._state, self._state.tokens_BT.shape[1], enough
        )
        state_B, steps_B, tokens_BT = jax.device_get((state.grammar.state_B, state.step_B, state.tokens_BT))
        found = []
        for slot, i in enumerate(self._asked):
            if i is not None and self._done_S[state_B[slot]]:
                found.append((i, tokens_BT[slot, : steps_B[slot]].copy()))
                self._asked[slot] = None
        return found
