"""The sides of a comparison: each in a process of its own, on the same cores, answering one question at a time."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

READY = "ready"
"""The question that every side answers first, as soon as it can be timed."""

Process = subprocess.Popen[str]


def available_cores(wanted: int | None, default: int | None = None) -> list[int]:
    """The first `wanted` of the cores this process may use; without a wish `default` many, or all.

    Raises:
      ValueError: not that many cores, or a system on which a process cannot choose its cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("both sides must run on the same cores, which only Linux lets a process choose")
    available = sorted(os.sched_getaffinity(0))
    count = wanted if wanted is not None else default or len(available)
    if not 1 <= count <= len(available):
        raise ValueError(f"--num_cores must be in 1..{len(available)}, not {count}")
    return available[:count]


def has_peer(is_left_out: bool) -> bool:
    """Whether the side in torch is wanted and installed."""
    return not is_left_out and all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def chosen_cases(wanted: Sequence[str] | None, cases: Sequence[str]) -> list[str]:
    """The cases that `--case` names, or all; ValueError for a name that is none of them."""
    for name in wanted or ():
        if name not in cases:
            raise ValueError(f"--case={name} is not measured; known: {', '.join(cases)}")
    return [name for name in cases if not wanted or name in wanted]


def versions(*libraries: str) -> str:
    """Python's version and those of installed libraries, for a table."""
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    return f"Python {platform.python_version()}; {shown}"


@contextlib.contextmanager
def started(module: str, arguments: list[str], environment: Mapping[str, str] | None = None) -> Iterator[Process]:
    """A side, run as `python -m MODULE ARGUMENTS`, until the context ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | dict(environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        ask(process, READY)
        yield process
    finally:
        process.kill()
        process.wait()


def ask(process: Process, question: str) -> Any:
    """The answer of a side, as JSON; ValueError when it stopped."""
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(question + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise ValueError("a side of the comparison stopped; its message is above")
    return json.loads(answer)


def answer_questions(answer: Callable[[str], Any]) -> None:
    """The other end of `ask`: one line of JSON for each line of standard input, until that closes."""
    # What libraries print must not stand between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        question = line.strip()
        print(json.dumps(True if question == READY else answer(question)), file=answers, flush=True)
