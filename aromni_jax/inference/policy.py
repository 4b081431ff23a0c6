"""Policies: what an answer is made of and how its tokens are chosen, in words; `grammar` makes tables of them."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Literal

from aromni_jax.config import Allowed, Fraction, NotNegative, Positive
from aromni_jax.structs import Task

Part = Literal["text", "transcript", "speech", "image", "end"]
# The tables of the grammar count in 32 bits, codes of all codebooks together.
Budget = Annotated[int, Allowed(lambda n: 1 <= n <= 10**6, "a whole number from 1 to 1000000")]
TopK = Annotated[int, Allowed(lambda n: 0 <= n < 2**31, "a whole number from 0 (all) to 2**31 - 1")]
TopP = Annotated[float, Allowed(lambda p: 0 < p <= 1, "a number above 0 and at most 1 (all)")]


def _check_numbers(settings: object) -> None:
    """ValueError with the first field that holds a number which its `Allowed` does not allow, as `name=value`."""
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} is not allowed; give a finite number")
        for kind in (hint, *typing.get_args(hint)):
            for allowed in getattr(kind, "__metadata__", ()):
                if value is not None and not allowed.test(value):
                    raise ValueError(f"{name}={value} is not allowed; give {allowed.words}")


@dataclasses.dataclass(frozen=True)
class Mode:
    """How tokens are chosen in one kind of segment: temperature 0 is greedy; top_k 0, top_p 1, min_p 0 keep all tokens.

    `min_p` drops tokens less likely than that share of the likeliest one (arXiv 2407.01082). `repetition_penalty` (1
    does nothing) bears on the pieces and codes that `repetition_scope` names: those of the whole answer so far, or
    those of the open segment; never on control tokens, because that would change what an answer is made of.
    `guidance` s takes logits u + s (f - u), with f from the whole prompt and u from the answer alone (classifier-free
    guidance, arXiv 2207.12598; 1 does nothing). Where the prompt holds a picture and `image_guidance` r is not s, they
    are u + r (i - u) + s (f - i), with i from the pictures of the prompt alone: how much an answer follows what it was
    shown, and how much what was said about it (arXiv 2211.09800, section 3.2). None is the same as `guidance`.
    """

    temperature: NotNegative = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: Fraction = 0.0
    repetition_penalty: Positive = 1.0
    repetition_scope: Literal["answer", "segment"] = "answer"
    guidance: NotNegative = 1.0
    image_guidance: NotNegative | None = None

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.repetition_scope not in ("answer", "segment"):
            raise ValueError(f"repetition_scope must be 'answer' or 'segment', not {self.repetition_scope!r}")

    @property
    def picture_guidance(self) -> float:
        """`image_guidance` as a number."""
        return self.guidance if self.image_guidance is None else self.image_guidance


GREEDY = Mode()


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How tokens are chosen in every kind of segment, whatever the task; `configs/decode.py` has the shipped ones.

    `text` is open-ended (plain text, replies in a chat), `recognition` says what is in a picture, a sound or a question
    (captions, speech to text, answers): the input decides its wording. Budgets count pieces of text and frames of
    speech; reaching one closes the segment.
    """

    text: Mode = Mode(temperature=1.0, min_p=0.05, repetition_penalty=1.1, repetition_scope="segment")
    recognition: Mode = GREEDY
    transcript: Mode = GREEDY
    speech: Mode = GREEDY
    image: Mode = Mode(temperature=1.0, top_p=0.96, guidance=3.07)
    text_budget: Budget = 512
    speech_budget_frames: Budget = 1500

    def __post_init__(self) -> None:
        _check_numbers(self)


@dataclasses.dataclass(frozen=True)
class Policy:
    """What an answer is made of and how its tokens are chosen.

    `start` lists the segments an answer may open with, `after` the segments (or "end") that may follow each one.
    Budgets count pieces of text and frames of speech; reaching one closes the segment.
    """

    start: tuple[Part, ...]
    after: Mapping[Part, tuple[Part, ...]]
    text: Mode = GREEDY
    transcript: Mode = GREEDY
    speech: Mode = GREEDY
    image: Mode = GREEDY
    text_budget: Budget = 512
    speech_budget_frames: Budget = 1500

    def __post_init__(self) -> None:
        _check_numbers(self)
        reachable, frontier = set(), list(self.start)
        while frontier:
            part = frontier.pop()
            if part == "end" or part in reachable:
                continue
            reachable.add(part)
            if part not in self.after:
                raise ValueError(f"policy says nothing about what follows {part!r}; add it to `after`")
            frontier.extend(self.after[part])
        if not self.start or not any("end" in self.after[part] for part in reachable):
            raise ValueError(f"no answer of this policy ever ends: start {self.start}, after {dict(self.after)}")

    @property
    def parts(self) -> set[Part]:
        """The kinds of segments that an answer may hold, and "end"."""
        return {part for options in (self.start, *self.after.values()) for part in options}

    def num_contexts(self, *, sees_picture: bool) -> int:
        """Rows of the cache that guidance costs for each answer: 1 is none; a prompt with a picture may need 3."""
        modes = {"text": self.text, "transcript": self.transcript, "speech": self.speech, "image": self.image}
        used = [mode for part, mode in modes.items() if part in self.parts]
        if sees_picture and any(mode.picture_guidance != mode.guidance for mode in used):
            return 3
        return 2 if any(mode.guidance != 1 for mode in used) else 1


MEDIA_DELIMITERS = 3
"""Control tokens of an answer that is one picture or utterance: its beginning, its end, the end of the answer."""
CHAT_AFTER: dict[Part, tuple[Part, ...]] = {
    "transcript": ("text", "speech", "image", "end"),
    "text": ("speech", "image", "end"),
    "speech": ("image", "end"),
    "image": ("end",),
}
"""The order of parts in a chat answer is the templates' order, so that every answer can be encoded as history."""


def policy_for(task: Task, config: DecodingConfig | None = None) -> Policy:
    """The policy of answers to `task`: the parts it asks for, chosen as `config` (ours by default) says."""
    config = config or DecodingConfig()
    start: tuple[Part, ...] = ("text",)
    after: Mapping[Part, tuple[Part, ...]] = {"text": ("end",)}
    if task == Task.TEXT_TO_IMAGE:
        start, after = ("image",), {"image": ("end",)}
    elif task == Task.SPEECH_TO_IMAGE:
        start, after = ("transcript", "image"), {"transcript": ("image",), "image": ("end",)}
    elif task == Task.TEXT_TO_SPEECH:
        start, after = ("speech",), {"speech": ("end",)}
    elif task == Task.CHAT:
        start, after = ("transcript", "text"), CHAT_AFTER
    is_recognition = task in (Task.CAPTION, Task.SPEECH_TO_TEXT, Task.QUESTION)
    return Policy(
        start=start,
        after=after,
        text=config.recognition if is_recognition else config.text,
        transcript=config.transcript,
        speech=config.speech,
        image=config.image,
        text_budget=config.text_budget,
        speech_budget_frames=config.speech_budget_frames,
    )
