"""Corpora in the folders they are published in: each class reads one layout as its publishers lay it out.

Nothing is converted beforehand: transcripts and captions are read where they lie, sound and pictures by path. A file
that is missing or does not decode becomes a quarantined record when it is needed, like those of a manifest.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from aromni_jax.structs import Task
from data_pipelines.sources import Conversation, LineSource, MediaFile, RecordError, Source, paired

SPEECH_TASKS = (Task.SPEECH_TO_TEXT, Task.TEXT_TO_SPEECH)
PICTURE_TASKS = (Task.CAPTION, Task.TEXT_TO_IMAGE)
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_FIELDS = ("caption", "text")


def caption_in(fields: Any, where: str) -> str:
    """The caption of a picture's JSON sidecar: its field `caption` or `text`; RecordError where it has neither."""
    for name in CAPTION_FIELDS:
        if isinstance(fields, dict) and isinstance(fields.get(name), str):
            return fields[name].strip()
    raise RecordError("parse", f"{where}: the JSON needs a text in the field {' or '.join(CAPTION_FIELDS)}")


class LJSpeechSource(LineSource):
    """LJSpeech: `metadata.csv` with `id|text|normalised text`, sound in `wavs/ID.wav`; the normalised text is used."""

    TASKS = SPEECH_TASKS

    def _find_files(self) -> list[pathlib.Path]:
        return [_needed(self.path / "metadata.csv", "ljspeech", "the folder that holds metadata.csv and wavs/")]

    def _split_of(self, line: bytes, number: int) -> str:
        return self._side(self._fields(line)[0])

    def _fields(self, line: bytes) -> tuple[str, str]:
        name, *texts = line.decode().strip().split("|")
        if not 1 <= len(texts) <= 2:
            raise ValueError(f"expected id|text|normalised text, found {1 + len(texts)} fields")
        return name, texts[-1] or texts[0]

    def _parsed(self, line: bytes, file: pathlib.Path, where: str, task: Task | None) -> Conversation:
        assert task is not None
        name, text = self._fields(line)
        return paired(name, task, text, MediaFile("speech", file.parent / "wavs" / f"{name}.wav"), {"label": text})


class LibriSpeechSource(LineSource):
    """LibriSpeech: `SPEAKER/CHAPTER/*.trans.txt` with `id TRANSCRIPT`, `ID.flac` beside it; speakers are not split."""

    TASKS = SPEECH_TASKS

    def _find_files(self) -> list[pathlib.Path]:
        files = sorted(self.path.rglob("*.trans.txt"))
        if not files:
            raise ValueError(f"{self.path} has no *.trans.txt; give the folder of a subset, like LibriSpeech/dev-clean")
        return files

    def _split_of(self, line: bytes, number: int) -> str:
        return self._side(line.decode().split("-")[0])

    def _parsed(self, line: bytes, file: pathlib.Path, where: str, task: Task | None) -> Conversation:
        assert task is not None
        name, _, text = line.decode().strip().partition(" ")
        facts = {"label": text, "voice": name.split("-")[0]}
        return paired(name, task, text, MediaFile("speech", file.parent / f"{name}.flac"), facts)


class CommonVoiceSource(LineSource):
    """Common Voice: a folder with `validated.tsv` and `clips/`, or one of its TSV files; speakers are not split."""

    TASKS = SPEECH_TASKS
    NUM_HEADER_LINES = 1

    def _find_files(self) -> list[pathlib.Path]:
        file = self.path / "validated.tsv" if self.path.is_dir() else self.path
        _needed(
            file, "common_voice", "the folder of a language, with validated.tsv and clips/, or one of its TSV files"
        )
        with file.open("rb") as opened:
            self._columns = opened.readline().decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
        missing = {"client_id", "path", "sentence"} - set(self._columns)
        if missing:
            raise ValueError(f"{file}:1: the header lacks {', '.join(sorted(missing))}; is this a Common Voice TSV?")
        return [file]

    def _fields(self, line: bytes) -> dict[str, str]:
        values = line.decode().rstrip("\r\n").split("\t")
        if len(values) != len(self._columns):
            raise ValueError(f"{len(values)} fields where the header has {len(self._columns)}")
        return dict(zip(self._columns, values, strict=True))

    def _split_of(self, line: bytes, number: int) -> str:
        return self._side(self._fields(line)["client_id"])

    def _parsed(self, line: bytes, file: pathlib.Path, where: str, task: Task | None) -> Conversation:
        assert task is not None
        fields = self._fields(line)
        clip = file.parent / "clips" / fields["path"]
        facts = {"label": fields["sentence"], "voice": fields["client_id"]}
        return paired(clip.stem, task, fields["sentence"], MediaFile("speech", clip), facts)


