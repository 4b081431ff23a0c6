"""`aromni generate` for dialogues: the turns of each are answered one after the other, over one cache."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from aromni_jax.inference.conversation import Conversation
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.policy import DecodingConfig, policy_for
from aromni_jax.structs import Part, Task, TokenEvent
from launch.generate_stream import take

if TYPE_CHECKING:
    from launch.loading import LoadedModel

DEFAULT_BUDGET = 4096
"""Tokens of a dialogue with a model that does not say how many positions it was made for."""


Answer = tuple[tuple[Part, ...], dict[str, Any]]
"""Its parts, and what `result.json` says of it: `latency`, whose seconds count from the question, and `turn`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """A question of the dialogue called `conversation`, and what the files of its answer are called."""

    conversation: str
    parts: tuple[Part, ...]
    stem: str


def answer_dialogues(
    loaded: LoadedModel,
    turns: Sequence[Turn],
    decoding: DecodingConfig,
    output: pathlib.Path,
    *,
    budget: int | None,
    answer_tokens: int,
    seed: int,
    is_shown: bool,
) -> list[Answer]:
    """Answers each turn with all that was said in its dialogue before, as far as `budget` tokens hold it.

    Dialogues are answered one after the other, so that there is one cache at a time, each as if it were alone. The
    sound of answers is in `output`; `turn` is the `inference.conversation.TurnRecord` with the budget and the most
    tokens of an answer, which are `answer_tokens`, but no more than half the budget.

    Raises:
      ValueError: a question does not fit into the budget; nothing is answered then.
    """
    grammar = compile_grammar(loaded.model.vocab, {Task.CHAT: policy_for(Task.CHAT, decoding)})
    budget = (loaded.model.max_positions or DEFAULT_BUDGET) if budget is None else budget
    most = min(answer_tokens, budget // 2)
    answers: dict[int, Answer] = {}
    for name in dict.fromkeys(turn.conversation for turn in turns):
        conversation = Conversation(
            loaded.model,
            grammar,
            loaded.bundle.text,
            loaded.templates,
            budget_tokens=budget,
            max_new_tokens=most,
            seed=seed,
        )
        if not answers:
            _check(conversation, turns)
        for number, turn in enumerate(turns):
            if turn.conversation != name:
                continue
            if is_shown:
                print(f"{turn.stem}: ", end="", flush=True)
            parts, latency = take(loaded, _runs(conversation, turn), output / f"{turn.stem}.wav", is_shown=is_shown)
            assert conversation.last_turn is not None
            cost = dataclasses.asdict(conversation.last_turn)
            about = {"conversation": name, "budget_tokens": budget, "answer_tokens": most}
            answers[number] = parts, {"latency": latency, "turn": about | cost}
    return [answers[number] for number in range(len(turns))]


def _check(conversation: Conversation, turns: Sequence[Turn]) -> None:
    """ValueError for a question of any of the dialogues, which all have the same budget, that does not fit."""
    for turn in turns:
        try:
            conversation.check(turn.parts)
        except ValueError as error:
            raise ValueError(f"{turn.stem}: {error}") from error


def _runs(conversation: Conversation, turn: Turn) -> Iterator[list[TokenEvent]]:
    """The answer, whose question is read when the first run is asked for: the clock of who listens counts it."""
    yield from conversation.ask(turn.parts)
