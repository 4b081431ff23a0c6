"""Text tokenizers from the `tokenizer.json` files of published models, Chameleon's among them.

Such a file mixes pieces of text with tokens that steer a model: begin of sequence, pictures, reserved rows. Here a
string is text and nothing else: what it spells never becomes a control token, whatever the file says, so that a user
cannot write one. On every other string the ids are those of the Hugging Face library.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aromni_jax.tokenizers.text import checked_ids, utf8_bytes, write_text_config
from aromni_jax.vocab import JointVocab

if TYPE_CHECKING:
    import tokenizers

FILE_NAME = "tokenizer.json"
_BEGIN_IMAGE_NAME = "<racm3:break>"
"""What Chameleon's file calls its row of begin-of-image; a file that has it there has Chameleon's layout."""
_MODEL_DEFAULTS = {
    "byte_fallback": False,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "ignore_merges": False,
    "unk_token": None,
}


class HuggingFaceText:
    """Byte-pair encoding as a `tokenizer.json` describes it; its ids are the file's own, in [0, size).

    Control tokens are those that the file marks as special and, with `text_ids`, all outside [start, stop). `encode`
    gives none of them and adds none; `decode` gives "" for them. Where the file has no normalizer and adds no space in
    front, decode(encode(text)) == text. Source of the format: the `tokenizers` library (Apache-2.0).
    """

    def __init__(self, file: bytes, text_ids: tuple[int, int] | None = None) -> None:
        """`file`: the bytes of a `tokenizer.json`.

        Raises:
          ValueError: not such a file, no byte-pair encoding, one that cannot spell every byte, or no `tokenizers`.
        """
        self._file, self.text_ids = file, text_ids
        raw = _parsed(file)
        self._fingerprint = _fingerprint(raw, text_ids)
        vocab: dict[str, int] = raw["model"]["vocab"]
        ids = {**vocab, **{token["content"]: token["id"] for token in raw["added_tokens"]}}
        start, stop = text_ids or (0, max(ids.values()) + 1)
        special_ids = {token["id"] for token in raw["added_tokens"] if token["special"]}
        self._size = max(ids.values()) + 1
        self._control_ids = frozenset(i for i in ids.values() if i in special_ids or not start <= i < stop)
        self._encoder = _encoder(raw, ids, {name for name, i in ids.items() if i in self._control_ids})

    @property
    def size(self) -> int:
        """One more than the largest id of the file, control tokens included."""
        return self._size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what ids depend on: not of white space, key order, truncation, padding or post-processing."""
        return self._fingerprint

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all of them text; ValueError for lone surrogates."""
        utf8_bytes(text)
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        assert self._control_ids.isdisjoint(ids), "a control token came out of text"
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens and ids of no meaning are no text. Incomplete UTF-8 becomes U+FFFD.

        Raises:
          ValueError: an id outside [0, size).
        """
        spoken = [i for i in checked_ids(ids, self.size) if i not in self._control_ids]
        return self._encoder.decode(spoken, skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Writes `config.json` and the file as it was."""
        write_text_config(directory, "huggingface", text_ids=self.text_ids)
        (Path(directory) / FILE_NAME).write_bytes(self._file)

    @classmethod
    def load(cls, directory: str | Path) -> HuggingFaceText:
        """Reads what `save` wrote; FileNotFoundError or ValueError when it is not there or damaged."""
        text_ids = json.loads((Path(directory) / "config.json").read_text())["text_ids"]
        return cls((Path(directory) / FILE_NAME).read_bytes(), tuple(text_ids) if text_ids else None)

    @classmethod
    def from_published(cls, path: str | Path) -> HuggingFaceText:
        """Reads a published `tokenizer.json`, or that of a directory; Chameleon's layout is recognised.

        Raises:
          FileNotFoundError: no such file.
          ValueError: as for `HuggingFaceText`, naming the file.
        """
        path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            file, released = path.read_bytes(), JointVocab.released()
            raw = _parsed(file)
            ids = raw["model"]["vocab"] | {token["content"]: token["id"] for token in raw["added_tokens"]}
            is_chameleon = ids.get(_BEGIN_IMAGE_NAME) == released.begin_image
            return cls(file, (released.text.start, released.text.stop) if is_chameleon else None)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _parsed(file: bytes) -> dict[str, Any]:
    """The file with every field that is read here in its present form; ValueError when it is not such a file."""
    try:
        raw = json.loads(file)
        model, added = raw["model"], raw.get("added_tokens") or []
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise ValueError(f"the model is {model.get('type')!r}; only byte-pair encoding (BPE) is read")
        # Older files write a merge as one string; no piece of those has a space in it.
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        added = [{**token, "id": int(token["id"]), "special": bool(token["special"])} for token in added]
        return {**raw, "model": {**model, "type": "BPE", "merges": merges}, "added_tokens": added}
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a tokenizer.json: {type(error).__name__}: {error}") from error


def _fingerprint(raw: dict[str, Any], text_ids: tuple[int, int] | None) -> str:
    model = {name: value for name, value in raw["model"].items() if name != "dropout"}
    for name, default in _MODEL_DEFAULTS.items():
        model[name] = model.get(name) or default
    meaning = {
        "model": model,
        "added_tokens": sorted(raw["added_tokens"], key=lambda token: token["id"]),
        "text_ids": text_ids,
        **{name: raw.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")},
    }
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def _encoder(raw: dict[str, Any], ids: dict[str, int], control: set[str]) -> tokenizers.Tokenizer:
    """The library's tokenizer in which no string leads to a control token.

    Each keeps its id under a name that pieces of text cannot form, and loses the merges that made it. (The library's
    own switch, `encode_special_tokens`, leaves those merges, and tokens that are not marked as special.)
    """
    model = raw["model"]
    prefix = model.get("continuing_subword_prefix") or ""

    def name_of(token: str) -> str:
        return f"\0{ids[token]}" if token in control else token

    text_model = {
        **model,
        "dropout": None,
        "unk_token": name_of(model["unk_token"]) if model.get("unk_token") in ids else None,
        # Added tokens are looked up here first; with all of them inside, each gets the id that the file gives it.
        "vocab": {name_of(token): i for token, i in ids.items()},
        "merges": [
            (left, right)
            for left, right in model["merges"]
            if control.isdisjoint((left, right, left + right.removeprefix(prefix)))
        ],
    }
    _check_spells_bytes(raw, text_model)
    text = {
        **raw,
        "model": text_model,
        "added_tokens": [token for token in raw["added_tokens"] if token["content"] not in control],
        "truncation": None,
        "padding": None,
        "post_processor": None,
    }
    library = _library()
    try:
        return library.Tokenizer.from_str(json.dumps(text))
    except Exception as error:  # The library raises bare Exception.
        raise ValueError(f"not a tokenizer.json: {error}") from error


def _check_spells_bytes(raw: dict[str, Any], model: dict[str, Any]) -> None:
    parts = [part for name in ("normalizer", "pre_tokenizer") for part in _parts(raw.get(name))]
    if any(part.get("type") == "ByteLevel" for part in parts):
        needed = _byte_characters()
    elif model.get("byte_fallback") and not model.get("ignore_merges"):
        needed = frozenset(f"<0x{byte:02X}>" for byte in range(256))
    else:
        raise ValueError("only byte-level encodings and those that fall back to bytes are read: they spell any text")
    if missing := sorted(needed - model["vocab"].keys()):
        raise ValueError(f"the vocabulary has no text token for {len(missing)} of the 256 bytes ({missing[0]!r}, ...)")


def _parts(section: Any) -> Iterator[dict[str, Any]]:
    """A section of the file and, where it is a sequence, the sections in it."""
    if isinstance(section, dict):
        yield section
        for inner in (*section.get("pretokenizers", ()), *section.get("normalizers", ())):
            yield from _parts(inner)


@functools.cache
def _byte_characters() -> frozenset[str]:
    return frozenset(_library().pre_tokenizers.ByteLevel.alphabet())


def _library() -> Any:
    """The `tokenizers` library, which only these files need."""
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError("a tokenizer.json needs the `tokenizers` library: pip install tokenizers") from error
    return tokenizers
