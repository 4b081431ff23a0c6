"""Text, tars and tables: random access equals order, splits follow content, damage has a defined answer."""

from __future__ import annotations

import gzip
import json
import pathlib
import sys
import tarfile
from collections.abc import Callable

import numpy as np
import pytest

from aromni_jax.structs import Task, Text
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from data_pipelines.source_kinds import open_source
from data_pipelines.sources import RecordError, Source
from tests.fixtures import published_layouts as made
from tests.fixtures.data_fakes import config_for, fake_bundle


def texts(source: Source) -> list[str]:
    return list(source.texts())


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames, as parallel compressors write them
    return b"".join(zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in (data[:half], data[half:]))


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstd}
DOCUMENTS = [f"document {i}: " + "lorem ipsum — " * (i % 5) + "end" for i in range(60)]


@pytest.mark.parametrize("compression", PACKERS)
def test_lines_of_text_read_alike_however_compressed(compression: str, tmp_path: pathlib.Path) -> None:
    content = "\n\n".join(DOCUMENTS).encode() + b"\r\n"
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("the only line")
    (tmp_path / "b" / f"a.txt{compression}").write_bytes(PACKERS[compression](content))
    (tmp_path / "b" / "notes.md").write_text("not a text of this corpus")
    source = open_source(f"text:{tmp_path}")
    assert texts(source) == ["the only line", *DOCUMENTS]
    order = np.random.default_rng(0).permutation(len(source))
    assert [source[int(i)].messages[0].parts for i in order] == [(Text(texts(source)[i]),) for i in order]
    assert source[0].key == "text/a.txt:1" and source.where(2) == f"b/a.txt{compression}:3"
    assert source[0].task == Task.TEXT and [message.role for message in source[0].messages] == ["assistant"]
    assert len(open_source(f"text:{tmp_path}/b/*.txt*")) == 60


def test_the_side_of_a_text_is_its_content(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.txt"

    def heldout(lines: list[str]) -> set[str]:
        path.write_text("\n".join(lines))
        return set(texts(open_source(f"text:{path}", split="heldout", heldout_fraction=0.3)))

    few = heldout(DOCUMENTS[:40])
    assert few == heldout(DOCUMENTS[:40] * 2) and 0 < len(few) < 40
    assert heldout(DOCUMENTS[::-1]) & set(DOCUMENTS[:40]) == few
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / "files" / str(number)).mkdir(parents=True)
        (tmp_path / "files" / str(number) / "same_name.txt").write_text(document + "\n")
    files = open_source(f"text_files:{tmp_path / 'files'}", split="heldout", heldout_fraction=0.3)
    assert set(texts(files)) == heldout(DOCUMENTS)


def test_damaged_text_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe bad\nlast\n")
    source = open_source(f"text:{tmp_path}")
    assert len(source) == 3 and source[2].key == "text/a.txt:3"
    with pytest.raises(RecordError, match=r"a.txt:2: not text in UTF-8, convert it: .*byte 0xff"):
        source[1]
    for compression in (".gz", ".zst"):
        packed = PACKERS[compression]("\n".join(DOCUMENTS).encode())
        path = tmp_path / f"cut.txt{compression}"
        for damaged in (packed[:-20], packed[:50] + bytes(8) + packed[58:]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"cut.txt{compression} cannot be read to its end"):
                open_source(f"text:{path}")
            files = open_source(f"text_files:{path}", split="train")
            with pytest.raises(RecordError, match=f"cut.txt{compression}: not a conversation"):
                files[0]
    with pytest.raises(ValueError, match="none names no file; give a file, a pattern or a folder with .txt"):
        open_source("text:none")


