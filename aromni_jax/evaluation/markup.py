"""Pieces of HTML that the report is put together from; every text is escaped, every medium embedded."""

from __future__ import annotations

import base64
import html
import importlib.resources
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

_MEDIA_TYPES = {".png": "image/png", ".wav": "audio/wav"}


def escape(value: Any) -> str:
    """Text as HTML, quotes included."""
    return html.escape(str(value), quote=True)


def tag(name: str, *content: str, css: str = "") -> str:
    """`<name class="css">content</name>`; `content` is HTML."""
    return f'<{name} class="{css}">{"".join(content)}</{name}>' if css else f"<{name}>{''.join(content)}</{name}>"


def page(title: str, *body: str) -> str:
    """A whole page with the style of the house; `body` is HTML."""
    css = importlib.resources.files("aromni_jax.evaluation").joinpath("assets/report.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{tag("main", *body)}</body></html>\n'


def tile(value: str, name: str, note: str) -> str:
    """One number a reader looks for first, to stand in a `<div class="tiles">`; all three are text."""
    return tag("div", tag("b", escape(value)), tag("span", escape(name)), tag("small", escape(note)), css="tile")


def section(title: str, note: str, *content: str) -> str:
    """A titled section with a note in soft type; "" when it has no content."""
    return tag("h2", escape(title)) + tag("p", escape(note), css="note") + "".join(content) if any(content) else ""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of HTML cells; columns whose index is in `numbers` are set flush right. A cell may bring its own <td>."""

    def cell(kind: str, index: int, content: str) -> str:
        return content if content.startswith("<td") else tag(kind, content, css="number" if index in numbers else "")

    lines = [tag("tr", *(cell("th", i, escape(h)) for i, h in enumerate(headers)))] if any(headers) else []
    lines += [tag("tr", *(cell("td", i, content) for i, content in enumerate(row))) for row in rows]
    return tag("div", tag("table", *lines), css="scroll")


def _data_uri(path: pathlib.Path) -> str:
    return f"data:{_MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image(path: pathlib.Path, alt: str) -> str:
    """An <img> that carries the file in itself."""
    return f'<img alt="{escape(alt)}" src="{_data_uri(path)}">'


def audio(path: pathlib.Path) -> str:
    """An <audio> player that carries the file in itself."""
    return f'<audio controls preload="none" src="{_data_uri(path)}"></audio>'


def percent(value: float | None) -> str:
    """`37 %`, `4.2 %` with a space that does not break, a dash for None."""
    if value is None:
        return "–"
    return "∞" if math.isinf(value) else f"{100 * value:.{0 if abs(value) >= 0.1 or value == 0 else 1}f}\u00a0%"
