"""Corpora inside other files: plain text, compressed or not, and WebDataset tars."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
import tarfile
from collections.abc import Iterator

from aromni_jax.structs import Task
from data_pipelines.layouts import PICTURE_SUFFIXES, PICTURE_TASKS, SPEECH_TASKS, caption_in
from data_pipelines.places import globbed, read_range
from data_pipelines.sources import Conversation, EmbeddedMedia, LineSource, RecordError, Source, paired
from data_pipelines.streams import COMPRESSIONS, DAMAGE, StreamReader, open_stream

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
TEXT_SUFFIXES = (".txt", *(f".txt{compression}" for compression in COMPRESSIONS))


def matching(path: pathlib.Path, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    """The file `path`, the files below the folder `path`, or those its pattern (`*`, `?`, `**`) matches, sorted.

    Raises:
      ValueError: there is none, naming the suffixes that are looked for in a folder.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.name.endswith(suffixes)]
    else:
        files = globbed(path)
    if not files:
        raise ValueError(f"{path} names no file; give a file, a pattern or a folder with {', '.join(suffixes)}")
    return sorted(files)


def _media_kind(suffix: str) -> str | None:
    return "image" if suffix in PICTURE_SUFFIXES else "speech" if suffix in SOUND_SUFFIXES else None


def _tasks_with(kind: str | None) -> tuple[Task, ...]:
    return {"image": PICTURE_TASKS, "speech": SPEECH_TASKS}.get(kind or "", (Task.TEXT,))


def content_hash(content: bytes) -> str:
    """What stands for a text whose side of the split is its content: 16 hex digits."""
    return hashlib.sha256(content).hexdigest()[:16]


class TextLinesSource(LineSource):
    """Plain text, one document a line; equal lines are never split. Keys are `text/FILE:LINE`."""

    TASKS = (Task.TEXT,)

    def _find_files(self) -> list[pathlib.Path]:
        return matching(self.path, TEXT_SUFFIXES)

    def _split_of(self, line: bytes, number: int) -> str:
        return self._side(content_hash(line.strip()))

    def _parsed(self, line: bytes, file: pathlib.Path, where: str, task: Task | None) -> Conversation:
        assert task is not None
        return paired(where, task, line.decode().strip(), None, {})


class TextFilesSource(Source):
    """Plain text, one document a file; files of equal content are never split. Keys are `text/PATH`."""

    TASKS = (Task.TEXT,)

    def _scan(self) -> Iterator[tuple[pathlib.Path, str | None]]:
        for file in matching(self.path, TEXT_SUFFIXES):
            try:
                with open_stream(file) as opened:
                    content = content_hash(opened.read().strip())
            except DAMAGE as error:
                self._digest.update(f"{self._place(file)} {error}\n".encode())
                yield file, None
            else:
                self._digest.update(f"{self._place(file)} {content}\n".encode())
                yield file, self._side(content)

    def _place(self, item: pathlib.Path) -> str:
        return self._named(item)

    def _conversation(self, item: pathlib.Path, task: Task | None) -> Conversation:
        assert task is not None
        with open_stream(item) as opened:
            return paired(self._place(item), task, opened.read().decode().strip(), None, {})


@dataclasses.dataclass(frozen=True)
class TarMember(EmbeddedMedia):
    """A picture or an utterance at `offset` bytes of an uncompressed tar."""

    offset: int
    num_bytes: int

    def content(self) -> bytes:
        """The bytes of the member; RecordError where the tar has become shorter."""
        data = read_range(self.path, self.offset, self.num_bytes)
        if len(data) != self.num_bytes:
            raise RecordError("media", f"{self} is cut short: {len(data)} of {self.num_bytes} bytes")
        return data


@dataclasses.dataclass(frozen=True)
class _Stem:
    """A sample of a tar: the members that share a name up to its first dot, by suffix: (offset, bytes)."""

    tar: pathlib.Path
    name: str
    members: dict[str, tuple[int, int]]


class WebDatasetSource(Source):
    """WebDataset tars, uncompressed: a picture or an utterance and its text share a stem; only an index is in memory.

    The text is the member `.txt`, or the field `caption` or `text` of the member `.json`. The first sample decides
    whether this is a source of pictures, of speech or of text. The fingerprint covers names, places and checksums of
    headers, not the bytes of media: those would have to be read whole.
    """

    TASKS = (*PICTURE_TASKS, *SPEECH_TASKS, Task.TEXT)

    def _prepare(self) -> None:
        self._tars = matching(self.path, (".tar",))
        self._stems = self._samples()
        self._first = next(self._stems, None)
        self._reader = StreamReader()

    def _tasks_here(self) -> tuple[Task, ...]:
        suffixes = self._first.members if self._first else ()
        return _tasks_with(next((kind for suffix in suffixes if (kind := _media_kind(suffix))), None))

    def _samples(self) -> Iterator[_Stem]:
        for path in self._tars:
            stem = _Stem(path, "", {})
            try:
                with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        self._digest.update(f"{member.name} {member.offset_data} {member.chksum}\n".encode())
                        folder, slash, base = member.name.rpartition("/")
                        name, dot, suffix = base.partition(".")
                        if not member.isfile() or not name or not dot:
                            continue
                        if folder + slash + name != stem.name:
                            if stem.members:
                                yield stem
                            stem = _Stem(path, folder + slash + name, {})
                        stem.members[f".{suffix.lower()}"] = (member.offset_data, member.size)
                    # A tar that is cut between two members reads well, but for the block of zeros that tars end with.
                    file.seek(tar.offset)
                    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                        raise tarfile.ReadError("the mark of its end is missing")
            except (tarfile.TarError, OSError) as error:
                raise ValueError(
                    f"{path} is no whole, uncompressed tar ({error}); decompress or fetch it again"
                ) from error
            if stem.members:
                yield stem

    def _scan(self) -> Iterator[tuple[_Stem, str | None]]:
        for stem in itertools.chain([self._first] if self._first else [], self._stems):
            yield stem, self._side(stem.name)

    def _place(self, item: _Stem) -> str:
        return f"{self._named(item.tar)}/{item.name}"

    def _conversation(self, item: _Stem, task: Task | None) -> Conversation:
        assert task is not None
        wanted = "image" if task in PICTURE_TASKS else "speech"
        found = [suffix for suffix in item.members if task != Task.TEXT and _media_kind(suffix) == wanted]
        media = None
        if found:
            name = f"{item.name}{found[0]}"
            media = TarMember("image" if wanted == "image" else "speech", item.tar, name, *item.members[found[0]])
        text = self._text(item)
        return paired(self._place(item), task, text, media, {"label": text})

    def _text(self, item: _Stem) -> str:
        for suffix in (".txt", ".json"):
            if suffix in item.members:
                content = self._reader.read(item.tar, *item.members[suffix]).decode().strip()
                return content if suffix == ".txt" else caption_in(json.loads(content), self._place(item))
        raise RecordError("parse", f"{self._place(item)}: there is no member .txt or .json with its text")