def test_a_missing_library_is_said_with_its_remedy(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(ValueError, match="pip install zstandard"):
        open_source(f"text:{tmp_path}")


def test_tars_are_read_at_random_and_by_pretokenize(tmp_path: pathlib.Path) -> None:
    root = made.pictures_in_tars(tmp_path / "tars")
    source = open_source(f"webdataset:{root}/part-*.tar")
    assert source.tasks == (Task.CAPTION, Task.TEXT_TO_IMAGE) and len(source) == 16
    assert texts(source) == [f"shade {shard} {i}" for shard in range(2) for i in range(4)]
    assert source[15].key == "text_to_image/part-001.tar/001/s3" and source.where(0) == "part-000.tar/000/s0"
    with pytest.raises(ValueError, match="holds image records that are no files on a disk"):
        source.media_paths("image")
    config = config_for(pathlib.Path(f"webdataset:{root}"), split="", tasks="caption", records_per_shard=3)
    assert pretokenize(config, tmp_path / "data", bundle=fake_bundle())
    bundle = fake_bundle()
    vocab = bundle.vocab()
    for i, stored in enumerate(TokenDataset(tmp_path / "data")):
        (picture,) = [span for span in stored.example.spans if span.modality == 1 and span.part >= 0]
        rows = stored.tokens_L[picture.start + 1 : picture.start + picture.length - 1]
        assert (vocab.rows_to_image(rows) == 10 * i // 4).all()


def test_a_new_tar_moves_no_sample(tmp_path: pathlib.Path) -> None:
    def heldout(num_shards: int) -> set[str]:
        root = made.pictures_in_tars(tmp_path / str(num_shards), num_shards)
        return set(texts(open_source(f"webdataset:{root}", split="heldout", heldout_fraction=0.4)))

    few, many = heldout(3), heldout(5)
    assert few == {text for text in many if int(text.split()[1]) < 3} and 0 < len(few) < 12


def test_damaged_tars_and_samples(tmp_path: pathlib.Path) -> None:
    root = made.pictures_in_tars(tmp_path / "tars", 1)
    path = root / "part-000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        picture = tar.getmember("000/s1.png")
    path.write_bytes(whole[: picture.offset_data + 10] + bytes(40) + whole[picture.offset_data + 50 :])
    config = config_for(pathlib.Path(f"webdataset:{root}"), split="", tasks="caption", max_bad_fraction=0.5)
    assert pretokenize(config, tmp_path / "data", bundle=fake_bundle())
    (line,) = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert line["where"] == "part-000.tar/000/s1" and line["stage"] == "media"
    assert "part-000.tar/000/s1.png" in line["error"] and "/tmp/tmp" not in line["error"]
    speech = open_source(f"webdataset:{root}", tasks="speech_to_text")
    with pytest.raises(RecordError, match="part-000.tar/000/s0: there is no picture or utterance"):
        speech[0]
    path.write_bytes(whole[: picture.offset_data + 10])
    with pytest.raises(ValueError, match="part-000.tar is no whole, uncompressed tar"):
        open_source(f"webdataset:{root}")
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match="decompress or fetch it again"):
        open_source(f"webdataset:{root}")


def test_utterances_and_text_in_tars(tmp_path: pathlib.Path) -> None:
    made.sound(tmp_path / "a.wav")
    for suffix, tasks in ((".wav", (Task.SPEECH_TO_TEXT, Task.TEXT_TO_SPEECH)), (".cls", (Task.TEXT,))):
        with tarfile.open(tmp_path / f"x{suffix}.tar", "w") as tar:
            (tmp_path / "a.txt").write_text("words")
            tar.add(tmp_path / "a.wav", f"a{suffix}")
            tar.add(tmp_path / "a.txt", "a.txt")
            tar.add(tmp_path / "a.wav", "b.wav")  # has no text
        source = open_source(f"webdataset:{tmp_path / f'x{suffix}.tar'}")
        assert source.tasks == tasks and source[0].messages[-1].role == "assistant"
        with pytest.raises(RecordError, match="b: there is no member .txt or .json"):
            source[len(tasks)]
        for file in source[0].media():
            with file.on_disk() as path:
                assert path.read_bytes() == (tmp_path / "a.wav").read_bytes() and path.suffix == ".wav"
            assert not path.exists()
