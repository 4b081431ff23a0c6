"""Where conversations come from: what all sources share, and the JSONL manifest with text inline and media by path.

Folder layouts are in `layouts`, archives and plain text in `containers`, rows of columns in `tables` and `tfds_source`;
how one is chosen is in `source_kinds`, how URLs are read in `places`.
One line of a manifest:

    {"key": "caption/0001", "task": "caption", "split": "train", "group": "0001",
     "messages": [{"role": "user", "parts": [{"image": "pictures/0001.png"}]},
                  {"role": "assistant", "parts": [{"text": "a red circle"}]}],
     "facts": {"label": "red circle"}}

`task` and `messages` are needed. Media are URLs or paths relative to the manifest. Without `key` the line number names
the record. Without `split` the hash of `group` (the key where there is none) decides, never the position, so that what
shares a picture or a speaker stays on one side; a split of another name than `train` or `heldout` is read only where it
is asked for. `facts` is carried through to evaluation untouched.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from aromni_jax.structs import Task, Text
from data_pipelines.places import beside, is_local, located
from data_pipelines.streams import DAMAGE, StreamReader, open_stream

MediaKind = Literal["image", "speech"]
TRAIN, HELDOUT = "train", "heldout"


class RecordError(ValueError):
    """A record that cannot be used: `stage` says where it failed (`parse`, `media`, `encode`, `length`)."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A picture or an utterance: a file of its own, on a disk or behind a URL."""

    kind: MediaKind
    path: pathlib.Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_on_disk(self) -> bool:
        """Whether `path` is a file that holds this and nothing else, and that any library can open."""
        return is_local(self.path)

    def content(self) -> bytes:
        """Its bytes."""
        return self.path.read_bytes()

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[pathlib.Path]:
        """The path of a file that holds its bytes, as long as the context lasts.

        It is a temporary one where there is none yet: tokenizers read files, and check them as such. Errors name the
        picture or utterance instead.
        """
        if self.is_on_disk:
            yield self.path
            return
        with tempfile.NamedTemporaryFile(suffix=pathlib.PurePosixPath(str(self)).suffix) as file:
            try:
                file.write(self.content())
                file.flush()
                yield pathlib.Path(file.name)
            except (ValueError, OSError) as error:
                said = str(error).replace(file.name, str(self))
                raise RecordError("media", said if str(self) in said else f"{self}: {said}") from error


@dataclasses.dataclass(frozen=True)
class EmbeddedMedia(MediaFile, abc.ABC):
    """A picture or an utterance inside the file `path`, under the name `member`; read when it is needed."""

    member: str

    def __str__(self) -> str:
        return f"{self.path}/{self.member}"

    @property
    def is_on_disk(self) -> bool:
        """Never: it is a part of a file."""
        return False

    @abc.abstractmethod
    def content(self) -> bytes:
        """Its bytes."""


