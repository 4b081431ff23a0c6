"""The joint vocabulary: which row of the embedding table means what. The only file that knows token ids as numbers.

A layout is data: spans of rows for text pieces, image codes and each speech codebook, and named control tokens. Any
tokenizers give a layout (`JointVocab.build`); the layout of the released AR-Omni weights is one instance (`released`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from aromni_jax.structs import Modality

SPECIALS: dict[str, Modality] = {
    "bos": Modality.TEXT,
    "pad": Modality.TEXT,
    "eos": Modality.TEXT,
    "unk": Modality.TEXT,
    "begin_image": Modality.IMAGE,
    "end_image": Modality.IMAGE,
    "begin_speech": Modality.SPEECH,
    "end_speech": Modality.SPEECH,
    "end_human": Modality.TEXT,
    "end_model": Modality.TEXT,
    "begin_transcript": Modality.TEXT,
    "begin_response": Modality.TEXT,
}
"""Every control token and the modality it belongs to. The order is the order of rows in a built layout."""


@dataclasses.dataclass(frozen=True)
class CodeSpan:
    """`size` consecutive rows from `start`; code c of the span is row start + c."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size

    def __contains__(self, token_id: int) -> bool:
        return self.start <= token_id < self.stop


@dataclasses.dataclass(frozen=True)
class JointVocab:
    """Spans and control tokens of one joint vocabulary, with the fingerprints of the tokenizers behind it.

    `size` counts all rows of the embedding table, rows of no meaning included. `text_offset` is what is added to an
    id of the text tokenizer to get a row (the released layout's text tokenizer already speaks rows: 0).
    `tokens_per_image` is 0 where there are no pictures; `speech` has one span per codebook, none where there is none.
    """

    size: int
    text: CodeSpan
    text_offset: int
    image: CodeSpan | None
    tokens_per_image: int
    speech: tuple[CodeSpan, ...]
    specials: tuple[tuple[str, int], ...]
    tokenizer_fingerprints: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        missing = sorted(set(SPECIALS) - {name for name, _ in self.specials})
        if missing:
            raise ValueError(f"vocabulary lacks the control tokens {', '.join(missing)}")
        owner = np.zeros(self.size + 1, np.int32)
        for span in (self.text, *([self.image] if self.image else []), *self.speech):
            if span.start < 0 or span.stop > self.size:
                raise ValueError(f"span {span} lies outside the vocabulary of {self.size} rows")
            owner[span.start : span.stop] += 1
        for name, token_id in self.specials:
            if not 0 <= token_id < self.size:
                raise ValueError(f"control token {name!r} = {token_id} lies outside the vocabulary of {self.size} rows")
            owner[token_id] += 1
        if np.max(owner) > 1:
            raise ValueError(f"row {int(np.argmax(owner))} of the vocabulary has more than one meaning")
        if (self.image is None) != (self.tokens_per_image == 0):
            raise ValueError(f"tokens_per_image is {self.tokens_per_image}, but image span is {self.image}")

    @classmethod
    def build(
        cls,
        *,
        text_size: int,
        image_codes: int = 0,
        tokens_per_image: int = 0,
        speech_codes: tuple[int, ...] = (),
        fingerprints: Mapping[str, str] | None = None,
        pad_to_multiple: int = 128,
    ) -> JointVocab:
        """Lays out control tokens, image codes, speech codebooks and text pieces, in this order.

        The embedding table is padded with meaningless rows to a multiple of `pad_to_multiple`, so that it shards.
        """
        specials = tuple((name, row) for row, name in enumerate(SPECIALS))
        row = len(specials)
        image = CodeSpan(row, image_codes) if image_codes else None
        row += image_codes
        speech = []
        for size in speech_codes:
            speech.append(CodeSpan(row, size))
            row += size
        text = CodeSpan(row, text_size)
        size = -(-text.stop // pad_to_multiple) * pad_to_multiple
        prints = tuple(sorted((fingerprints or {}).items()))
        return cls(size, text, text.start, image, tokens_per_image, tuple(speech), specials, prints)

    @classmethod
    def released(cls, fingerprints: Mapping[str, str] | None = None) -> JointVocab:
        """The layout of the released AR-Omni weights inside Chameleon's 65,536 rows (METHOD section 2).

        `fingerprints` are those of tokenizers that speak its codes, to be kept in one directory with it.
        """
        specials = {
            "bos": 0,
            "pad": 1,
            "eos": 2,
            "unk": 3,
            "end_image": 8196,
            "begin_image": 8197,
            "end_speech": 12820,
            "begin_speech": 12821,
            "end_human": 12830,
            "end_model": 12831,
            "begin_transcript": 12840,
            "begin_response": 12841,
        }
        text = CodeSpan(16384, 65536 - 16384)
        ordered = tuple((name, specials[name]) for name in SPECIALS)
        prints = tuple(sorted((fingerprints or {}).items()))
        return cls(65536, text, 0, CodeSpan(4, 8192), 1024, (CodeSpan(8724, 4096),), ordered, prints)

    def __getattr__(self, name: str) -> int:
        """`vocab.bos`, `vocab.end_image`, ...: rows of the control tokens."""
        if name in SPECIALS:
            return self.special_ids[name]
        raise AttributeError(name)

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """Control token name -> row."""
        return dict(self.specials)

    @functools.cached_property
    def modality_V(self) -> np.ndarray:
        """int8 `Modality` of every row; rows of no meaning count as text."""
        table = np.full(self.size, Modality.TEXT, np.int8)
        if self.image:
            table[self.image.start : self.image.stop] = Modality.IMAGE
        for span in self.speech:
            table[span.start : span.stop] = Modality.SPEECH
        for name, token_id in self.specials:
            table[token_id] = SPECIALS[name]
        return table

    @functools.cached_property
    def valid_mask_V(self) -> np.ndarray:
        """bool: True for rows that mean something; False for the padding of the table."""
        mask = np.zeros(self.size, bool)
        for span in (self.text, *([self.image] if self.image else []), *self.speech):
            mask[span.start : span.stop] = True
        mask[list(self.special_ids.values())] = True
        return mask

    def text_to_rows(self, text_ids: list[int]) -> np.ndarray:
        """Rows of text tokenizer ids; ValueError for an id the layout has no row for."""
        rows = np.asarray(text_ids, np.int32) + self.text_offset
        if rows.size and (np.min(rows) < self.text.start or np.max(rows) >= self.text.stop):
            bad = int(rows[(rows < self.text.start) | (rows >= self.text.stop)][0])
            raise ValueError(
                f"text id {bad - self.text_offset} has row {bad}, outside text rows {self.text.start}.."
                f"{self.text.stop - 1}; the text tokenizer is not the one this vocabulary was built for"
            )
        return rows

    def rows_to_text(self, rows: np.ndarray) -> list[int]:
        """Text tokenizer ids of text rows."""
        return [int(row) - self.text_offset for row in rows]

    def image_to_rows(self, codes_P: np.ndarray) -> np.ndarray:
        """Rows of image codes; ValueError unless there are exactly `tokens_per_image` codes, all in the codebook."""
        if self.image is None:
            raise ValueError("this vocabulary has no image codes; build it with an image tokenizer")
        codes_P = _checked_codes(codes_P, self.image.size, "image")
        if codes_P.shape != (self.tokens_per_image,):
            raise ValueError(
                f"an image has {codes_P.size} codes, this vocabulary's pictures have {self.tokens_per_image}"
            )
        return self.image.start + codes_P

    def speech_to_rows(self, codes_KU: np.ndarray) -> np.ndarray:
        """Rows of speech codes, frame by frame: codebooks of one frame stand next to each other ([K, U] -> [U * K])."""
        codes_KU = np.atleast_2d(codes_KU)
        if len(codes_KU) != len(self.speech):
            raise ValueError(f"speech has {len(codes_KU)} codebooks, this vocabulary has {len(self.speech)}")
        rows_KU = [span.start + _checked_codes(c, span.size, "speech") for span, c in zip(self.speech, codes_KU)]
        return np.stack(rows_KU, axis=1).reshape(-1).astype(np.int32)

    def rows_to_image(self, rows_P: np.ndarray) -> np.ndarray:
        """Image codes of image rows (inverse of `image_to_rows`)."""
        if self.image is None:
            raise ValueError("this vocabulary has no image codes")
        return np.asarray(rows_P, np.int32) - self.image.start

    def rows_to_speech(self, rows: np.ndarray) -> np.ndarray:
        """[U * K] rows -> [K, U] codes (inverse of `speech_to_rows`); an incomplete last frame is dropped."""
        num_codebooks = len(self.speech)
        rows_UK = np.asarray(rows, np.int32)[: len(rows) // num_codebooks * num_codebooks].reshape(-1, num_codebooks)
        return (rows_UK - np.array([span.start for span in self.speech], np.int32)).T

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> JointVocab:
        """Inverse of `to_json`; ValueError when the text is not a vocabulary."""
        try:
            raw: dict[str, Any] = json.loads(text)
            image = CodeSpan(**raw["image"]) if raw["image"] else None
            return cls(
                raw["size"],
                CodeSpan(**raw["text"]),
                raw["text_offset"],
                image,
                raw["tokens_per_image"],
                tuple(CodeSpan(**span) for span in raw["speech"]),
                tuple((name, row) for name, row in raw["specials"]),
                tuple((name, value) for name, value in raw["tokenizer_fingerprints"]),
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a joint vocabulary: {error}") from error

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits over layout and tokenizers: equal exactly when ids mean the same thing."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def check_fingerprint(self, found: str, where: str) -> None:
        """Raises ValueError when `found` (read from `where`) was made with another vocabulary."""
        if found != self.fingerprint:
            raise ValueError(
                f"{where} was made with vocabulary {found}, this run uses {self.fingerprint}: the same ids would mean "
                "other things. Use the tokenizers it was made with, or make it again with these"
            )


def _checked_codes(codes: np.ndarray, size: int, kind: str) -> np.ndarray:
    codes = np.asarray(codes, np.int32)
    if codes.size and (codes.min() < 0 or codes.max() >= size):
        raise ValueError(f"{kind} code {int(codes.max())} is outside the codebook 0..{size - 1}")
    return codes
