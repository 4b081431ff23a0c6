"""The decoding automaton as plain data, state by state, and as a table to read: what may follow, and how it is chosen.

Everything is read back from the compiled tables, so that what is printed is what decodes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection

import numpy as np

from aromni_jax.inference.grammar import NEVER, Grammar
from aromni_jax.inference.policy import Mode
from aromni_jax.structs import Task


@dataclasses.dataclass(frozen=True)
class Move:
    """Tokens that lead from a state to `target` (its place in the list of states): "text 76..115", "eos 2".

    `when` is "always", or "below budget", or "at budget". `is_forced` says that then no other id is legal.
    """

    names: tuple[str, ...]
    ids: tuple[str, ...]
    target: int
    when: str
    is_forced: bool


@dataclasses.dataclass(frozen=True)
class StateDescription:
    """One state: its task and name, what is made there ("text", "image", ..., "done"), and how it goes on."""

    task: str
    name: str
    kind: str
    mode: Mode
    budget: int | None
    moves: tuple[Move, ...]


def describe(grammar: Grammar, tasks: Collection[Task] | None = None) -> list[StateDescription]:
    """The states of `tasks` (of all tasks without them), task by task, each from its start to its end."""
    wanted = [task.command for task in (grammar.start_states if tasks is None else tasks)]
    t = grammar.tables
    class_V, next_SC = np.asarray(t.class_V), np.asarray(t.next_SC)
    below_SC, at_SC = np.asarray(t.legal_SC), np.asarray(t.legal_at_budget_SC)
    ids_of = [np.flatnonzero(class_V == c) for c in range(len(grammar.class_names))]
    num_ids_C = np.array([len(ids) for ids in ids_of])
    task_S = [name.partition(": ")[0] for name in grammar.state_names]
    chosen = [s for s, task in enumerate(task_S) if task in wanted]
    chosen.sort(key=lambda s: (wanted.index(task_S[s]), grammar.kinds[s] == "done"))
    place = {s: i for i, s in enumerate(chosen)}
    described = []
    for s in chosen:
        budget = int(t.budget_S[s])
        moves: dict[tuple[int, str], list[int]] = {}
        for c in np.flatnonzero((below_SC[s] | at_SC[s]) & (num_ids_C > 0)):
            is_always = budget == NEVER or (below_SC[s, c] and at_SC[s, c])
            when = "always" if is_always else "below budget" if below_SC[s, c] else "at budget"
            moves.setdefault((place[int(next_SC[s, c])], when), []).append(int(c))
        described.append(
            StateDescription(
                task=task_S[s],
                name=grammar.state_names[s].removeprefix(f"{task_S[s]}: "),
                kind=grammar.kinds[s],
                mode=grammar.modes[s],
                budget=None if budget == NEVER else budget,
                moves=tuple(
                    Move(
                        tuple(grammar.class_names[c] for c in classes),
                        tuple(_span(ids_of[c]) for c in classes),
                        target,
                        when,
                        int(num_ids_C[(at_SC if when == "at budget" else below_SC)[s]].sum()) == 1,
                    )
                    for (target, when), classes in moves.items()
                ),
            )
        )
    return described


def _span(ids: np.ndarray) -> str:
    return f"{ids[0]}..{ids[-1]}" if len(ids) > 1 else str(ids[0])


def mode_words(mode: Mode) -> list[str]:
    """`sampled`, `temperature 1`, `top-p 0.96`, `guidance 3.07`; what does nothing is left out."""
    words = ["greedy"]
    if mode.temperature:
        words = ["sampled", f"temperature {mode.temperature:g}"]
        words += [f"top-k {mode.top_k}"] if mode.top_k else []
        words += [f"top-p {mode.top_p:g}"] if mode.top_p < 1 else []
        words += [f"min-p {mode.min_p:g}"] if mode.min_p else []
    if mode.repetition_penalty != 1:
        words.append(f"repetition penalty {mode.repetition_penalty:g} ({mode.repetition_scope})")
    words += [f"guidance {mode.guidance:g}"] if mode.guidance != 1 else []
    return words + ([f"of pictures {mode.picture_guidance:g}"] if mode.picture_guidance != mode.guidance else [])


def as_table(states: list[StateDescription]) -> str:
    """A table of text: a line for each way on, the state and its settings on the first of its lines."""
    lines = [("state", "legal ids", "next state", "when", "budget", "how a token is chosen")]
    for state in states:
        how = "" if state.kind == "done" else ", ".join(mode_words(state.mode))
        first = (f"{state.task}: {state.name}", "" if state.budget is None else str(state.budget), how)
        leads = itertools.chain([first], itertools.repeat(("", "", "")))
        for move, (name, budget, settings) in zip(state.moves, leads, strict=False):
            ids = ", ".join(f"{kind} {span}" for kind, span in zip(move.names, move.ids, strict=True))
            when = move.when + (", forced" if move.is_forced else "")
            lines.append((name, ids, states[move.target].name, when, budget, settings))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
