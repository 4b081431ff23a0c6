"""`aromni generate` for dialogues: the turns of each are answered one after the other, over one cache."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from aromni_jax.inference.conversation import Conversation
from aromni_jax.structs import Message, Task, TokenEvent
from launch.generate_stream import take

if TYPE_CHECKING:
    from launch.generate import Answer, Asked
    from launch.loading import LoadedModel

DEFAULT_BUDGET = 4096
"""Tokens of a dialogue with a model that does not say how many positions it was made for."""


def answer_dialogues(
    loaded: LoadedModel,
    asked: Asked,
    stems: list[str],
    output: pathlib.Path,
    budget: int | None,
    seed: int,
    *,
    is_shown: bool,
) -> Iterator[Answer]:
    """Answers each turn with all that was said in its dialogue before, as far as `budget` tokens hold it.

    Dialogues are answered one after the other, so that there is one cache at a time, each as if it were alone. The
    sound of answers is in `output`. `latency` counts seconds from the question; `turn` is the
    `inference.conversation.TurnRecord` with the budget and the most tokens of an answer, which are no more than half
    the budget. A question that the budget cannot hold gets an `error`, and its dialogue goes on.
    """
    budget = (loaded.model.max_positions or DEFAULT_BUDGET) if budget is None else budget
    most = min(asked.limits[Task.CHAT], budget // 2)
    for name in dict.fromkeys(asked.dialogues.values()):
        conversation = Conversation(
            loaded.model,
            asked.grammar,
            loaded.bundle.text,
            loaded.templates,
            budget_tokens=budget,
            max_new_tokens=most,
            seed=seed,
        )
        for index, question in asked.turns.items():
            if asked.dialogues[index] != name:
                continue
            try:
                conversation.check(question.parts)
            except ValueError as error:
                yield index, (), {"error": f"{stems[index]}: {error}"}
                continue
            if is_shown:
                print(f"{stems[index]}: ", end="", flush=True)
            path = output / f"{stems[index]}.wav"
            parts, latency = take(loaded, _runs(conversation, question), path, is_shown=is_shown)
            assert conversation.last_turn is not None
            about = {"conversation": name, "budget_tokens": budget, "answer_tokens": most}
            yield index, parts, {"latency": latency, "turn": about | dataclasses.asdict(conversation.last_turn)}


def _runs(conversation: Conversation, question: Message) -> Iterator[list[TokenEvent]]:
    """The answer, whose question is read when the first run is asked for: the clock of who listens counts it."""
    yield from conversation.ask(question.parts)