class VCTKSource(Source):
    """VCTK: `txt/SPEAKER/ID.txt`, sound in a `wav48*` folder; of two microphones the first; speakers are not split."""

    TASKS = SPEECH_TASKS

    def _prepare(self) -> None:
        self._texts = sorted((self.path / "txt").glob("*/*.txt"))
        self._sounds = sorted(folder for folder in self.path.glob("wav48*") if folder.is_dir())
        if not self._texts or not self._sounds:
            raise ValueError(f"{self.path} is no VCTK folder: it needs txt/SPEAKER/ID.txt and wav48*/SPEAKER/ID*")

    def _scan(self) -> Iterator[tuple[pathlib.Path, str | None]]:
        for path in self._texts:
            self._digest.update(f"{path.parent.name}/{path.name}\n".encode() + path.read_bytes())
            yield path, self._side(path.parent.name)

    def _place(self, item: pathlib.Path) -> str:
        return self._named(item)

    def _conversation(self, item: pathlib.Path, task: Task | None) -> Conversation:
        assert task is not None
        speaker, name = item.parent.name, item.stem
        endings = (".flac", "_mic1.flac", ".wav", "_mic1.wav")
        places = [folder / speaker / f"{name}{ending}" for folder in self._sounds for ending in endings]
        sound = next((place for place in places if place.is_file()), None)
        if sound is None:
            raise RecordError("media", f"{self._place(item)}: none of wav48*/{speaker}/{name}[_mic1].flac or .wav")
        text = item.read_text(encoding="utf-8").strip()
        return paired(name, task, text, MediaFile("speech", sound), {"label": text, "voice": speaker})


class CocoSource(Source):
    """COCO captions: `annotations/captions_PART.json`, pictures in `PART/` or `images/PART/` beside `annotations/`.

    Every caption is an item; those of one picture are not split.
    """

    TASKS = PICTURE_TASKS

    def _prepare(self) -> None:
        _needed(self.path, "coco", "an annotations/captions_*.json")
        data = self.path.read_bytes()
        self._digest.update(data)
        try:
            content = json.loads(data)
            self._names = {picture["id"]: str(picture["file_name"]) for picture in content["images"]}
            self._annotations = list(content["annotations"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no COCO captions file ({error!r}); fetch it again") from error
        part = self.path.stem.removeprefix("captions_")
        root = self.path.parent.parent
        folders = (root / part, root / "images" / part, self.path.parent / part)
        self._folder = next((folder for folder in folders if folder.is_dir()), None)
        if self._folder is None:
            raise ValueError(f"no folder of pictures for {self.path}; put them in {folders[0]} or {folders[1]}")

    def _scan(self) -> Iterator[tuple[tuple[int, Any], str | None]]:
        for number, annotation in enumerate(self._annotations):
            known = isinstance(annotation, dict) and "image_id" in annotation
            yield (number, annotation), self._side(str(annotation["image_id"])) if known else None
        del self._annotations  # the items hold what is kept

    def _place(self, item: tuple[int, Any]) -> str:
        return f"{self.path.name} annotation {item[0]}"

    def _conversation(self, item: tuple[int, Any], task: Task | None) -> Conversation:
        assert task is not None and self._folder is not None
        annotation = item[1]
        picture = self._names.get(annotation["image_id"])
        if picture is None:
            raise RecordError("parse", f"{self._place(item)}: no picture has the id {annotation['image_id']}")
        text = annotation["caption"].strip()
        file = MediaFile("image", self._folder / picture)
        return paired(f"{annotation['image_id']}/{annotation['id']}", task, text, file, {"label": text})


class ImageFolderSource(Source):
    """A folder of pictures at any depth, each with its caption beside it: `NAME.txt`, or `NAME.json` with `caption`."""

    TASKS = PICTURE_TASKS

    def _prepare(self) -> None:
        self._pictures = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
        if not self._pictures:
            raise ValueError(f"{self.path} holds no picture; give a folder of {', '.join(PICTURE_SUFFIXES)}")

    def _scan(self) -> Iterator[tuple[pathlib.Path, str | None]]:
        for picture in self._pictures:
            sidecar = _sidecar(picture)
            name = self._place(picture)
            self._digest.update(f"{name}\n".encode() + (sidecar.read_bytes() if sidecar else b""))
            yield picture, self._side(name)

    def _place(self, item: pathlib.Path) -> str:
        return self._named(item)

    def _conversation(self, item: pathlib.Path, task: Task | None) -> Conversation:
        assert task is not None
        sidecar = _sidecar(item)
        if sidecar is None:
            raise RecordError("parse", f"{self._place(item)}: there is no caption; write {item.stem}.txt beside it")
        text = sidecar.read_text(encoding="utf-8").strip()
        if sidecar.suffix == ".json":
            text = caption_in(json.loads(text), self._place(sidecar))
        return paired(self._place(item), task, text, MediaFile("image", item), {"label": text})


def _sidecar(picture: pathlib.Path) -> pathlib.Path | None:
    return next((file for ending in (".txt", ".json") if (file := picture.with_suffix(ending)).is_file()), None)


def _needed(file: pathlib.Path, kind: str, wanted: str) -> pathlib.Path:
    if not file.is_file():
        raise ValueError(f"there is no {file}; {kind}: takes {wanted}")
    return file
