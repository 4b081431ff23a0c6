"""Bytes of files, plain or compressed (.gz, .zst), from the beginning and from any place."""

from __future__ import annotations

import gzip
import io
import pathlib
import zlib
from typing import Any, BinaryIO, cast

from data_pipelines.places import opened

_BLOCK_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".zst")
DAMAGE = (OSError, EOFError, zlib.error)
"""What reading a damaged stream raises."""


def open_stream(path: pathlib.Path) -> BinaryIO:
    """Opens a file for reading, decompressing it where its name ends in .gz or .zst.

    Raises:
      ValueError: a .zst file where the library that reads it is not installed.
    """
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(opened(path), "rb"))
    if path.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(path), _BLOCK_BYTES))
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames; a file that ends inside a frame is an error, not an end."""

    def __init__(self, path: pathlib.Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{path} needs the `zstandard` library: pip install zstandard") from error
        self._new_frame = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._error = zstandard.ZstdError
        self._file = path.open("rb")
        self._frame: Any = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(_BLOCK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends inside a compressed frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._plain, self._compressed = self._frame.decompress(self._compressed), b""
            except self._error as error:
                raise OSError(f"damaged zstd data: {error}") from error
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        taken = self._plain[: len(buffer)]
        buffer[: len(taken)] = taken
        self._plain = self._plain[len(taken) :]
        return len(taken)

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()


class StreamReader:
    """Reads pieces of files by offset in their decompressed bytes, one file open at a time.

    Reading onward costs nothing extra. Going back in a compressed file means decompressing it from its beginning: the
    order in which shards are made never does.
    """

    def __init__(self) -> None:
        self._path: pathlib.Path | None = None
        self._file: BinaryIO = io.BytesIO()
        self._position = 0

    def read(self, path: pathlib.Path, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` bytes of `path` from `offset`; one of DAMAGE where the file is damaged or gone."""
        if path != self._path or (offset < self._position and not self._file.seekable()):
            self._file.close()
            self._path = None
            self._file, self._position = open_stream(path), 0
            self._path = path
        if self._file.seekable():
            self._file.seek(offset)
        else:
            while self._position < offset:
                skipped = len(self._file.read(min(_BLOCK_BYTES, offset - self._position)))
                if not skipped:
                    raise EOFError(f"{path} has become shorter since it was scanned")
                self._position += skipped
        data = self._file.read(num_bytes)
        self._position = offset + len(data)
        return data
