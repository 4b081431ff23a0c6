"""Prompt templates as data: which literals, control tokens and parts a turn of each task is made of, in which order.

A template file is JSON: for every task its instruction, the pieces of a user turn and of an assistant turn, and what
ends the conversation. An instruction may be a list of wordings: pre-tokenizing draws one for each record, inference
uses the first. A piece is one of

    "<name>"          a control token of the vocabulary (`aromni_jax.vocab.SPECIALS`)
    "{instruction}"   the task's instruction (the file's, unless the caller gives another)
    "{text}"          exactly one part of that kind: text, image, speech or transcript
    "{text*}"         all parts of that kind, in their order, or none
    anything else     literal text

Four sets are shipped: `quickstart` (short, for small models), `official-v0.1` (what the released weights were trained
on; METHOD section 3), `paper` (table 10 of arXiv 2601.17761) and `varied-v1` (eight wordings of every instruction).
The path of a JSON file is as good.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib.resources
import json
import pathlib
import re

from aromni_jax.structs import Task
from aromni_jax.vocab import SPECIALS

SHIPPED = ("quickstart", "official-v0.1", "paper", "varied-v1")
_SLOT = re.compile(r"\{(text|image|speech|transcript)(\*?)\}")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One element of a turn: `kind` is control, instruction, slot or literal; `value` its name, slot kind or text."""

    kind: str
    value: str
    many: bool = False


@dataclasses.dataclass(frozen=True)
class TaskTemplate:
    """Pieces of the turns of one task; `end` closes the conversation after its last assistant turn.

    `instructions` say the same in other words: training may use any of them, a prompt uses the first.
    """

    instructions: tuple[str, ...]
    user: tuple[Piece, ...]
    assistant: tuple[Piece, ...]
    end: tuple[Piece, ...]

    @property
    def instruction(self) -> str:
        """The wording of prompts; "" where the task has none."""
        return self.instructions[0] if self.instructions else ""


@dataclasses.dataclass(frozen=True)
class Templates:
    """A named set of task templates. `fingerprint` changes with any piece of any of them."""

    name: str
    tasks: dict[Task, TaskTemplate]
    fingerprint: str

    def of(self, task: Task) -> TaskTemplate:
        """The template of `task`; ValueError naming the tasks there are."""
        if task not in self.tasks:
            known = ", ".join(t.label for t in self.tasks)
            raise ValueError(f"templates {self.name!r} have no task {task.label!r}; they have {known}")
        return self.tasks[task]


def _parse_piece(text: str, where: str) -> Piece:
    if text == "{instruction}":
        return Piece("instruction", "")
    if match := _SLOT.fullmatch(text):
        return Piece("slot", match[1], bool(match[2]))
    if text.startswith("<") and text.endswith(">"):
        if text[1:-1] not in SPECIALS:
            near = difflib.get_close_matches(text[1:-1], SPECIALS, 1)
            hint = f"did you mean <{near[0]}>?" if near else f"known: {', '.join(SPECIALS)}"
            raise ValueError(f"{where}: unknown control token {text}; {hint}")
        return Piece("control", text[1:-1])
    if text.startswith("{") and text.endswith("}"):
        raise ValueError(f"{where}: unknown slot {text}; known: text, image, speech, transcript, instruction")
    return Piece("literal", text)


def _parse_instructions(raw: object, where: str) -> tuple[str, ...]:
    wordings = [raw] if isinstance(raw, str) else raw
    if not isinstance(wordings, list) or not wordings or not all(isinstance(wording, str) for wording in wordings):
        raise ValueError(f"{where}: the instruction is {raw!r}; give a string, or a list of strings that is not empty")
    if len(set(wordings)) < len(wordings):
        raise ValueError(f"{where}: an instruction stands twice in {wordings!r}; give each wording once")
    return tuple(wordings)


def parse_templates(text: str, where: str) -> Templates:
    """Templates from the JSON `text`; ValueError names `where` and what is wrong."""
    try:
        raw = json.loads(text)
        tasks = {}
        for label, body in raw["tasks"].items():
            place = f"{where}, task {label!r}"
            turns = {role: tuple(_parse_piece(p, place) for p in pieces) for role, pieces in body["turns"].items()}
            tasks[Task.from_name(label)] = TaskTemplate(
                _parse_instructions(body.get("instruction", ""), place),
                turns.get("user", ()),
                turns["assistant"],
                tuple(_parse_piece(p, place) for p in body["end"]),
            )
        canonical = json.dumps(raw, sort_keys=True)
        return Templates(raw["name"], tasks, hashlib.sha256(canonical.encode()).hexdigest()[:16])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is not a template file: {type(error).__name__}: {error}") from error


@functools.cache
def load_templates(name: str) -> Templates:
    """A shipped set by name, or a set from the JSON file at path `name`."""
    if name in SHIPPED:
        source = importlib.resources.files("aromni_jax.tokenizers") / "templates" / f"{name}.json"
        return parse_templates(source.read_text(encoding="utf-8"), name)
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(f"templates {name!r} are neither shipped ({', '.join(SHIPPED)}) nor a file")
    return parse_templates(path.read_text(encoding="utf-8"), name)