@dataclasses.dataclass(frozen=True)
class RawMessage:
    """A turn whose media are still files."""

    role: str
    parts: tuple[Text | MediaFile, ...]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What one record of a source says: a task and its turns."""

    key: str
    task: Task
    messages: tuple[RawMessage, ...]
    facts: dict[str, Any]

    def media(self) -> Iterator[MediaFile]:
        """Every file the conversation needs, in order of appearance."""
        for message in self.messages:
            yield from (part for part in message.parts if isinstance(part, MediaFile))

    def texts(self) -> Iterator[str]:
        """Every piece of text, in order of appearance."""
        for message in self.messages:
            yield from (part.text for part in message.parts if isinstance(part, Text))


class Source(abc.ABC):
    """The conversations of one split of a corpus, by index: what every kind of source shares.

    A corpus has items (a line, a picture, a stem of an archive). Each item teaches all of `tasks` in turn, so what was
    made of one item stands together and on one side of the split. An item whose group cannot be read belongs to every
    split: it is reported, not lost. `unclaimed` counts, by split, the items that are in none of this split, `train` and
    `heldout`. For use by one thread.

    Args:
      path: a file, folder or pattern, as the kind says; a URL where the kind reads URLs.
      split: the part to take, "" for all.
      heldout_fraction: share of groups, by hash, that is `heldout` where the corpus names no splits.
      tasks: names of the tasks to make of each item; none for all that the kind can.
      columns: where a table holds what (`COLUMNS` of the kind): {"text": "caption"}.

    Raises:
      ValueError: there is nothing at `path`, nothing of this split, or a task that this kind cannot make.
    """

    TASKS: ClassVar[tuple[Task, ...]] = ()
    """What an item can teach; none where every item names its own task."""
    COLUMNS: ClassVar[tuple[str, ...]] = ()
    """What can be looked for in a column that `columns` names."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        split: str = "",
        heldout_fraction: float = 0.0,
        tasks: Sequence[str] = (),
        columns: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        self.path = located(path)
        self.columns = dict(columns)
        if wrong := set(self.columns) - set(self.COLUMNS):
            remedy = f"choose from {', '.join(self.COLUMNS)}" if self.COLUMNS else "leave config key 'columns' empty"
            raise ValueError(f"{self.path} has no use for columns of {', '.join(sorted(wrong))}; {remedy}")
        self._split, self._heldout_fraction = split, heldout_fraction
        self._digest = hashlib.sha256()
        self._prepare()
        self.tasks = self._chosen(tasks)
        others: Counter[str] = Counter()

        def kept() -> Iterator[Any]:
            for item, assigned in self._scan():
                if not split or assigned is None or assigned == split:
                    yield item
                else:
                    others[assigned] += 1

        self._items = self._stored(kept())
        if not len(self._items):
            if not others:
                raise ValueError(f"{self.path} is empty: it has no record to read")
            raise ValueError(f"{self.path} has no conversation of split {split!r}; it has {', '.join(sorted(others))}")
        self.unclaimed = {name: others[name] for name in sorted(others.keys() - {TRAIN, HELDOUT})}
        if self.tasks:
            self._digest.update(repr([[task.label for task in self.tasks], sorted(self.columns.items())]).encode())
        self.fingerprint = self._digest.hexdigest()[:16]

    def _chosen(self, names: Sequence[str]) -> tuple[Task, ...]:
        chosen = tuple(Task.from_name(name) for name in names)
        wrong = [task.label for task in chosen if task not in self.TASKS]
        if wrong:
            can = ", ".join(task.label for task in self.TASKS)
            remedy = f"choose from {can}" if can else "its records name their tasks: leave config key 'tasks' empty"
            raise ValueError(f"{self.path} cannot give {', '.join(wrong)}; {remedy}")
        return chosen or self._tasks_here()

    def _tasks_here(self) -> tuple[Task, ...]:
        """What the items of this very source teach when nothing is chosen."""
        return self.TASKS

    def _side(self, group: str) -> str:
        return split_by_group(group, self._heldout_fraction)

    @functools.cached_property
    def _root(self) -> pathlib.Path:
        """The last folder that `path` names without a wildcard."""
        fixed = next(path for path in (self.path, *self.path.parents) if not set(path.as_posix()) & set("*?["))
        return fixed.parent if fixed.is_file() else fixed

    def _named(self, file: pathlib.Path) -> str:
        """`file` below what `path` names without a wildcard: the same wherever the corpus lies."""
        return file.relative_to(self._root).as_posix()

    def _prepare(self) -> None:  # noqa: B027 - most kinds have nothing to find before they scan
        """Finds the files of the source; ValueError saying what is not there."""

    def _stored(self, items: Iterable[Any]) -> Sequence[Any] | np.ndarray:
        """Keeps items in memory; overridden where they are plain numbers."""
        return list(items)

    @abc.abstractmethod
    def _scan(self) -> Iterator[tuple[Any, str | None]]:
        """Every item in order with its split (None: unreadable), feeding `_digest` what the records depend on."""

    @abc.abstractmethod
    def _place(self, item: Any) -> str:
        """Where `item` stands, for people."""

    @abc.abstractmethod
    def _conversation(self, item: Any, task: Task | None) -> Conversation:
        """Makes the conversation of `item` for `task` (None where items name their own), or raises RecordError."""

    def __len__(self) -> int:
        return len(self._items) * max(1, len(self.tasks))

    def where(self, index: int) -> str:
        """`manifest.jsonl:17`: where record `index` stands."""
        return self._place(self._items[index // max(1, len(self.tasks))])

    def __getitem__(self, index: int) -> Conversation:
        """Reads record `index`; RecordError naming the place when it is not a conversation."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, which = divmod(index, max(1, len(self.tasks)))
        item = self._items[number]
        try:
            return self._conversation(item, self.tasks[which] if self.tasks else None)
        except RecordError:
            raise
        except KeyError as error:
            raise RecordError("parse", f"{self._place(item)}: the record lacks the field {error}") from error
        except UnicodeDecodeError as error:
            raise RecordError("parse", f"{self._place(item)}: not text in UTF-8, convert it: {error}") from error
        except (ValueError, TypeError, AttributeError, LookupError, *DAMAGE) as error:
            raise RecordError("parse", f"{self._place(item)}: not a conversation: {error}") from error

    def key_of(self, index: int) -> str:
        """The key of a record that is no conversation, where that can be read; "" elsewhere."""
        return ""

    @property
    def first_of_items(self) -> range:
        """The records that go through every item once: each with the first of `tasks`."""
        return range(0, len(self), max(1, len(self.tasks)))

    def media_paths(self, kind: MediaKind) -> list[pathlib.Path]:
        """Every distinct file of `kind`, in order of first use.

        Raises:
          ValueError: the media are not files of their own on a disk.
        """
        records = (self[i] for i in self.first_of_items)
        files = list(dict.fromkeys(file for record in records for file in record.media() if file.kind == kind))
        if not all(file.is_on_disk for file in files):
            raise ValueError(f"{self.path} holds {kind} records that are no files on a disk; read them one by one")
        return [file.path for file in files]

    def texts(self) -> Iterator[str]:
        """Every piece of text, in order."""
        return (text for i in self.first_of_items for text in self[i].texts())


def paired(name: str, task: Task, text: str, media: MediaFile | None, facts: dict[str, Any]) -> Conversation:
    """The conversation of one task over a text and the picture or utterance that belongs to it; keyed `task/name`.

    Raises:
      RecordError: an empty text, or a task that needs media where there is none.
    """
    if not text:
        raise RecordError("parse", f"{name}: the text is empty")
    words = Text(text)
    parts: list[Text | MediaFile] = [words]
    if task != Task.TEXT:
        if media is None:
            raise RecordError("parse", f"{name}: there is no picture or utterance for the task {task.label}")
        parts = [media, words] if task in (Task.CAPTION, Task.SPEECH_TO_TEXT) else [words, media]
    roles = ("user", "assistant")[-len(parts) :]
    messages = tuple(RawMessage(role, (part,)) for role, part in zip(roles, parts, strict=True))
    return Conversation(f"{task.label}/{name}", task, messages, facts)


class LineSource(Source):
    """A source whose items are lines of text files, plain or compressed. Only byte offsets are held in memory."""

    NUM_HEADER_LINES: ClassVar[int] = 0

    def _prepare(self) -> None:
        self._files = self._find_files()
        self._reader = StreamReader()

    @abc.abstractmethod
    def _find_files(self) -> list[pathlib.Path]:
        """The files whose lines are items, in order; ValueError saying what is not there."""

    @abc.abstractmethod
    def _split_of(self, line: bytes, number: int) -> str:
        """The split of a line; anything that does not parse raises what Python raises."""

    @abc.abstractmethod
    def _parsed(self, line: bytes, file: pathlib.Path, where: str, task: Task | None) -> Conversation:
        """The conversation of a line of `file`."""

    def _stored(self, items: Iterable[Any]) -> np.ndarray:
        return np.fromiter(items, np.dtype((np.int64, 4)))

    def _scan(self) -> Iterator[tuple[Any, str | None]]:
        for file_number, path in enumerate(self._files):
            position = 0
            with open_stream(path) as file:
                try:
                    for number, line in enumerate(file, 1):
                        self._digest.update(line)
                        if line.strip() and number > self.NUM_HEADER_LINES:
                            yield (file_number, position, len(line), number), self._guarded_split(line, number)
                        position += len(line)
                except DAMAGE as error:
                    raise ValueError(
                        f"{path} cannot be read to its end ({error}); fetch or compress it again"
                    ) from error

    def _guarded_split(self, line: bytes, number: int) -> str | None:
        if not self._split:  # nobody asks: lines need not be parsed twice
            return None
        try:
            return self._split_of(line, number)
        except (ValueError, TypeError, AttributeError, LookupError):
            return None

    def _place(self, item: Any) -> str:
        return f"{self._named(self._files[item[0]])}:{item[3]}"

    def _conversation(self, item: Any, task: Task | None) -> Conversation:
        file_number, position, length, _ = (int(value) for value in item)
        path = self._files[file_number]
        return self._parsed(self._reader.read(path, position, length), path, self._place(item), task)


class ManifestSource(LineSource):
    """A JSONL manifest: every line is a conversation and names its task.

    Raises:
      ValueError: there is no manifest, or it has no line of this split.
    """

    def _find_files(self) -> list[pathlib.Path]:
        if not self.path.is_file():
            raise ValueError(f"there is no manifest {self.path}; give a JSONL file, one conversation per line")
        return [self.path]

    def _split_of(self, line: bytes, number: int) -> str:
        fields = json.loads(line)
        if "split" in fields:
            return _checked_split(fields["split"], f"line {number}")
        return self._side(str(fields.get("group", fields.get("key", number))))

    def _parsed(self, line: bytes, file: pathlib.Path, where: str, task: Task | None) -> Conversation:
        fields = json.loads(line)
        messages = tuple(self._message(message, where) for message in fields["messages"])
        facts = fields.get("facts", {})
        if not messages or not isinstance(facts, dict):
            raise RecordError("parse", f"{where}: messages must be a non-empty list and facts a mapping")
        if "split" in fields:
            _checked_split(fields["split"], where)
        return Conversation(str(fields.get("key", where)), Task.from_name(fields["task"]), messages, facts)

    def key_of(self, index: int) -> str:
        """The field `key` of a line that is JSON."""
        file_number, position, length, _ = (int(value) for value in self._items[index])
        try:
            return str(json.loads(self._reader.read(self._files[file_number], position, length)).get("key", ""))
        except (ValueError, AttributeError, *DAMAGE):
            return ""

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
                file = beside(self.path.parent, part[kind])
                parts.append(MediaFile("image" if kind == "image" else "speech", file))
        return RawMessage(str(fields["role"]), tuple(parts))


def _checked_split(split: object, where: str) -> str:
    if not isinstance(split, str):
        raise RecordError(
            "parse", f"{where}: split must be a string, {TRAIN!r} or {HELDOUT!r}, not {json.dumps(split)}"
        )
    return split


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
