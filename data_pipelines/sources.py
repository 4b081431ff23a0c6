"""Where conversations come from: a JSONL manifest with text inline and media by path, read at random by line offset.

One line of a manifest:

    {"key": "caption/0001", "task": "caption", "split": "train", "group": "0001",
     "messages": [{"role": "user", "parts": [{"image": "pictures/0001.png"}]},
                  {"role": "assistant", "parts": [{"text": "a red circle"}]}],
     "facts": {"label": "red circle"}}

`task` and `messages` are needed. Paths are relative to the manifest. Without `key` the line number names the record.
Without `split` the hash of `group` (the key where there is none) decides, never the position, so that what shares a
picture or a speaker stays on one side. `facts` is carried through to evaluation untouched.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from aromni_jax.structs import Task, Text

MediaKind = Literal["image", "speech"]
TRAIN, HELDOUT = "train", "heldout"


class RecordError(ValueError):
    """A record that cannot be used: `stage` says where it failed (`parse`, `media`, `encode`, `length`)."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A picture or an utterance on disk."""

    kind: MediaKind
    path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class RawMessage:
    """A turn whose media are still files."""

    role: str
    parts: tuple[Text | MediaFile, ...]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One line of a manifest."""

    key: str
    task: Task
    messages: tuple[RawMessage, ...]
    facts: dict[str, Any]

    def media(self) -> Iterator[MediaFile]:
        """Every file the conversation needs, in order of appearance."""
        for message in self.messages:
            yield from (part for part in message.parts if isinstance(part, MediaFile))


class ManifestSource:
    """The conversations of one split of a manifest, by index. `split=""` takes every line.

    Only byte offsets are held in memory. A line that is not JSON belongs to every split: it is reported, not lost.

    Raises:
      ValueError: there is no manifest, or it has no line of this split.
    """

    def __init__(self, path: str | os.PathLike[str], *, split: str = "", heldout_fraction: float = 0.0) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no manifest {self.path}; give a JSONL file, one conversation per line")
        digest = hashlib.sha256()
        offsets, numbers = [], []
        found: set[str] = set()
        position = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    assigned = self._split_of(line, number, heldout_fraction) if split else split
                    found.add(assigned or "")
                    if assigned is None or assigned == split:
                        offsets.append((position, len(line)))
                        numbers.append(number)
                position += len(line)
        if not offsets:
            has = f"; it has {', '.join(sorted(found))}" if found else "; it is empty"
            raise ValueError(f"{self.path} has no conversation of split {split!r}{has}")
        self._offsets = np.array(offsets, np.int64)
        self._line_numbers = np.array(numbers, np.int64)
        self.fingerprint = digest.hexdigest()[:16]

    def _split_of(self, line: bytes, number: int, heldout_fraction: float) -> str | None:
        try:
            fields = json.loads(line)
            if "split" in fields:
                return str(fields["split"])
            return split_by_group(str(fields.get("group", fields.get("key", number))), heldout_fraction)
        except (ValueError, TypeError, AttributeError):
            return None

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        """`manifest.jsonl:17`: where record `index` stands."""
        return f"{self.path.name}:{self._line_numbers[index]}"

    def __getitem__(self, index: int) -> Conversation:
        """Reads record `index`; RecordError naming the line when it is not a conversation."""
        position, length = (int(value) for value in self._offsets[index])
        with self.path.open("rb") as file:
            file.seek(position)
            line = file.read(length)
        where = self.where(index)
        try:
            fields = json.loads(line)
            messages = tuple(self._message(message, where) for message in fields["messages"])
            task = Task.from_name(fields["task"])
            facts = fields.get("facts", {})
            if not messages or not isinstance(facts, dict):
                raise RecordError("parse", f"{where}: messages must be a non-empty list and facts a mapping")
            return Conversation(str(fields.get("key", where)), task, messages, facts)
        except RecordError:
            raise
        except KeyError as error:
            raise RecordError("parse", f"{where}: the line lacks the field {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise RecordError("parse", f"{where}: not a conversation: {error}") from error

    def _message(self, fields: dict[str, Any], where: str) -> RawMessage:
        parts: list[Text | MediaFile] = []
        for part in fields["parts"]:
            kinds = [kind for kind in ("text", "transcript", "image", "speech") if kind in part]
            if len(kinds) != 1 or not isinstance(part[kinds[0]], str):
                raise RecordError("parse", f"{where}: a part is one of text, transcript, image, speech; found {part!r}")
            kind = kinds[0]
            if kind in ("text", "transcript"):
                parts.append(Text(part[kind], is_transcript=kind == "transcript"))
            else:
                parts.append(MediaFile("image" if kind == "image" else "speech", self.path.parent / part[kind]))
        return RawMessage(str(fields["role"]), tuple(parts))

    def media_paths(self, kind: MediaKind) -> list[pathlib.Path]:
        """Every distinct file of `kind`, in order of first use: what a tokenizer is trained on."""
        return list(dict.fromkeys(file.path for i in range(len(self)) for file in self[i].media() if file.kind == kind))

    def texts(self) -> list[str]:
        """Every piece of text, in order: what a text tokenizer is trained on."""
        return [
            part.text
            for i in range(len(self))
            for message in self[i].messages
            for part in message.parts
            if isinstance(part, Text)
        ]


@functools.lru_cache(maxsize=65_536)
def split_by_group(group: str, heldout_fraction: float) -> str:
    """`heldout` for a fraction of all groups, by hash: adding records never moves an old one."""
    digest = hashlib.sha256(group.encode()).digest()
    return HELDOUT if int.from_bytes(digest[:8], "big") < heldout_fraction * 2**64 else TRAIN


def check_complete(file: MediaFile) -> None:
    """RecordError for a WAV file cut short: libsndfile reads it without complaint, so its header is checked."""
    if file.kind != "speech":
        return
    with file.path.open("rb") as opened:
        header = opened.read(8)
    declared, found = int.from_bytes(header[4:8], "little"), file.path.stat().st_size
    unknown_length = declared in (0, 0xFFFFFFFF)  # what a writer to a pipe leaves behind
    if header[:4] == b"RIFF" and not unknown_length and declared + 8 > found:
        raise RecordError("media", f"the sound file {file.path} is cut short: {found} of {declared + 8} bytes")
