"""Where files lie: on a disk, or behind a URL that fsspec reads (`gs://`, `s3://`, `https://` and more).

Whatever reads a corpus takes a `pathlib.Path`. A URL becomes the path object of the library universal_pathlib, which
reads, lists and joins the same way; that it is no real `pathlib.Path` tells the two apart. Credentials and endpoints
are found as gcsfs and s3fs find them; nothing here asks for them.
"""

from __future__ import annotations

import glob
import os
import pathlib
import re
import urllib.parse
import urllib.request
from typing import Any, BinaryIO, cast

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}


def is_url(name: str) -> bool:
    """Whether `name` begins like a URL: `gs://...`."""
    return bool(_URL.match(name))


def is_local(path: pathlib.Path) -> bool:
    """Whether `path` is on a disk, where libraries in C can open it by its name."""
    return isinstance(path, pathlib.Path)


def located(name: str | os.PathLike[str]) -> pathlib.Path:
    """The path that `name` says, or what stands for it where it is a URL; `file://` is a path on a disk.

    Raises:
      ValueError: a URL of a kind that nothing reads, or whose library is not installed: how to install it.
    """
    text = str(name)
    if not (match := _URL.match(text)):
        return pathlib.Path(text)
    protocol = match[1].lower()
    if protocol == "file":
        return pathlib.Path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path))
    try:
        import fsspec
        from upath import UPath
    except ImportError as error:
        package = f" {_PACKAGES[protocol]}" if protocol in _PACKAGES else ""
        raise ValueError(f"{text} needs libraries: pip install universal_pathlib{package}") from error
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        remedy = f"pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else str(error)
        raise ValueError(f"{text} needs a library: {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{text}: nothing reads URLs that begin with {protocol}://; use gs:// or s3://") from error
    return cast(pathlib.Path, UPath(text))


def beside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """What a file in `folder` calls `name`: a path relative to it, an absolute one, or a URL."""
    return located(name) if is_url(name) else folder / name


def globbed(path: pathlib.Path) -> list[pathlib.Path]:
    """What the pattern `path` (`*`, `?`, `**`) matches."""
    if is_local(path):
        return [pathlib.Path(name) for name in glob.glob(str(path), recursive=True)]
    files = cast(Any, path).fs
    return [located(files.unstrip_protocol(name)) for name in files.glob(cast(Any, path).path)]


def read_range(path: pathlib.Path, offset: int, num_bytes: int) -> bytes:
    """Bytes [offset, offset + num_bytes) of a file, fewer where it ends before; of a URL no more are fetched."""
    if not is_local(path):
        remote = cast(Any, path)
        return remote.fs.cat_file(remote.path, start=offset, end=offset + num_bytes)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(num_bytes)


def opened(path: pathlib.Path) -> str | BinaryIO:
    """What libraries that take a name or a file object are given: the name where they can open it themselves."""
    return str(path) if is_local(path) else cast(BinaryIO, path.open("rb"))
