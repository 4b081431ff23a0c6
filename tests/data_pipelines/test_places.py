"""Corpora behind URLs: every kind but builders reads them as it reads a disk, and says what is not there."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator

import fsspec
import pytest

from data_pipelines import places
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from data_pipelines.source_kinds import open_source
from data_pipelines.sources import RecordError, Source
from tests.fixtures.corpora import CORPORA, source_of
from tests.fixtures.data_fakes import config_for, fake_bundle

REMOTE = [kind for kind in CORPORA if kind != "tfds"]


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """The file system in memory, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def uploaded(kind: str, root: pathlib.Path, store: fsspec.AbstractFileSystem) -> str:
    """Makes the corpus on disk and copies it; returns the source over the copy."""
    source_of(kind, root)
    for file in root.rglob("*"):
        if file.is_file():
            store.pipe(f"/bucket/{kind}/{file.relative_to(root).as_posix()}", file.read_bytes())
    return f"{kind}:memory://bucket/{kind}/{CORPORA[kind].path}"


def contents(source: Source) -> list[tuple]:
    """Keys, places, text and bytes of everything."""
    found: list[tuple] = []
    for i in range(len(source)):
        media = []
        for file in source[i].media():
            with file.on_disk() as path:
                assert isinstance(path, pathlib.Path) and path.read_bytes() == file.content()
                media.append(file.content())
        found.append((source[i].key, source.where(i), media, source[i].facts))
    return found


@pytest.mark.parametrize("kind", REMOTE)
def test_a_url_gives_what_the_disk_gives(kind: str, tmp_path: pathlib.Path, store: fsspec.AbstractFileSystem) -> None:
    columns = CORPORA[kind].columns
    remote = open_source(uploaded(kind, tmp_path / kind, store), columns=columns)
    disk = tmp_path / kind / CORPORA[kind].path
    for local in (f"{kind}:{disk}", f"{kind}:{disk.as_uri()}"):
        opened = open_source(local, columns=columns)
        assert contents(remote) == contents(opened) and remote.fingerprint == opened.fingerprint


@pytest.mark.parametrize("suffix", [".arrow", ".feather"])
def test_arrow_files_behind_urls(suffix: str, tmp_path: pathlib.Path, store: fsspec.AbstractFileSystem) -> None:
    from tests.fixtures import published_layouts as made

    path = made.write_table(tmp_path / f"a{suffix}", made.table_of_pictures(tmp_path))
    for file in tmp_path.iterdir():
        store.pipe(f"/bucket/{file.name}", file.read_bytes())
    columns = {"text": "caption", "image": "jpg"}
    remote = open_source(f"table:memory://bucket/a{suffix}", columns=columns)
    assert contents(remote) == contents(open_source(f"table:{path}", columns=columns))


def test_patterns_and_pretokenizing_behind_urls(tmp_path: pathlib.Path, store: fsspec.AbstractFileSystem) -> None:
    source = uploaded("webdataset", tmp_path / "tars", store)
    some = open_source(f"{source}/part-00[01].tar", tasks="caption")
    assert len(some) == 8 and some.where(7) == "part-001.tar/001/s3"
    uploaded("manifest", tmp_path / "manifest", store)
    store.rm("/bucket/manifest/media/2.png")
    config = config_for("memory://bucket/manifest/manifest.jsonl", split="", max_bad_fraction=0.5)  # type: ignore[arg-type]
    assert pretokenize(config, tmp_path / "data", bundle=fake_bundle())
    (line,) = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert line["stage"] == "media" and "memory://bucket/manifest/media/2.png" in line["error"]
    assert [stored.key for stored in TokenDataset(tmp_path / "data")] == [f"k{i}" for i in range(8) if i != 2]


def test_media_of_a_manifest_may_be_urls(tmp_path: pathlib.Path, store: fsspec.AbstractFileSystem) -> None:
    uploaded("manifest", tmp_path / "manifest", store)
    message = {"role": "user", "parts": [{"image": "memory://bucket/manifest/media/0.png"}]}
    (tmp_path / "here.jsonl").write_text(json.dumps({"task": "caption", "messages": [message]}))
    (file,) = open_source(str(tmp_path / "here.jsonl"))[0].media()
    assert not file.is_on_disk and file.content() == (tmp_path / "manifest" / "media" / "0.png").read_bytes()
    assert str(file) == "memory://bucket/manifest/media/0.png"


@pytest.mark.parametrize("kind", REMOTE)
def test_what_is_not_behind_a_url_is_said(kind: str, store: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(ValueError, match="memory://bucket/none"):
        open_source(f"{kind}:memory://bucket/none", columns=CORPORA[kind].columns)


def test_an_object_that_vanished_is_named(tmp_path: pathlib.Path, store: fsspec.AbstractFileSystem) -> None:
    source = open_source(uploaded("webdataset", tmp_path, store), tasks="caption")
    (file,) = source[0].media()
    store.store.clear()
    with (
        pytest.raises(RecordError, match="memory://bucket/webdataset/tars/part-000.tar/000/s0.png") as raised,
        file.on_disk(),
    ):
        pass
    assert raised.value.stage == "media"


@pytest.mark.parametrize(
    ("url", "module", "message"),
    [
        ("gs://bucket/a.jsonl", "gcsfs", "gs://bucket/a.jsonl needs a library: pip install gcsfs"),
        ("s3://bucket/a.jsonl", "s3fs", "s3://bucket/a.jsonl needs a library: pip install s3fs"),
        ("gs://bucket/a.jsonl", "upath", "needs libraries: pip install universal_pathlib gcsfs"),
        ("memory://a.jsonl", "fsspec", "needs libraries: pip install universal_pathlib"),
        ("gss://bucket/a.jsonl", "", "nothing reads URLs that begin with gss://; use gs:// or s3://"),
    ],
)
def test_a_missing_library_is_said(url: str, module: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        open_source(f"text:{url}")


def test_paths_and_urls_are_told_apart(tmp_path: pathlib.Path) -> None:
    assert places.located("a/b") == pathlib.Path("a/b") and places.is_local(places.located("a:b"))
    assert places.located("file:///a%20b/c") == pathlib.Path("/a b/c")
    assert not places.is_local(places.located("memory://a/b"))
    assert places.beside(tmp_path, "x/y.png") == tmp_path / "x" / "y.png"
    assert str(places.beside(tmp_path, "memory://x/y.png")) == "memory://x/y.png"
    assert str(places.beside(places.located("memory://a"), "y.png")) == "memory://a/y.png"
    (tmp_path / "f").write_bytes(bytes(range(100)))
    for path in (tmp_path / "f", places.located("memory://f")):
        path.write_bytes(bytes(range(100)))
        assert places.read_range(path, 10, 5) == bytes(range(10, 15))
        assert places.read_range(path, 95, 50) == bytes(range(95, 100))
