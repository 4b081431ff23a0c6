"""`aromni generate` for dialogues: the turns of each are answered one after the other, over one cache."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from aromni_jax.inference.conversation import Conversation
from aromni_jax.structs import Message, Part, Task, TokenEvent
from aromni_jax.tokenizers import joint
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


@dataclasses.dataclass(frozen=True)
class DialogueSizes:
    """Tokens that a dialogue remembers, and the most that an answer has of them: half, so that a question fits too."""

    budget: int
    answer: int


def dialogue_sizes(loaded: LoadedModel, limit: int, budget: int | None) -> DialogueSizes:
    """The sizes of dialogues whose answers have at most `limit` tokens, with the budget of `--budget`.

    Raises:
      ValueError: more than the model's positions, or too few for one turn.
    """
    positions = loaded.model.max_positions
    if budget is None:
        budget = positions or DEFAULT_BUDGET
    empty = joint.prompt([Message("user", ())], Task.CHAT, loaded.model.vocab, loaded.bundle.text, loaded.templates)
    shortest = len(empty.tokens_L) + 1
    least = shortest + min(limit, shortest)
    if budget < least:
        raise ValueError(
            f"--budget={budget} holds no turn: {len(empty.tokens_L)} tokens of the template, a question, and an answer "
            f"of up to half the budget; give at least {least}"
        )
    if positions is not None and budget > positions:
        raise ValueError(f"--budget={budget} is more than the {positions} positions of the model; give at most that")
    return DialogueSizes(budget, min(limit, budget // 2))


def answer_dialogues(
    loaded: LoadedModel, asked: Asked, output: pathlib.Path, *, seed: int, is_shown: bool
) -> Iterator[Answer]:
    """Answers each turn with all that was said in its dialogue before, as far as the budget holds it.

    Dialogues are answered one after the other, so that there is one cache at a time, each as if it were alone. The
    sound of answers is in `output`. `turn` is the `inference.conversation.TurnRecord` with the `DialogueSizes`;
    `latency` counts from the question. A question that does not fit has an `error` instead, and the dialogue goes on
    without it.
    """
    assert asked.sizes is not None
    sizes = asked.sizes
    for name in dict.fromkeys(turn.conversation for turn in asked.turns.values()):
        conversation = Conversation(
            loaded.model,
            asked.grammar,
            loaded.bundle.text,
            loaded.templates,
            budget_tokens=sizes.budget,
            max_new_tokens=sizes.answer,
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
            about = {"conversation": name, "budget_tokens": sizes.budget, "answer_tokens": sizes.answer}
            yield index, parts, {"latency": latency, "turn": about | cost}


def _runs(conversation: Conversation, turn: Turn) -> Iterator[list[TokenEvent]]:
    """The answer, whose question is read when the first run is asked for: the clock of who listens counts it."""
    yield from conversation.ask(turn.parts)
