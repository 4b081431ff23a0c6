"""The decoding automaton as a drawing: one line of states for each task, arcs for what leads from one to another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from aromni_jax.evaluation.markup import escape
from aromni_jax.inference.description import Move, StateDescription, mode_words

BOX, PITCH, LINE, MARGIN = 206, 236, 15, 24
ARC, STEP = 26, 30
"""Height of an arc is ARC, and STEP more for every state from its beginning to its end."""
Arc = tuple[int, int, Move]
"""(column where it begins, column where it ends, what it stands for)."""
COLOURS = {"text": "#2f6db3", "transcript": "#8a57a8", "speech": "#c4632c", "image": "#3f8f5b", "done": "#6b7280"}
STYLE = (
    "text{font:11px ui-sans-serif,system-ui,sans-serif;fill:#22242a}.name{font-weight:600;font-size:12.5px}"
    ".task{font-size:17px;font-weight:600}.soft{fill:#6a6d76}"
    ".arc{fill:none;stroke:#6a6d76;stroke-width:1.2;marker-end:url(#arrow)}.late{stroke-dasharray:4 4}"
    ".label{text-anchor:middle;paint-order:stroke;stroke:#fff;stroke-width:4px}"
)
ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0,0.5 L8,4 L0,7.5 z" fill="#6a6d76"/></marker></defs>'
)


def automaton_svg(states: Sequence[StateDescription]) -> str:
    """A whole SVG file of the states that `describe` gives.

    Arcs above lead on, arcs below lead back or repeat; a dashed one is open only once the budget of its state is used
    up. Pointing at a label shows the ids of its tokens.
    """
    out, top, width = [], float(MARGIN), 0
    for task, lane in itertools.groupby(range(len(states)), key=lambda index: states[index].task):
        order = _order(states, list(lane))
        drawn, height = _lane(states, order, task, top)
        out += drawn
        top += height
        width = max(width, 2 * MARGIN + PITCH * len(order))
    size = f'viewBox="0 0 {width} {top:.0f}" width="{width}" height="{top:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{ARROW}'
    return "\n".join([head, f'<rect width="{width}" height="{top:.0f}" fill="#fff"/>', *out, "</svg>"]) + "\n"


def _order(states: Sequence[StateDescription], lane: list[int]) -> list[int]:
    """From left to right: before everything it leads to, where nothing leads back."""
    found: list[int] = []
    seen: set[int] = set()

    def visit(index: int) -> None:
        seen.add(index)
        for move in states[index].moves:
            if move.target not in seen:
                visit(move.target)
        found.append(index)

    for index in lane:
        if index not in seen:
            visit(index)
    return found[::-1]


def _lane(states: Sequence[StateDescription], order: list[int], task: str, top: float) -> tuple[list[str], float]:
    """The SVG of one task's states, and how high it is."""
    column = {index: place for place, index in enumerate(order)}
    arcs = [(column[i], column[move.target], move) for i in order for move in states[i].moves]
    arcs = [arc for arc in arcs if states[order[arc[0]]].kind != "done"]
    onward = [arc for arc in arcs if arc[1] > arc[0]]
    back = [arc for arc in arcs if arc[1] <= arc[0]]
    lines = {index: _lines(states[index]) for index in order}
    high = 34 + LINE * max(map(len, lines.values()))
    room = 44 + max((ARC + STEP * (b - a) for a, b, _ in onward), default=0) * 0.75
    below = 30 + max((ARC + STEP * (a - b) for a, b, _ in back), default=0) * 0.75 + LINE
    y = top + room
    out = [f'<text class="task" x="{MARGIN}" y="{top + 14:.1f}">{escape(task)}</text>']
    for index in order:
        x, colour = MARGIN + PITCH * column[index], COLOURS[states[index].kind]
        out.append(
            f'<rect x="{x}" y="{y:.1f}" width="{BOX}" height="{high}" rx="8" fill="{colour}" fill-opacity="0.09" '
            f'stroke="{colour}" stroke-width="1.4"/><text class="name" x="{x + 12}" y="{y + 21:.1f}">'
            f"{escape(states[index].name)}</text>"
        )
        out += [
            f'<text class="soft" x="{x + 12}" y="{y + 23 + LINE * number:.1f}">{escape(line)}</text>'
            for number, line in enumerate(lines[index], 1)
        ]
    drawn = [_arc(arc, onward, y, -1) for arc in onward] + [_arc(arc, back, y + high, 1) for arc in back]
    # Labels lie over the lines of all arcs.
    out += [path for path, _ in drawn] + [label for _, label in drawn]
    return out, room + high + below


def _lines(state: StateDescription) -> list[str]:
    if state.kind == "done":
        return ["nothing but padding"]
    budget = []
    if state.budget is not None:
        # Where the way out opens only at the budget, the segment has exactly that length.
        ways_out = {move.when for move in state.moves if "end_image" in move.names}
        budget = [f"{'exactly' if ways_out == {'at budget'} else 'at most'} {state.budget} tokens"]
    return mode_words(state.mode) + budget


def _arc(arc: Arc, others: list[Arc], y: float, up: int) -> tuple[str, str]:
    """One arc and its label; a long one begins and ends outside the shorter ones, so that they do not cross."""
    start, end, move = arc
    leaving = sorted({b for a, b, _ in others if a == start}, reverse=True)
    arriving = sorted({a for a, b, _ in others if b == end}, reverse=True)
    from_x = MARGIN + PITCH * start + BOX * (0.55 + 0.4 * (leaving.index(end) + 0.5) / len(leaving))
    to_x = MARGIN + PITCH * end + BOX * (0.05 + 0.4 * (arriving.index(start) + 0.5) / len(arriving))
    reach = ARC + STEP * abs(end - start)
    bend = y + up * reach
    css = "arc late" if move.when == "at budget" else "arc"
    ids = ", ".join(f"{name} {span}" for name, span in zip(move.names, move.ids, strict=True))
    label_y = y + up * (0.75 * reach + 4) + (8 if up > 0 else 0)
    words = ", ".join(move.names) + (" (forced)" if move.is_forced else "")
    return (
        f'<path class="{css}" d="M{from_x:.1f},{y:.1f} C{from_x:.1f},{bend:.1f} {to_x:.1f},{bend:.1f} '
        f'{to_x:.1f},{y:.1f}"/>',
        f'<text class="label" x="{(from_x + to_x) / 2:.1f}" y="{label_y:.1f}">{escape(words)}'
        f"<title>{escape(ids)}; {move.when}</title></text>",
    )
