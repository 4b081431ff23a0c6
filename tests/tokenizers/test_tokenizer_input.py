"""`aromni tokenizer` on every kind of source: texts, pictures and sound inside other files or behind URLs."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import fsspec
import numpy as np
import pytest
import test_image
import test_speech

from aromni_jax.config import to_json
from aromni_jax.tokenizers.image import ImageTokenizer
from data_pipelines.source_kinds import open_source
from launch import tokenizer_input
from launch.cli import build_parser, run
from tests.fixtures import published_layouts as made
from tests.fixtures.corpora import CORPORA, source_of

PICTURES = ("manifest", "coco", "image_folder", "webdataset", "table", "tfds")
SPEECH = ("manifest", "ljspeech", "librispeech", "vctk", "common_voice", "tfds")


def parsed(kind: str, source: str, columns: dict[str, str], *more: str) -> Any:
    flags = [f"--kind={kind}", "--tokenizer=unused", f"--input={source}", f"--columns={columns}", *more]
    return build_parser("tokenizer").parse_args(["train", *flags])


@pytest.mark.parametrize("kind", [kind for kind in CORPORA if not kind.startswith("released")])
def test_texts_of_every_kind_come_once(kind: str, tmp_path: pathlib.Path) -> None:
    source, columns = source_of(kind, tmp_path), CORPORA[kind].columns
    pieces = list(tokenizer_input.pieces_of_text(parsed("text", source, columns)))
    opened = open_source(source, columns=columns)
    assert len(pieces) == CORPORA[kind].num_items == len(opened) // max(1, len(opened.tasks))
    assert pieces == list(opened.texts()) == tokenizer_input.texts(parsed("text", source, columns))


@pytest.mark.parametrize(
    ("kind", "media"), [*((kind, "image") for kind in PICTURES), *((kind, "speech") for kind in SPEECH)]
)
def test_media_of_every_kind_come_once(kind: str, media: str, tmp_path: pathlib.Path) -> None:
    source, columns = source_of(kind, tmp_path), CORPORA[kind].columns
    if kind == "tfds" and media == "speech":
        columns = {"text": "caption", "speech": "sound"}
    files = tokenizer_input.media(parsed(media, source, columns))
    assert {"manifest": 4, "coco": 2}.get(kind, CORPORA[kind].num_items) == len(set(files)) == len(files)
    told: list[str] = []

    def size(path: pathlib.Path, report: Any) -> int:
        report(f"{path}: seen")
        return len(path.read_bytes())

    sizes = tokenizer_input.prepared(files, size, told.append)
    assert list(sizes) == files and list(sizes.values()) == [len(file.content()) for file in files]
    assert told == [f"{file}: seen" for file in files]


def test_a_picture_tokenizer_is_trained_on_a_tar_and_a_table(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = json.loads(to_json(test_image.TINY))
    recipe["recipe"]["total_steps"] = 2
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    for kind in ("webdataset", "table"):
        source, columns = source_of(kind, tmp_path / kind), CORPORA[kind].columns
        flags = ["--kind=image", f"--tokenizer={tmp_path / kind / 'ours'}", f"--input={source}", f"--columns={columns}"]
        assert run("tokenizer", ["train", *flags, f"--recipe={tmp_path / 'recipe.json'}", "--max_files=5"]) == 0
        assert f"learning from 5 of {CORPORA[kind].num_items}, drawn with seed 0" in capsys.readouterr().out
        assert ImageTokenizer.load(tmp_path / kind / "ours").num_codes == recipe["num_codes"]
        page = tmp_path / "page.html"
        assert run("tokenizer", ["evaluate", *flags, f"--report={page}"]) == 0
        assert ("s1.png" if kind == "webdataset" else "row 1, column jpg") in page.read_text()


def test_a_speech_tokenizer_is_trained_on_mp3_behind_a_url(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    files = fsspec.filesystem("memory")
    made.common_voice(tmp_path / "cv")
    for file in (file for file in (tmp_path / "cv").rglob("*") if file.is_file()):
        files.pipe(f"/voices/{file.relative_to(tmp_path / 'cv').as_posix()}", file.read_bytes())
    (tmp_path / "recipe.json").write_text(to_json(test_speech.TINY))
    flags = ["--kind=speech", f"--tokenizer={tmp_path / 'ours'}", "--input=common_voice:memory://voices"]
    assert run("tokenizer", ["train", *flags, f"--recipe={tmp_path / 'recipe.json'}", "--total_steps=2"]) == 0
    told = capsys.readouterr().out
    assert "memory://voices/clips/common_voice_en_0.mp3 and 5 more: 16000 Hz, 1 channel, converted to 4000 Hz" in told


def test_a_text_tokenizer_is_trained_on_a_builder(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    source, columns = source_of("tfds", tmp_path), CORPORA["tfds"].columns
    flags = ["--kind=text", f"--tokenizer={tmp_path / 'text'}", f"--input={source}", f"--columns={columns}"]
    assert run("tokenizer", ["train", *flags, "--vocab_size=280", "--split=train", "--max_lines=4"]) == 0
    assert "6 lines of text; learning from 4 of them, sampled with seed 0" in capsys.readouterr().out


def test_few_bad_records_are_left_out_and_told_many_are_an_error(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    def tars(good: int) -> str:
        made.ljspeech(tmp_path / str(good), tuple(f"LJ-{i:03d}" for i in range(good)))
        table = tmp_path / str(good) / "metadata.csv"
        table.write_text(table.read_text() + "a line without a text\n")
        (tmp_path / str(good) / "wavs" / "LJ-000.wav").write_bytes(b"RIFF")
        return f"ljspeech:{tmp_path / str(good)}"

    def size(path: pathlib.Path, report: Any) -> int:
        if path.stat().st_size < 10:
            raise ValueError(f"{path} is no sound")
        return 1

    files = tokenizer_input.media(parsed("speech", tars(120), {}))
    assert len(tokenizer_input.prepared(files, size)) == 119
    told = capsys.readouterr().out
    assert "1 of 121 could not be read and are left out; the first: metadata.csv:121" in told
    assert "1 of 120 could not be read and are left out; the first:" in told and "LJ-000.wav is no sound" in told
    with pytest.raises(ValueError, match="metadata.csv:4"):
        tokenizer_input.media(parsed("speech", tars(3), {}))


def test_what_holds_nothing_is_said(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    source = source_of("text", tmp_path)
    assert run("tokenizer", ["train", "--kind=image", f"--tokenizer={tmp_path / 'a'}", f"--input={source}"]) == 1
    assert f"--input={source} holds no image" in capsys.readouterr().err
    flags = ["train", "--kind=text", f"--tokenizer={tmp_path / 'a'}"]
    assert run("tokenizer", [*flags, "--input=tabel:x"]) == 1
    assert "did you mean 'table'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("tokenizer", [*flags, "--input=table:x", "--columns=text"])
    assert "is no mapping of names" in capsys.readouterr().err
    assert run("tokenizer", ["train", "--kind=image", "--tokenizer=x", f"--input={source}", "--max_files=0"]) == 1
    assert "--max_files=0: give at least one" in capsys.readouterr().err


def test_the_draw_of_files_is_seeded(tmp_path: pathlib.Path) -> None:
    for i in range(20):
        made.picture(tmp_path / f"{i:02d}.png", i)
    draws = [
        [file.path.name for file in tokenizer_input.media(parsed("image", str(tmp_path), {}, "--max_files=6", seed))]
        for seed in ("--seed=0", "--seed=0", "--seed=1")
    ]
    assert draws[0] == draws[1] == sorted(draws[0]) != draws[2] and all(len(draw) == 6 for draw in draws)
    assert np.unique(draws[0]).size == 6
