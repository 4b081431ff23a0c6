"""What `aromni generate` is asked: one request on the command line, or one on each line of a file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import pathlib
from typing import Any

TASKS = ("text-to-image", "text-to-speech", "speech-to-text", "caption", "speech-to-image", "question", "chat")
_NEEDS = {
    "text-to-image": ("text",),
    "text-to-speech": ("text",),
    "speech-to-text": ("speech",),
    "caption": ("image",),
    "speech-to-image": ("speech",),
    "question": ("text",),
    "chat": (),
}
_MAY_HAVE = {"question": ("text", "image"), "chat": ("text", "image", "speech")}
_FIELDS = ("task", "text", "image", "speech", "conversation")


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing asked: a task and what goes with it, media as paths; of a chat also the dialogue it is a turn of."""

    task: str
    text: str | None = None
    image: str | None = None
    speech: str | None = None
    conversation: str | None = None

    def check(self, where: str) -> None:
        """ValueError naming `where` when the task is unknown or its inputs are not the ones it takes."""
        if self.task not in TASKS:
            near = difflib.get_close_matches(self.task, TASKS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"tasks: {', '.join(TASKS)}"
            raise ValueError(f"{where}: unknown task {self.task!r}; {hint}")
        given = [kind for kind in ("text", "image", "speech") if getattr(self, kind) is not None]
        needed, allowed = _NEEDS[self.task], _MAY_HAVE.get(self.task, _NEEDS[self.task])
        missing = [f"--{kind}" for kind in needed if kind not in given]
        extra = [f"--{kind}" for kind in given if kind not in allowed]
        if missing or not given:
            raise ValueError(
                f"{where}: {self.task} needs {', '.join(missing) or 'something to answer to, such as --text'}"
            )
        if extra:
            raise ValueError(f"{where}: {self.task} does not take {', '.join(extra)}")
        if self.conversation is not None and self.task != "chat":
            raise ValueError(f"{where}: only a chat is a turn of a conversation, not {self.task}")


@dataclasses.dataclass(frozen=True)
class Refused:
    """A line of `--input` that asks nothing that could be answered: what it holds, and what is wrong with it."""

    request: Any
    error: str

    @property
    def task(self) -> str:
        """The task it names, if it names one."""
        named = self.request.get("task") if isinstance(self.request, dict) else None
        return named if isinstance(named, str) else ""


def read_requests(args: argparse.Namespace) -> list[Request | Refused]:
    """The request of the command line, or what each line of `--input` asks; a bad line is `Refused` among the others.

    Raises:
      ValueError: a bad command line, or a file in which no line can be answered.
    """
    no_dialogue = f"--budget={args.budget} is for dialogues, and here is none: leave it out, or give "
    if not args.input:
        if args.budget is not None:
            raise ValueError(f'{no_dialogue}--input=FILE.jsonl with a "conversation" in its lines')
        if not args.task:
            raise ValueError(f"give a task ({', '.join(TASKS)}) or --input=FILE.jsonl")
        request = Request(_known(args.task), args.text, args.image, args.speech)
        request.check("command line")
        return [request]
    if args.text or args.image or args.speech:
        raise ValueError("give --text, --image and --speech in the lines of --input, not beside it")
    path = pathlib.Path(args.input)
    # Lines end with a line feed and nothing else: text may hold what Unicode takes for the end of a line.
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    requests = [_read_line(line, f"{path} line {number}", path.parent, args.task) for number, line in lines]
    refused = [request for request in requests if isinstance(request, Refused)]
    if len(refused) == len(requests):
        raise ValueError(refused[0].error if refused else f"{path} holds no requests")
    # What a refused line is a part of, nobody knows.
    if args.budget is not None and not any(isinstance(r, Refused) or r.conversation is not None for r in requests):
        raise ValueError(f'{no_dialogue}lines of {path} a "conversation"')
    return requests


def _known(task: str) -> str:
    """A task as it is called here, where it is named as in a manifest (`text_to_image`)."""
    hyphened = task.replace("_", "-")
    return hyphened if hyphened in TASKS else task


def _read_line(line: bytes, where: str, folder: pathlib.Path, task: str | None) -> Request | Refused:
    fields: Any = line.decode("utf-8", "replace")
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict) or not fields.keys() <= set(_FIELDS):
            raise ValueError(f"{line[:60]!r} has other fields" if isinstance(fields, dict) else "not an object")
        wrong = [name for name, value in fields.items() if not (value is None or isinstance(value, str))]
        if wrong:
            raise ValueError(f"{wrong[0]} must be a string, not {fields[wrong[0]]!r}")
    except ValueError as error:
        return Refused(fields, f"{where} is not a request with {', '.join(_FIELDS)}: {error}")
    fields["task"] = _known(fields.get("task") or task or "")
    # Media are named relative to the file that names them.
    media = {name: str(folder / fields[name]) for name in ("image", "speech") if fields.get(name) is not None}
    request = Request(**(fields | media))
    try:
        request.check(where)
    except ValueError as error:
        return Refused(fields, str(error))
    return request
