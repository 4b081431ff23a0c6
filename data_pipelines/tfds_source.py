"""Prepared builders of TensorFlow Datasets, in the file format ArrayRecord; TensorFlow itself is not needed.

The library reads a builder's description and its features. Records are fetched from the files by number: the library's
own data source takes time for each that grows with the size of the file.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from array_record.python import array_record_module
from PIL import Image as PilImage

from aromni_jax.structs import Task
from data_pipelines.columns import ColumnSource
from data_pipelines.layouts import PICTURE_TASKS
from data_pipelines.places import is_local
from data_pipelines.sources import HELDOUT, TRAIN, Conversation, EmbeddedMedia, MediaKind, RecordError, paired

DESCRIPTION = "dataset_info.json"
FILE_FORMAT = "array_record"
HELDOUT_NAMES = ("val", "dev", "test", "eval", "heldout")
"""What the names of held-out splits begin with."""


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file of a split, and the number of its first record in the split."""

    split: str
    path: pathlib.Path
    first: int
    num_records: int


class BuilderReader:
    """The files of a prepared builder, and the features of its records that `columns` names.

    Raises:
      ValueError: it does not open: the library is missing, the description, a file or another format.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        try:
            import tensorflow_datasets as tfds
            from google.protobuf.json_format import ParseError
        except ImportError as error:
            raise ValueError(
                f"{folder} needs the `tensorflow-datasets` library: pip install tensorflow-datasets importlib_resources"
            ) from error
        self._tfds = tfds
        remedy = f"prepare it again with file_format={FILE_FORMAT!r}"
        try:
            info = tfds.builder_from_directory(folder).info
            self.features = dict(sorted(info.features.items()))
            splits = dict(info.splits)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, ParseError) as error:
            raise ValueError(
                f"{folder} is no builder that reads without TensorFlow ({error}); fetch it again or {remedy}"
            ) from error
        if info.file_format is None or info.file_format.value != FILE_FORMAT:
            has = info.file_format.value if info.file_format else "no format"
            raise ValueError(f"{folder} holds files of {has}, which cannot be read by number; {remedy}")
        self.name = info.full_name
        self.shards: list[_Shard] = []
        for split, about in splits.items():
            first = 0
            for path, num_records in zip(about.filepaths, about.shard_lengths, strict=True):
                self.shards.append(_Shard(split, pathlib.Path(path), first, num_records))
                self._check_whole(self.shards[-1])
                first += num_records
        self._reader = functools.lru_cache(maxsize=8)(self._opened)
        # The tasks of one record, and its picture, ask for it one after the other.
        self._record = functools.lru_cache(maxsize=2)(self._read)

    def _opened(self, shard: int) -> Any:
        return array_record_module.ArrayRecordReader(str(self.shards[shard].path), "readahead_buffer_size:0")

    def _check_whole(self, shard: _Shard) -> None:
        try:
            reader = array_record_module.ArrayRecordReader(str(shard.path), "readahead_buffer_size:0")
            found = reader.num_records()
            reader.close()
        except (RuntimeError, ValueError, OSError) as error:
            found, said = 0, f": {error}" if str(error) else ""
        else:
            said = ""
        if found != shard.num_records:
            raise ValueError(
                f"{shard.path} is missing, cut short or damaged, {found} of {shard.num_records} records can be "
                f"found{said}; fetch or prepare the builder again"
            )

    def choose(self, names: Iterable[str]) -> None:
        """Makes `names` the features that `values` gives; the others are never decoded."""
        features = {name: self.features[name] for name in names}
        self._chosen = self._tfds.features.FeaturesDict(features)
        images = [name for name, feature in features.items() if isinstance(feature, self._tfds.features.Image)]
        self._decoders = {name: self._tfds.decode.SkipDecoding() for name in images}

    def where(self, shard: int, offset: int) -> str:
        """`train record 17`: for people."""
        return f"{self.shards[shard].split} record {self.shards[shard].first + offset}"

    def value(self, shard: int, offset: int, name: str) -> Any:
        """What feature `name` of a record is: bytes of text and of encoded pictures, names of classes, else arrays.

        Raises:
          RecordError: the record does not read.
        """
        value, feature = self._record(shard, offset)[name], self.features[name]
        return feature.int2str(value) if isinstance(feature, self._tfds.features.ClassLabel) else value

    def _read(self, shard: int, offset: int) -> dict[str, Any]:
        try:
            (data,) = self._reader(shard).read(offset, offset + 1)
            return self._chosen.deserialize_example_np(data, decoders=self._decoders)
        except (RuntimeError, ValueError, LookupError) as error:
            raise RecordError("parse", f"{self.where(shard, offset)} does not read: {error}") from error


@dataclasses.dataclass(frozen=True)
class BuilderMedia(EmbeddedMedia):
    """A picture or an utterance in a feature: the bytes of a file, or of a picture its uint8 pixels."""

    shard: int
    offset: int
    feature: str
    reader: BuilderReader = dataclasses.field(compare=False, repr=False)

    def content(self) -> bytes:
        """Bytes as they are stored; pixels as PNG. RecordError for what is neither."""
        value = self.reader.value(self.shard, self.offset, self.feature)
        if isinstance(value, bytes) and value:
            return value
        if self.kind == "image" and isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
            file = io.BytesIO()
            PilImage.fromarray(value[..., 0] if value.shape[-1] == 1 else value).save(file, "PNG")
            return file.getvalue()
        wanted = "the bytes of a sound file"
        if self.kind == "image":
            wanted = "the bytes of a picture or its uint8 pixels [height, width, channels]"
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise RecordError("media", f"{self} holds {found}, not {wanted}")


class TfdsSource(ColumnSource):
    """A prepared builder: its folder `DATASET/CONFIG/VERSION`, or one above it in which there is no other.

    Features are named by the config key `columns`, as the columns of a table are. A split of the builder whose name
    begins like `test`, `validation` or `dev` is held out, the others are for training; where all are of one sort, the
    hash decides as elsewhere. The config key `split` also takes the builder's own name of a split. The fingerprint
    covers the description and the sizes of files.
    """

    def _prepare(self) -> None:
        if not is_local(self.path):
            raise ValueError(f"{self.path}: tfds: reads builders on a disk only; copy the folder there or mount it")
        folder = self._folder()
        self._reader = BuilderReader(folder)
        self._check_text_is_named(folder, list(self._reader.features))
        self._check_columns_exist(folder, list(self._reader.features))
        self._reader.choose(self.columns.values())
        self._builder_splits = list(dict.fromkeys(shard.split for shard in self._reader.shards))
        allowed = dict.fromkeys(["", TRAIN, HELDOUT, *self._builder_splits])
        if self._split not in allowed:
            raise ValueError(f"{folder} has no split {self._split!r}; choose from {', '.join(filter(None, allowed))}")
        sizes = [[shard.split, shard.num_records, shard.path.stat().st_size] for shard in self._reader.shards]
        features = json.loads((folder / "features.json").read_bytes())
        self._digest.update(json.dumps([self._reader.name, sizes, features], sort_keys=True).encode())

    def _folder(self) -> pathlib.Path:
        if not self.path.is_dir():
            raise ValueError(f"there is no folder {self.path}; tfds: takes that of a prepared builder")
        if (self.path / DESCRIPTION).is_file():
            return self.path
        found = sorted(file.parent for file in self.path.rglob(DESCRIPTION))
        if len(found) == 1:
            return found[0]
        several = ", ".join(str(folder.relative_to(self.path)) for folder in found)
        what = f"{len(found)} prepared builders ({several}); name one of them" if found else f"no {DESCRIPTION}"
        raise ValueError(f"{self.path} holds {what}; tfds: takes the folder DATASET/CONFIG/VERSION of one builder")

    def _stored(self, items: Iterable[Any]) -> np.ndarray:
        return np.fromiter(items, np.dtype((np.int64, 2)))

    def _scan(self) -> Iterator[tuple[Any, str | None]]:
        sides = {name: HELDOUT if name.lower().startswith(HELDOUT_NAMES) else TRAIN for name in self._builder_splits}
        named = len(set(sides.values())) > 1
        wanted = self._split
        for number, shard in enumerate(self._reader.shards):
            # None: the hash of each record decides, and records are read for it only where it can.
            side: str | None = sides[shard.split] if named else None
            if wanted not in ("", TRAIN, HELDOUT):
                side = shard.split
            elif side is None and (not wanted or not self._heldout_fraction):
                side = TRAIN
            for offset in range(shard.num_records):
                yield (number, offset), side or self._read_side(number, offset)

    def _read_side(self, shard: int, offset: int) -> str | None:
        try:
            return self._side_of([self._text(shard, offset, role) for role in self._deciding()])
        except ValueError:
            return None

    def _text(self, shard: int, offset: int, role: str) -> str:
        value, name = self._reader.value(shard, offset, self.columns[role]), self.columns[role]
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, (str, int, np.integer)):
            return str(value)
        where = self._reader.where(shard, offset)
        raise RecordError("parse", f"{where}: the feature {name} holds {type(value).__name__}, no text")

    def _place(self, item: Any) -> str:
        return self._reader.where(*(int(value) for value in item))

    def _conversation(self, item: Any, task: Task | None) -> Conversation:
        assert task is not None
        shard, offset = (int(value) for value in item)
        where = self._place(item)
        text = self._text(shard, offset, "text").strip()
        media = None
        kind: MediaKind = "image" if task in PICTURE_TASKS else "speech"
        if task != Task.TEXT and kind in self.columns:
            name = self.columns[kind]
            media = BuilderMedia(kind, self.path, f"{where}, feature {name}", shard, offset, name, self._reader)
        key = self._text(shard, offset, "key") if "key" in self.columns else where
        return paired(key, task, text, media, {"label": text})
