"""`aromni generate` for dialogues: the turns of each are answered one after the other, over one cache."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from aromni_jax.inference.conversation import Conversation
from aromni_jax.structs import Part, Task, TokenEvent
from launch.generate_stream import take

if TYPE_CHECKING:
    from launch.generate import Answer, Asked
    from launch.loading import LoadedModel

DEFAULT_BUDGET = 4096
"""Tokens of a dialogue with a model that does not say how many positions it was made for."""


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """A question of the dialogue called `conversation`, and what the files of its answer are called."""

    conversation: str
    parts: tuple[Part, ...]
    stem: str


def answer_dialogues(
    loaded: LoadedModel, asked: Asked, output: pathlib.Path, *, budget: int | None, seed: int, is_shown: bool
) -> Iterator[Answer]:
    """Answers each turn with all that was said in its dialogue before, as far as `budget` tokens hold it.

    Dialogues are answered one after the other, so that there is one cache at a time, each as if it were alone. The
    sound of answers is in `output`. `turn` is the `inference.conversation.TurnRecord` with the budget and the most
    tokens of an answer, no more than half the budget; `latency` counts from the question. A question that does not
    fit has an `error` instead, and the dialogue goes on without it.

    Raises:
      ValueError: no dialogue has such a budget.
    """
    budget = (loaded.model.max_positions or DEFAULT_BUDGET) if budget is None else budget
    most = min(asked.limits[Task.CHAT], budget // 2)
    for name in dict.fromkeys(turn.conversation for turn in asked.turns.values()):
        conversation = Conversation(
            loaded.model,
            asked.grammar,
            loaded.bundle.text,
            loaded.templates,
            budget_tokens=budget,
            max_new_tokens=most,
            seed=seed,
        )
        for index, turn in asked.turns.items():
            if turn.conversation != name:
                continue
            try:
                conversation.check(turn.parts)
            except ValueError as error:
                yield index, (), {"error": str(error)}
                continue
            if is_shown:
                print(f"{turn.stem}: ", end="", flush=True)
            parts, latency = take(loaded, _runs(conversation, turn), output / f"{turn.stem}.wav", is_shown=is_shown)
            assert conversation.last_turn is not None
            cost = dataclasses.asdict(conversation.last_turn)
            about = {"conversation": name, "budget_tokens": budget, "answer_tokens": most}
            yield index, parts, {"latency": latency, "turn": about | cost}


def _runs(conversation: Conversation, turn: Turn) -> Iterator[list[TokenEvent]]:
    """The answer, whose question is read when the first run is asked for: the clock of who listens counts it."""
    yield from conversation.ask(turn.parts)
