"""What a right answer is, task by task: cases, how they are grouped, and how answers are scored beside chance."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from aromni_jax.evaluation.wer import corpus_errors, words_of
from aromni_jax.structs import Image, Message, Speech, Task, Text

PICTURE_TASKS = (Task.TEXT_TO_IMAGE, Task.SPEECH_TO_IMAGE)
TEXT_TASKS = (Task.SPEECH_TO_TEXT, Task.CAPTION, Task.QUESTION)
SPOKEN_PROMPT_TASKS = (Task.SPEECH_TO_TEXT, Task.SPEECH_TO_IMAGE)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One held-out conversation: a question turn and the true answer turn, media with codes and as pixels or sound.

    `facts` is what the corpus says about it: kind, label, words, voice, holdout (which held-out set it belongs to).
    """

    key: str
    task: Task
    question: Message
    answer: Message
    facts: dict[str, Any]

    @property
    def words(self) -> str:
        """The words of the true answer, or, for made media, of the question; of the facts where neither has any."""
        texts = [part.text for turn in (self.answer, self.question) for part in turn.parts if isinstance(part, Text)]
        return texts[0] if texts else str(self.facts.get("words", ""))

    def picture(self) -> Image | None:
        """The first picture of the conversation, asked about or true answer."""
        return next((p for turn in (self.answer, self.question) for p in turn.parts if isinstance(p, Image)), None)

    def sound(self) -> Speech | None:
        """The first utterance of the conversation."""
        return next((p for turn in (self.answer, self.question) for p in turn.parts if isinstance(p, Speech)), None)


def group_of(case: Case) -> str:
    """What a case tests, in the words of the report: heard or unheard voices, digits or scenes, seen or new pairs."""
    holdout, kind = case.facts.get("holdout", ""), case.facts.get("kind", "")
    if holdout == "combination":
        return "new colour-shape pairs"
    if case.task in SPOKEN_PROMPT_TASKS:
        return "voices never heard" if holdout == "voice" else "heard voices"
    return {"digit": "digits", "scene": "scenes"}.get(kind, "all")


GROUPS = ("digits", "scenes", "heard voices", "voices never heard", "new colour-shape pairs", "all")
"""Every group, in the order of the report."""


def choose(cases: Sequence[Case], per_group: dict[Task, int]) -> list[Case]:
    """At most `per_group[task]` cases of each task and group, labels in turn; the same ones at every call."""
    by_group: dict[tuple[Task, str], dict[str, list[Case]]] = {}
    for case in sorted(cases, key=lambda case: hashlib.sha256(case.key.encode()).digest()):
        label = str(case.facts.get("label", ""))
        by_group.setdefault((case.task, group_of(case)), {}).setdefault(label, []).append(case)
    chosen = []
    for (task, _), by_label in sorted(by_group.items(), key=lambda entry: (entry[0][0], GROUPS.index(entry[0][1]))):
        # First one of every label, then the second of every label, ...
        turns = sorted(
            ((turn, label, case) for label, group in by_label.items() for turn, case in enumerate(group)),
            key=lambda entry: entry[:2],
        )
        chosen += [case for _, _, case in turns[: per_group.get(task, 0)]]
    return chosen


def names_the_thing(case: Case, told: str) -> bool:
    """Whether a caption contains what it must: the digit's word, or colour and shape."""
    wanted = case.facts["words"] if case.facts.get("kind") == "digit" else case.facts.get("label", case.words)
    return set(words_of(str(wanted))) <= set(words_of(told))


def says_the_same(case: Case, told: str) -> bool:
    """Whether an answer is the true one, word by word."""
    return words_of(told) == words_of(case.words)


def _others(answers: Sequence[Any]) -> list[Any]:
    """Each case gets the answer given to another one: what an answer is worth that ignores its question."""
    return list(np.roll(np.array(answers, object), len(answers) // 2 or 1))


@dataclasses.dataclass(frozen=True)
class Score:
    """One line of a results table; None where a number does not exist. `better` says which direction is good."""

    task: str
    group: str
    metric: str
    value: float
    n: int
    chance: float | None = None
    ceiling: float | None = None
    real: float | None = None
    better: str = "higher"


def word_error_score(cases: Sequence[Case], told: Sequence[str], task: str, group: str) -> Score:
    """Corpus word error rate; chance is that of the answers given to other cases."""
    truths = [case.words for case in cases]
    rate = corpus_errors(zip(truths, told, strict=True)).rate
    chance = corpus_errors(zip(truths, _others(told), strict=True)).rate
    return Score(task, group, "word error rate", rate, len(cases), chance, better="lower")


def share_score(
    cases: Sequence[Case], told: Sequence[str], right: Callable[[Case, str], bool], task: str, group: str, metric: str
) -> Score:
    """Share of answers that are `right`; chance is the share among answers given to other cases."""
    value = np.mean([right(case, answer) for case, answer in zip(cases, told, strict=True)])
    chance = np.mean([right(case, answer) for case, answer in zip(cases, _others(told), strict=True)])
    return Score(task, group, metric, float(value), len(cases), float(chance))


def judged_score(
    labels: Sequence[str],
    verdicts: Mapping[str, Sequence[str]],
    task: str,
    group: str,
    metric: str,
) -> Score:
    """Share of generated media whose verdict is the asked label.

    `verdicts` holds those on "generated" media and, where they exist, on the same cases' originals ("real") and on what
    the tokenizer alone makes of the originals ("ceiling"). Chance is what the best answer that is always the same gets.
    """

    def share(name: str) -> float | None:
        if name not in verdicts:
            return None
        return float(np.mean([label == v for label, v in zip(labels, verdicts[name], strict=True)]))

    generated = share("generated")
    assert generated is not None
    best_constant = max(Counter(labels).values()) / len(labels)
    return Score(task, group, metric, generated, len(labels), best_constant, share("ceiling"), share("real"))
