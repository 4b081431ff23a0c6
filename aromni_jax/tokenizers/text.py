"""Text tokenizers: SentencePiece BPE with byte fallback, and plain UTF-8 bytes. Both give any string back exactly.

Those of published models are in `huggingface_text.py`, behind the same interface.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

_SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space inside pieces; the character itself must therefore be spelled in bytes."""
_LONGEST_TRAINING_LINE = 2000


class TextTokenizer(Protocol):
    """Strings to ids in [0, size) and back; `fingerprint` is equal exactly when ids mean the same thing."""

    @property
    def size(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, directory: str | Path) -> None: ...


class ByteText:
    """One id per UTF-8 byte: needs no training, for synthetic data and golden tests."""

    size = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`; ValueError for lone surrogates."""
        return list(utf8_bytes(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Inverse of `encode`; bytes that are not UTF-8 become U+FFFD, ids above 255 are a ValueError."""
        return bytes(checked_ids(ids, self.size)).decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        write_text_config(directory, "bytes")


class SentencePieceText:
    """SentencePiece BPE in which every string survives: no normalisation, no added prefix, unknown characters as bytes.

    Source: Kudo and Richardson 2018 (the `sentencepiece` library, Apache-2.0).
    """

    def __init__(self, model: bytes) -> None:
        """`model`: the bytes of a SentencePiece model file; ValueError when they are not one."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from error
        self._model = model
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        if not all(self._processor.is_byte(piece) for piece in self._mark_ids):
            raise ValueError("the SentencePiece model has no byte fallback; train it with byte_fallback=true")

    @property
    def size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model file."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with decode(encode(text)) == text; ValueError for lone surrogates."""
        utf8_bytes(text)
        first, *rest = (self._processor.encode(run) for run in text.split(_SPACE_MARK))
        for run in rest:
            first += self._mark_ids + run
        return first

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; incomplete UTF-8 becomes U+FFFD, an id outside the vocabulary is a ValueError."""
        return self._processor.decode(checked_ids(ids, self.size))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        seed: int = 0,
        max_lines: int = 1_000_000,
        report: Callable[[str], None] = lambda line: None,
    ) -> SentencePieceText:
        """Learns at most `vocab_size` pieces (fewer when nothing is left to merge); equal input, equal model.

        Args:
          texts: any strings, read once; a corpus of more than `max_lines` lines is sampled uniformly with `seed`.
          vocab_size: 256 bytes, one unknown and one newline piece, and the corpus' characters are the least possible.
          max_lines: lines in memory at a time, each of at most 2,000 characters (a longer one counts as several).
          report: is told how many lines there were and how many are used.

        Raises:
          ValueError: no text, no line allowed, or a vocabulary too small for the characters of the corpus.
        """
        if max_lines < 1:
            raise ValueError(f"cannot train a text tokenizer on {max_lines} lines; give at least one")
        lines, num_lines = _sample(_training_lines(texts), max_lines, seed)
        if not lines:
            raise ValueError("cannot train a text tokenizer on an empty corpus; give at least one non-blank line")
        sampled = "all" if len(lines) == num_lines else f"{len(lines):,} of them, sampled with seed {seed}"
        report(f"{num_lines:,} lines of text; learning from {sampled}")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=0.9999,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n"],
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                unk_id=0,
                max_sentence_length=16 * _LONGEST_TRAINING_LINE,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            if needed := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
                # SentencePiece advises a flag of its own.
                raise ValueError(
                    f"a text tokenizer of {vocab_size} pieces has no room for bytes and the characters of this corpus; "
                    f"raise --vocab_size to {needed[1]} or more"
                ) from error
            raise ValueError(f"cannot train a text tokenizer of {vocab_size} pieces: {error}") from error
        return cls(model.getvalue())

    def save(self, directory: str | Path) -> None:
        write_text_config(directory, "sentencepiece")
        (Path(directory) / "tokenizer.model").write_bytes(self._model)

    @classmethod
    def load(cls, directory: str | Path) -> SentencePieceText:
        """Reads what `save` wrote; FileNotFoundError or ValueError when it is not there or not a model."""
        return cls((Path(directory) / "tokenizer.model").read_bytes())


def load_text_tokenizer(directory: str | Path) -> TextTokenizer:
    """The text tokenizer saved in `directory`, of whichever kind; ValueError for a kind this version does not know."""
    path = Path(directory) / "config.json"
    kind = json.loads(path.read_text()).get("kind")
    if kind == "bytes":
        return ByteText()
    if kind == "sentencepiece":
        return SentencePieceText.load(directory)
    if kind == "huggingface":
        from aromni_jax.tokenizers.huggingface_text import HuggingFaceText

        return HuggingFaceText.load(directory)
    raise ValueError(f"{path}: unknown kind of text tokenizer {kind!r}; known: bytes, sentencepiece, huggingface")


def write_text_config(directory: str | Path, kind: str, **settings: Any) -> None:
    """Makes `directory` and its `config.json`, which tells `load_text_tokenizer` what else is there."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / "config.json").write_text(json.dumps({"kind": kind, **settings}) + "\n")


def utf8_bytes(text: str) -> bytes:
    """`text` as UTF-8; ValueError naming the first character that has none (a lone surrogate)."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not valid Unicode at character {error.start}: {text[error.start]!r}") from error


def checked_ids(ids: Sequence[int], size: int) -> list[int]:
    """`ids` as Python integers; ValueError naming the first that is outside [0, size)."""
    checked = [int(i) for i in ids]
    bad = [i for i in checked if not 0 <= i < size]
    if bad:
        raise ValueError(f"text id {bad[0]} is outside the tokenizer's 0..{size - 1}")
    return checked


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    # Newlines are a piece of their own, and the space mark must never be learnt as part of a word.
    for text in texts:
        for line in text.replace(_SPACE_MARK, " ").split("\n"):
            for start in range(0, len(line), _LONGEST_TRAINING_LINE):
                if chunk := line[start : start + _LONGEST_TRAINING_LINE].replace("\0", ""):
                    yield chunk


def _sample(lines: Iterator[str], limit: int, seed: int) -> tuple[list[str], int]:
    """At most `limit` lines, and how many there were. Every line is kept with the same chance, in one pass."""
    kept: list[str] = []
    generator = random.Random(seed)
    seen = 0
    for seen, line in enumerate(lines, start=1):
        if seen <= limit:
            kept.append(line)
        elif (slot := generator.randrange(seen)) < limit:
            kept[slot] = line
    return kept, seen
