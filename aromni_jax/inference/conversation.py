"""A dialogue over one key-value cache: every turn is read behind the last one, and nothing is read twice.

The cache holds at most `budget_tokens`: the opening of the sequence, then whole turns, each a question and its answer
as the chat template writes them, so that it always reads like the start of a training document. When it is full, the
oldest turns go, question and answer together, until the older turns fill at most half of the room that the open turn
leaves them; the newest of them goes only where it does not fit. What is kept moves up (`KVCache.without`), so that no
position reaches the budget, however long the dialogue. Half, and not only what is needed, because keys are rounded
each time they turn: this way a turn moves about once before it goes.

Answers come in runs, as `streaming.stream_tokens` gives them. One that is not read to its end (the iterator is closed
or left, or what consumes it fails) is closed as it stands: whole pieces of text, frames of speech and pictures stay, an
unfinished frame or picture is taken back, and the tokens that end the turn are read. Where a model ends its answer with
another token than the template does (eos, say), that one is replaced.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import IntArray
from aromni_jax.inference.decode import OmniModel, bucket_of, contexts_of
from aromni_jax.inference.grammar import Grammar
from aromni_jax.inference.machine import (
    PREFILL_TOKENS,
    DecodeState,
    Machine,
    begin,
    decode_jitted,
    extend_jitted,
)
from aromni_jax.inference.sampling import row_keys
from aromni_jax.inference.streaming import FIRST_RUN, LONGEST_RUN, made_since, run_lengths
from aromni_jax.structs import Example, Message, Part, Task, TokenEvent
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.prompts import Templates
from aromni_jax.tokenizers.text import TextTokenizer

READ_WIDTHS = (32, 128, PREFILL_TOKENS)
"""Tokens are read in chunks of the last width, the rest in the first that holds it: one program for each."""


@dataclasses.dataclass(frozen=True)
class TurnRecord:
    """What one turn cost: tokens of the question, tokens the model made, and what the cache holds and lost.

    `occupancy_tokens` counts the cache after the turn; `evicted_turns` and `evicted_tokens` what went for the turn's
    sake; `was_cut` says that the answer was closed before the model ended it.
    """

    number: int
    tokens_read: int
    tokens_made: int
    occupancy_tokens: int
    evicted_turns: int
    evicted_tokens: int
    was_cut: bool


@dataclasses.dataclass
class _Turn:
    """A turn in the cache: its number, its question, how many tokens that is, and the ids of its answer."""

    number: int
    question: Message
    question_tokens: int
    answer_ids: list[int]

    @property
    def tokens(self) -> int:
        return self.question_tokens + len(self.answer_ids)


class Conversation:
    """One dialogue with one model. Its memory, and the time of a turn, do not grow with the number of turns.

    Everything is compiled when it is made: no later turn waits for that. An answer is a function of the seed, the
    number of its turn and what the cache holds; how it is cut into runs changes nothing.

    Args:
      grammar: compiled for at least `Task.CHAT`.
      budget_tokens: slots of the cache: the most tokens that history, question and answer have together.
      max_new_tokens: most tokens of an answer; the grammar closes it in time.

    Raises:
      ValueError: a budget beyond the model's positions, or too few tokens for the shortest answer.
    """

    def __init__(
        self,
        model: OmniModel,
        grammar: Grammar,
        text_tokenizer: TextTokenizer,
        templates: Templates,
        *,
        budget_tokens: int,
        max_new_tokens: int,
        seed: int = 0,
    ) -> None:
        self._model, self._grammar, self._seed = model, grammar, seed
        self._text_tokenizer, self._templates = text_tokenizer, templates
        self._budget, self._max_new = budget_tokens, max_new_tokens
        start, vocab = grammar.start([Task.CHAT]), model.vocab
        self._check_sizes()
        opening, self._closing = self._scaffolding()
        self._num_opening = len(opening)
        self._turns: list[_Turn] = []
        self._open: _Turn | None = None
        self._asked = 0
        self._evicted_turns = self._evicted_tokens = 0
        self._record: TurnRecord | None = None
        self._state = begin(
            model.machine,
            start,
            np.array([max_new_tokens], np.int32),
            row_keys(seed, [0]),
            cache_length=budget_tokens,
            max_new_tokens=max_new_tokens,
            num_contexts=grammar.contexts[Task.CHAT][vocab.image is not None],
        )
        self._compile()
        self._read([opening], at=0)

    @property
    def occupancy_tokens(self) -> int:
        """Tokens in the cache: never more than the budget."""
        return self._num_opening + sum(turn.tokens for turn in self._turns)

    @property
    def messages(self) -> list[Message]:
        """The history that the cache holds, media as codes; of an answer in the making, what is there."""
        found = []
        for turn in self._turns:
            parts = joint.parts_of(turn.answer_ids, self._model.vocab, self._text_tokenizer)
            found += [turn.question, Message("assistant", parts)]
        return found

    @property
    def last_turn(self) -> TurnRecord | None:
        """The record of the last turn that is closed; None before there is one."""
        return self._record

    def check(self, parts: Sequence[Part]) -> Example:
        """A question as the first of a dialogue would be encoded, with the opening of its answer; nothing is read.

        Raises:
          ValueError: a question that is empty, that the template has no place for, or that the budget cannot hold
            together with an answer.
        """
        if not parts:
            raise ValueError("a question needs at least one part: text, a picture or speech")
        prompt = self._prompt(Message("user", tuple(parts)))
        length = len(prompt.tokens_L) - self._num_opening
        most = self._budget - self._num_opening - self._max_new
        if length > most:
            raise ValueError(
                f"this question has {length} tokens, but a budget of {self._budget} leaves {most} beside the "
                f"{self._num_opening} that open the sequence and {self._max_new} for the answer: shorten the question "
                "(a shorter text or sound, fewer pictures), allow fewer tokens for answers, or raise the budget"
            )
        return prompt

    def ask(
        self, parts: Sequence[Part], *, first_run: int = FIRST_RUN, longest_run: int = LONGEST_RUN
    ) -> Iterator[list[TokenEvent]]:
        """Reads a question behind all that was said, and answers it in runs of tokens.

        Args:
          parts: text, pictures and speech (as codes) in any order; the template puts them into its own.

        Raises:
          ValueError: a question that `check` refuses; the dialogue is then as it was, and can go on.
        """
        prompt = self.check(parts)
        own_L, *twins = contexts_of(prompt, self._model.vocab, len(self._state.place_R))
        question_L = own_L[self._num_opening :]
        self.close_answer()
        self._evicted_turns = self._evicted_tokens = 0
        self._make_room(len(question_L))
        self._state = dataclasses.replace(
            self._state,
            grammar=self._grammar.start([Task.CHAT]),
            step_B=jnp.zeros(1, jnp.int32),
            keys_B=row_keys(self._seed, [self._asked]),
            seen_BV=jnp.zeros_like(self._state.seen_BV),
        )
        self._read([question_L, *twins], at=self.occupancy_tokens)
        turn = self._open = _Turn(self._asked, Message("user", tuple(parts)), len(question_L), [])
        self._turns.append(turn)
        self._asked += 1
        return self._answer(turn, first_run, longest_run)

    def close_answer(self) -> None:
        """Ends the answer in the making, if there is one, with what it has; its iterator then gives nothing more."""
        turn = self._open
        if turn is None:
            return
        # What was made and not yet told, because the wait for it was interrupted, is in the cache too.
        untold, _ = made_since(self._model, self._grammar, self._state, len(turn.answer_ids))
        turn.answer_ids += [event.token_id for event in untold]
        made = len(turn.answer_ids)
        was_cut, taken_back, ending = self._end_of(turn)
        kept = made - taken_back
        del turn.answer_ids[kept:]
        if ending:
            self._make_room(len(ending))
            self._read([ending], at=self.occupancy_tokens)
            turn.answer_ids += ending
        self._open = None
        self._record = TurnRecord(
            number=turn.number,
            tokens_read=turn.question_tokens,
            tokens_made=made,
            occupancy_tokens=self.occupancy_tokens,
            evicted_turns=self._evicted_turns,
            evicted_tokens=self._evicted_tokens,
            was_cut=was_cut,
        )

    def _answer(self, turn: _Turn, first_run: int, longest_run: int) -> Iterator[list[TokenEvent]]:
        try:
            for run in run_lengths(first_run, longest_run):
                if self._open is not turn:
                    return
                # Room is made only when the cache is full, so that runs of any length evict at the same token.
                self._make_room(1)
                run = min(run, self._budget - self.occupancy_tokens)
                self._decode(run)
                events, is_done = made_since(self._model, self._grammar, self._state, len(turn.answer_ids))
                turn.answer_ids += [event.token_id for event in events]
                if is_done:
                    self.close_answer()
                yield events
        finally:
            if self._open is turn:
                self.close_answer()

    def _end_of(self, turn: _Turn) -> tuple[bool, int, list[int]]:
        """Whether the answer was cut, how many of its last tokens are taken back, and the ids that end the turn."""
        vocab, grammar = self._model.vocab, jax.device_get(self._state.grammar)
        kind, count = self._grammar.kinds[int(grammar.state_B[0])], int(grammar.count_B[0])
        if kind == "done":
            return (False, 0, []) if turn.answer_ids[-1:] == self._closing else (False, 1, self._closing)
        if kind == "transcript":
            return True, 0, [vocab.begin_response, *self._closing]
        if kind in ("speech", "image"):
            unit = len(vocab.speech) if kind == "speech" else vocab.tokens_per_image
            end = vocab.end_speech if kind == "speech" else vocab.end_image
            # With nothing whole in it, the token that began it goes too.
            return (True, count % unit, [end, *self._closing]) if count >= unit else (True, count + 1, self._closing)
        return True, 0, self._closing

    def _make_room(self, num_tokens: int) -> None:
        """Evicts the oldest turns where `num_tokens` more would not fit."""
        if self.occupancy_tokens + num_tokens <= self._budget:
            return
        older = [turn for turn in self._turns if turn is not self._open]
        kept = sum(turn.tokens for turn in older)
        room = self._budget - (self.occupancy_tokens - kept) - num_tokens
        assert room >= 0, "a turn is only begun when the budget holds it alone"
        gone = 0
        while kept > room // 2 and not (gone == len(older) - 1 and kept <= room):
            kept -= older[gone].tokens
            gone += 1
        count = sum(turn.tokens for turn in older[:gone])
        self._state = forget(self._model.machine, self._state, np.int32(self._num_opening), np.int32(count))
        del self._turns[:gone]
        self._evicted_turns += gone
        self._evicted_tokens += count

    def _read(self, contexts: Sequence[Sequence[int] | np.ndarray], *, at: int) -> None:
        """Reads the first of `contexts` into the cache from slot `at` on; the others anew into the rows of twins.

        A twin (`DecodeState`) knows one turn: its part of the question and the answer, not what was said before.
        """
        num_cached, widths = len(self._state.place_R), self._widths
        place_R = np.zeros(num_cached, np.int32)
        place_R[0] = at
        self._state = dataclasses.replace(self._state, place_R=jnp.asarray(place_R))
        longest = max(map(len, contexts))
        for first in range(0, longest, widths[-1]):
            width = bucket_of(min(longest - first, widths[-1]), widths)
            tokens_RL = np.full((num_cached, width), self._model.vocab.bos, np.int32)
            lengths_R = np.zeros(num_cached, np.int32)
            for row, ids in enumerate(contexts):
                chunk = ids[first : first + width]
                tokens_RL[row, : len(chunk)], lengths_R[row] = chunk, len(chunk)
            self._extend(tokens_RL, lengths_R)

    def _extend(self, tokens_RL: IntArray, lengths_R: IntArray) -> None:
        self._state = extend_jitted(self._model.machine, self._model.params, self._state, tokens_RL, lengths_R)

    def _decode(self, run: int) -> None:
        self._state = decode_jitted(self._model.machine, self._model.params, self._grammar.tables, self._state, run)

    @property
    def _widths(self) -> tuple[int, ...]:
        """The widths that a question within the budget can need."""
        return READ_WIDTHS[: 1 + sum(width < self._budget for width in READ_WIDTHS)]

    def _compile(self) -> None:
        """Runs every program on nothing, which leaves the state as it is."""
        nothing_R = np.zeros(len(self._state.place_R), np.int32)
        model = self._model
        for width in self._widths:
            self._extend(np.zeros((len(nothing_R), width), np.int32), nothing_R)
        self._state = forget(model.machine, self._state, np.int32(0), np.int32(0))
        self._decode(0)

    def _prompt(self, message: Message) -> Example:
        return joint.prompt([message], Task.CHAT, self._model.vocab, self._text_tokenizer, self._templates)

    def _scaffolding(self) -> tuple[list[int], list[int]]:
        """The ids before the first turn, and those that the template ends an answer with."""
        nothing = [Message("user", ()), Message("assistant", ())]
        whole = joint.encode(nothing, Task.CHAT, self._model.vocab, self._text_tokenizer, self._templates)
        ids, first = whole.tokens_L.tolist(), self._prompt(nothing[0]).tokens_L
        num_opening = sum(span.length for span in whole.spans if span.message < 0)
        return ids[:num_opening], ids[len(first) : len(ids) - len(self._templates.of(Task.CHAT).end)]

    def _check_sizes(self) -> None:
        shortest, positions = self._grammar.shortest_answers[Task.CHAT], self._model.max_positions
        if positions is not None and self._budget > positions:
            raise ValueError(
                f"a budget of {self._budget} tokens is more than the {positions} positions that the model was made "
                f"for; give at most {positions}"
            )
        if not shortest <= self._max_new < self._budget:
            raise ValueError(
                f"max_new_tokens={self._max_new} does not fit: the shortest answer has {shortest} tokens, and question "
                f"and answer share a budget of {self._budget}"
            )


@functools.partial(jax.jit, static_argnames=("machine",), donate_argnames=("state",))
def forget(machine: Machine, state: DecodeState, start: IntArray, count: IntArray) -> DecodeState:
    """Takes the `count` tokens from slot `start` on out of the first cached row, in place; what follows moves up."""
    caches = tuple(cache.without(0, start, count, machine.config.rope_theta) for cache in state.caches)
    return dataclasses.replace(state, caches=caches, place_R=state.place_R.at[0].add(-count))
