"""Parquet and Arrow files whose columns are named in the config: text, with a picture or an utterance beside it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from aromni_jax.structs import Task
from data_pipelines.columns import ColumnSource
from data_pipelines.containers import matching
from data_pipelines.layouts import PICTURE_TASKS
from data_pipelines.places import beside, is_local, opened
from data_pipelines.sources import Conversation, EmbeddedMedia, MediaFile, MediaKind, RecordError, paired

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
                self._parquet = pyarrow.parquet.ParquetFile(opened(path), page_checksum_verification=True)
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
    """The batches of an Arrow file, or of the stream that some write under the same name.

    They are mapped, not read, where the file is on a disk; a URL is read whole.
    """
    content = pyarrow.memory_map(str(path)) if is_local(path) else pyarrow.BufferReader(path.read_bytes())
    try:
        reader = pyarrow.ipc.open_file(content)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except pyarrow.ArrowInvalid:
        content.seek(0)
        return list(pyarrow.ipc.open_stream(content))


class TableReader:
    """The tables and columns that were used last: neighbouring records ask for the same."""

    def __init__(self) -> None:
        self.table = functools.lru_cache(maxsize=8)(Table)
        self._column = functools.lru_cache(maxsize=4)(lambda path, group, name: self.table(path).column(group, name))

    def cell(self, path: pathlib.Path, group: int, name: str, row: int) -> Any:
        """What stands in one cell, as Python has it."""
        return self._column(path, group, name)[row].as_py()


@dataclasses.dataclass(frozen=True)
class TableCell(EmbeddedMedia):
    """A picture or an utterance in a cell: bytes, or a struct of `bytes` and `path` of which one is there."""

    group: int
    row: int
    column: str
    reader: TableReader = dataclasses.field(compare=False, repr=False)

    def content(self) -> bytes:
        """The bytes of the cell, or of the file it names; RecordError where there are none."""
        value = self.reader.cell(self.path, self.group, self.column, self.row)
        if isinstance(value, dict):
            name = value.get("path")
            value = value.get("bytes") or (name and beside(self.path.parent, name).read_bytes())
        if not isinstance(value, bytes) or not value:
            raise RecordError("media", f"{self}: the cell holds no bytes")
        return value


class TableSource(ColumnSource):
    """Parquet and Arrow files, columns named by the config key `columns`: `{"text": "caption", "image": "jpg"}`.

    Pictures and utterances are bytes, a struct of `bytes` and `path`, or a path relative to the file. The fingerprint
    covers text, keys and groups, not the bytes of media.
    """

    def _prepare(self) -> None:
        self._files = matching(self.path, SUFFIXES)
        self._reader = TableReader()
        self._check_text_is_named(self._files[0], self._reader.table(self._files[0]).schema.names)

    def _stored(self, items: Iterable[Any]) -> np.ndarray:
        return np.fromiter(items, np.dtype((np.int64, 4)))

    def _scan(self) -> Iterator[tuple[Any, str | None]]:
        wanted = self._deciding()
        for file_number, path in enumerate(self._files):
            table, number = Table(path), 0
            self._check_columns_exist(path, table.schema.names)
            for group in range(table.num_groups):
                try:
                    columns = [table.column(group, self.columns[role]).to_pylist() for role in wanted]
                except (ValueError, OSError) as error:
                    raise ValueError(f"{path}, row group {group}, does not read ({error}); fetch it again") from error
                for row, values in enumerate(zip(*columns, strict=True)):
                    self._digest.update(repr(values).encode())
                    yield (file_number, group, row, number), self._side_of(values)
                    number += 1

    def _place(self, item: Any) -> str:
        return f"{self._named(self._files[item[0]])} row {item[3]}"

    def _conversation(self, item: Any, task: Task | None) -> Conversation:
        assert task is not None
        file_number, group, row, _ = (int(value) for value in item)
        path = self._files[file_number]
        where = self._place(item)

        def cell(role: str) -> Any:
            return self._reader.cell(path, group, self.columns[role], row)

        text = cell("text")
        if not isinstance(text, str):
            raise RecordError(
                "parse", f"{where}: the column {self.columns['text']} holds {type(text).__name__}, no text"
            )
        media: MediaFile | None = None
        kind: MediaKind = "image" if task in PICTURE_TASKS else "speech"
        if task != Task.TEXT and kind in self.columns:
            name = self.columns[kind]
            column_type = str(self._reader.table(path).schema.field(name).type)
            if column_type in ("string", "large_string"):
                media = MediaFile(kind, beside(path.parent, str(cell(kind))))
            else:
                member = f"row {int(item[3])}, column {name}"
                media = TableCell(kind, path, member, group, row, name, self._reader)
        return paired(str(cell("key")) if "key" in self.columns else where, task, text.strip(), media, {"label": text})
