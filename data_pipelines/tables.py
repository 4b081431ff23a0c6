"""Parquet and Arrow files whose columns are named in the config: text, with a picture or an utterance beside it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np

from aromni_jax.structs import Task
from data_pipelines.containers import matching
from data_pipelines.layouts import PICTURE_TASKS, SPEECH_TASKS
from data_pipelines.sources import Conversation, EmbeddedMedia, MediaFile, MediaKind, RecordError, Source, paired

SUFFIXES = (".parquet", ".arrow", ".feather")


class Table:
    """One file as groups of rows (row groups of Parquet, batches of Arrow), columns of which are read by themselves."""

    def __init__(self, path: pathlib.Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(f"{path} needs the `pyarrow` library: pip install pyarrow") from error
        try:
            if path.suffix == ".parquet":
                self._parquet = pyarrow.parquet.ParquetFile(path)
                self.schema = self._parquet.schema_arrow
                self.num_groups = self._parquet.num_row_groups
            else:
                self._parquet = None
                self._batches = _batches(pyarrow, path)
                self.schema, self.num_groups = self._batches[0].schema, len(self._batches)
        except (pyarrow.ArrowException, OSError, LookupError) as error:
            raise ValueError(f"{path} is no whole Parquet or Arrow file ({error}); fetch it again") from error

    def column(self, group: int, name: str) -> Any:
        """The arrow column `name` of one group."""
        if self._parquet is not None:
            return self._parquet.read_row_group(group, columns=[name]).column(0)
        return self._batches[group].column(name)


def _batches(pyarrow: Any, path: pathlib.Path) -> list[Any]:
    """The batches of an Arrow file, or of the stream that some write under the same name; mapped, not read."""
    mapped = pyarrow.memory_map(str(path))
    try:
        reader = pyarrow.ipc.open_file(mapped)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        return list(pyarrow.ipc.open_stream(mapped))


@functools.lru_cache(maxsize=8)
def _table(path: pathlib.Path, modified_ns: int) -> Table:
    return Table(path)


@functools.lru_cache(maxsize=4)
def _column(path: pathlib.Path, modified_ns: int, group: int, name: str) -> Any:
    return _table(path, modified_ns).column(group, name)


def read_column(path: pathlib.Path, group: int, name: str) -> Any:
    """A column of a group; the last few are kept, since neighbouring records ask for the same."""
    return _column(path, path.stat().st_mtime_ns, group, name)


@dataclasses.dataclass(frozen=True)
class TableCell(EmbeddedMedia):
    """A picture or an utterance in a cell: bytes, or a struct of `bytes` and `path` of which one is there."""

    group: int
    row: int
    column: str

    def content(self) -> bytes:
        """The bytes of the cell, or of the file it names; RecordError where there are none."""
        value = read_column(self.path, self.group, self.column)[self.row].as_py()
        if isinstance(value, dict):
            name = value.get("path")
            value = value.get("bytes") or (name and (self.path.parent / name).read_bytes())
        if not isinstance(value, bytes) or not value:
            raise RecordError("media", f"{self}: the cell holds no bytes")
        return value


class TableSource(Source):
    """Parquet and Arrow files, columns named by the config key `columns`: `{"text": "caption", "image": "jpg"}`.

    `text` is needed, `image` or `speech` makes it a source of pictures or of speech: bytes, a struct of `bytes` and
    `path`, or a path relative to the file. `key` names records, `group` decides the split (else the key, else the hash
    of the text). The fingerprint covers these but not the bytes of media.
    """

    TASKS: ClassVar[tuple[Task, ...]] = (*PICTURE_TASKS, *SPEECH_TASKS, Task.TEXT)
    COLUMNS: ClassVar[tuple[str, ...]] = ("text", "image", "speech", "key", "group")

    def _prepare(self) -> None:
        self._files = matching(self.path, SUFFIXES)
        names = list(Table(self._files[0]).schema.names)
        if "text" not in self.columns:
            raise ValueError(
                f"{self._files[0]} has the columns {', '.join(names)}; name that of the text in config key 'columns': "
                f"--config.columns=\"{{'text': '{names[0]}'}}\""
            )

    def _tasks_here(self) -> tuple[Task, ...]:
        return PICTURE_TASKS if "image" in self.columns else SPEECH_TASKS if "speech" in self.columns else (Task.TEXT,)

    def _stored(self, items: Iterable[Any]) -> np.ndarray:
        return np.fromiter(items, np.dtype((np.int64, 4)))

    def _scan(self) -> Iterator[tuple[Any, str | None]]:
        wanted = [role for role in ("text", "key", "group") if role in self.columns]
        for file_number, path in enumerate(self._files):
            table, number = Table(path), 0
            missing = [name for name in self.columns.values() if name not in table.schema.names]
            if missing:
                has = ", ".join(table.schema.names)
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}; it has {has}: correct config key 'columns'"
                )
            for group in range(table.num_groups):
                try:
                    columns = [table.column(group, self.columns[role]).to_pylist() for role in wanted]
                except (ValueError, OSError) as error:
                    raise ValueError(f"{path}, row group {group}, does not read ({error}); fetch it again") from error
                for row, values in enumerate(zip(*columns, strict=True)):
                    self._digest.update(repr(values).encode())
                    # `values` begins with the text and ends with what decides: group, else key, else the text itself.
                    by_text = len(values) == 1
                    decides = hashlib.sha256(str(values[0]).encode()).hexdigest() if by_text else str(values[-1])
                    yield (file_number, group, row, number), None if values[-1] is None else self._side(decides)
                    number += 1

    def _place(self, item: Any) -> str:
        return f"{self._named(self._files[item[0]])} row {item[3]}"

    def _conversation(self, item: Any, task: Task | None) -> Conversation:
        assert task is not None
        file_number, group, row, _ = (int(value) for value in item)
        path = self._files[file_number]
        where = self._place(item)

        def cell(role: str) -> Any:
            return read_column(path, group, self.columns[role])[row].as_py()

        text = cell("text")
        if not isinstance(text, str):
            raise RecordError(
                "parse", f"{where}: the column {self.columns['text']} holds {type(text).__name__}, no text"
            )
        media: MediaFile | None = None
        kind: MediaKind = "image" if task in PICTURE_TASKS else "speech"
        if task != Task.TEXT and kind in self.columns:
            name = self.columns[kind]
            column_type = str(_table(path, path.stat().st_mtime_ns).schema.field(name).type)
            if column_type in ("string", "large_string"):
                media = MediaFile(kind, path.parent / str(cell(kind)))
            else:
                media = TableCell(kind, path, f"row {int(item[3])}, column {name}", group, row, name)
        return paired(str(cell("key")) if "key" in self.columns else where, task, text.strip(), media, {"label": text})
