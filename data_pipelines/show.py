"""One packed row for a human: a table of segments and spans, and a page with pictures and sound."""

from __future__ import annotations

import base64
import html
import io
import os
import pathlib
import wave
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as PilImage

from aromni_jax.config import DataConfig, LossConfig
from aromni_jax.structs import Example, Modality, Role, Span, Task
from data_pipelines.mixing import Mixture
from data_pipelines.planned_rows import PlannedRows
from data_pipelines.records import TOKENIZERS_DIR, TokenDataset, read_vocab
from data_pipelines.weighting import to_targets, weight_table

if TYPE_CHECKING:
    from aromni_jax.tokenizers.bundle import TokenizerBundle

_COLOURS = {Modality.TEXT: "#e8eefc", Modality.IMAGE: "#e6f6e6", Modality.SPEECH: "#fdf0dc"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .3em .6em; text-align: left; vertical-align: top }
img { width: 128px; image-rendering: pixelated }
code { white-space: pre-wrap }
"""


class SpanView:
    """What spans of a data set's documents say: text, pictures and sound, with the tokenizers it was made with."""

    def __init__(self, data_dir: pathlib.Path, bundle: TokenizerBundle | None = None) -> None:
        """`bundle` is loaded from the data set where none is given; ValueError when it is no data set."""
        self.vocab = read_vocab(data_dir)
        self.bundle = bundle or _load_bundle(data_dir / TOKENIZERS_DIR)

    def content(self, example: Example, span: Span) -> str:
        """What a span says: decoded text, the name of a control token, or the number of codes."""
        rows = example.tokens_L[span.start : span.start + span.length]
        if span.modality != Modality.TEXT and span.part >= 0:
            return f"{span.length - 2} {span.modality.label} codes"
        names = {token_id: name for name, token_id in self.vocab.special_ids.items()}
        if len(rows) == 1 and int(rows[0]) in names:
            return f"<{names[int(rows[0])]}>"
        if self.bundle is None:
            return f"{len(rows)} text ids"
        return repr(self.bundle.text.decode(self.vocab.rows_to_text(rows)))

    def to_html(self, example: Example, span: Span) -> str:
        """The picture, the player, or the content as code where there is no tokenizer to decode it."""
        return self._media(example, span) or f"<code>{html.escape(self.content(example, span))}</code>"

    def _media(self, example: Example, span: Span) -> str:
        """The picture or the player of a media span, or nothing where there is no tokenizer to decode it."""
        if span.part < 0 or span.modality == Modality.TEXT or self.bundle is None:
            return ""
        rows = example.tokens_L[span.start + 1 : span.start + span.length - 1]
        if span.modality == Modality.IMAGE and self.bundle.image is not None:
            return picture_tag(self.bundle.image.decode(self.vocab.rows_to_image(rows)[None])[0])
        if span.modality == Modality.SPEECH and self.bundle.speech is not None:
            (waveform_T,) = self.bundle.speech.decode([self.vocab.rows_to_speech(rows)])
            return sound_tag(waveform_T, self.bundle.speech.sample_rate_hz)
        return ""


class RowView:
    """Row `row` of a data set packed at `sequence_length`, with the tokenizers that give its tokens back."""

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        *,
        row: int,
        sequence_length: int,
        loss: LossConfig,
        seed: int = 0,
        bundle: TokenizerBundle | None = None,
    ) -> None:
        """`bundle` is loaded from the data set where none is given.

        Raises:
          ValueError: not a data set, a row there is not, or a record longer than `sequence_length`.
        """
        path = pathlib.Path(data_dir)
        self.spans = SpanView(path, bundle)
        data = DataConfig({path.name or "data": {"path": str(path)}}, "examples", 0, 0)
        mixture = Mixture(data, self.spans.vocab)
        self.rows = PlannedRows.of(mixture, sequence_length, seed=seed)
        self.num_rows = self.rows.num_rows(0)
        if not 0 <= row < self.num_rows:
            raise ValueError(
                f"row {row} is not there; sequence_length {sequence_length} gives rows 0..{self.num_rows - 1}"
            )
        self.row, self.sequence_length = row, sequence_length
        self.stored = [stored for stored in self.rows.documents(0, row) if stored is not None]
        self.examples = [stored.example for stored in self.stored]
        self.table_TMR = weight_table(loss, mixture.counts_TMR)

    @property
    def title(self) -> str:
        used = sum(len(example.tokens_L) - 1 for example in self.examples)
        return (
            f"row {self.row} of {self.num_rows}: {len(self.examples)} documents, {used} of {self.sequence_length} "
            f"targets ({100 * used / self.sequence_length:.1f}%; all rows {100 * self.rows.fill():.2f}%)"
        )

    def weight(self, example: Example, span: Span) -> float:
        """Loss weight of the tokens of a span (its first token is no target where it begins the document)."""
        return float(self.table_TMR[example.task, span.modality, span.role])

    def to_text(self) -> str:
        """The table that the command prints."""
        lines = [self.title]
        for number, (stored, example) in enumerate(zip(self.stored, self.examples, strict=True), 1):
            weight = to_targets([stored], self.table_TMR).loss_weights_L.sum()
            lines += ["", f"segment {number}  {example.task.label}  {example.key}  weight {weight:.1f}"]
            lines.append(f"  {'start':>5} {'length':>6}  {'modality':<8} {'role':<10} {'weight':>6}  content")
            for span in example.spans:
                lines.append(
                    f"  {span.start:>5} {span.length:>6}  {span.modality.label:<8} {Role(span.role).name.lower():<10} "
                    f"{self.weight(example, span):>6.2f}  {self.spans.content(example, span)}"
                )
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """A page that needs nothing else: pictures and sound are inside it."""
        body = [f"<h1>{html.escape(self.title)}</h1>"]
        for number, example in enumerate(self.examples, 1):
            body.append(f"<h2>{number}. {example.task.label} <small>{html.escape(example.key)}</small></h2><table>")
            body.append(
                "<tr><th>start</th><th>length</th><th>modality</th><th>role</th><th>weight</th><th>content</th></tr>"
            )
            for span in example.spans:
                cells = [
                    str(span.start),
                    str(span.length),
                    span.modality.label,
                    Role(span.role).name.lower(),
                    f"{self.weight(example, span):.2f}",
                    self.spans.to_html(example, span),
                ]
                colour = _COLOURS[span.modality]
                body.append(f'<tr style="background:{colour}">' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
            body.append("</table>")
        return (
            f'<!doctype html><meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{_STYLE}</style>'
            + "".join(body)
        )


def sample_documents(
    data_dir: pathlib.Path, *, per_task: int, bundle: TokenizerBundle | None = None
) -> list[dict[str, Any]]:
    """Documents to look at, `per_task` of every task, evenly spaced over its records: {task, key, tokens, parts}.

    A part is what one message says in one modality: {role, html}. A damaged record has its error in place of parts.
    """
    view = SpanView(data_dir, bundle)
    dataset = TokenDataset(data_dir, view.vocab)
    samples: list[dict[str, Any]] = []
    for task in Task:
        records = np.flatnonzero(dataset.tasks_N == task)
        if not len(records):
            continue
        places = np.unique(np.linspace(0, len(records) - 1, per_task).astype(int))
        for index in records[places].tolist():
            sample = {"task": task.label, "tokens": int(dataset.lengths_N[index])}
            try:
                example = dataset[index].example
            except ValueError as error:
                damage = {"role": "damaged", "html": html.escape(str(error))}
                samples.append(sample | {"key": dataset.where(index), "parts": [damage]})
                continue
            parts = [
                {"role": span.role.name.lower(), "html": view.to_html(example, span)}
                for span in example.spans
                if span.part >= 0
            ]
            samples.append(sample | {"key": example.key, "parts": parts})
    return samples


def _load_bundle(path: pathlib.Path) -> TokenizerBundle | None:
    if not path.is_dir():
        return None
    from aromni_jax.tokenizers.bundle import TokenizerBundle

    return TokenizerBundle.load(path)


def picture_tag(pixels_HWC: np.ndarray) -> str:
    """An `<img>` with the picture inside, as PNG."""
    buffer = io.BytesIO()
    PilImage.fromarray(np.asarray(pixels_HWC)).save(buffer, "png")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def sound_tag(waveform_T: np.ndarray, rate_hz: int) -> str:
    """An `<audio>` player with the sound inside, as 16-bit WAV."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(np.round(np.clip(waveform_T, -1, 1) * 32767).astype("<i2").tobytes())
    return f'<audio controls src="data:audio/wav;base64,{base64.b64encode(buffer.getvalue()).decode()}"></audio>'
