"""The manifest source: what it reads, how it splits, and what it says about bad lines and files."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from aromni_jax.structs import Task, Text
from data_pipelines.espeak import write_wav
from data_pipelines.sources import HELDOUT, ManifestSource, MediaFile, RecordError, check_complete, split_by_group

GOOD = {
    "key": "a",
    "task": "caption",
    "split": "train",
    "messages": [
        {"role": "user", "parts": [{"image": "x/1.png"}]},
        {"role": "assistant", "parts": [{"text": "Zürich 漢字"}]},
    ],
    "facts": {"label": "x"},
}


def write(path: pathlib.Path, lines: list) -> pathlib.Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def test_reads_lines_at_random_and_resolves_paths(tmp_path: pathlib.Path) -> None:
    manifest = write(tmp_path / "m.jsonl", [GOOD | {"key": f"k{i}"} for i in range(5)] + ["", GOOD | {"key": "last"}])
    source = ManifestSource(manifest, split="train")
    assert [source[i].key for i in (5, 0, 3)] == ["last", "k0", "k3"]
    conversation = source[1]
    assert conversation.task == Task.CAPTION and conversation.facts == {"label": "x"}
    assert list(conversation.media()) == [MediaFile("image", tmp_path / "x" / "1.png")]
    assert conversation.messages[1].parts == (Text("Zürich 漢字"),)
    assert source.where(5) == "m.jsonl:7"
    assert source.media_paths("image") == [tmp_path / "x" / "1.png"] and list(source.texts()) == ["Zürich 漢字"] * 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not a conversation"),
        ({"task": "caption"}, "lacks the field 'messages'"),
        (GOOD | {"task": "captoin"}, "unknown task"),
        (GOOD | {"messages": []}, "non-empty"),
        (GOOD | {"messages": [{"role": "user", "parts": [{"video": "x"}]}]}, "one of text"),
        (GOOD | {"messages": [{"role": "user", "parts": [{"text": 3}]}]}, "one of text"),
        (GOOD | {"facts": 3}, "facts"),
        ("[1, 2]", "not a conversation"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: pathlib.Path, line: object, message: str) -> None:
    source = ManifestSource(write(tmp_path / "m.jsonl", [GOOD, line]))
    assert source[0].key == "a"
    with pytest.raises(RecordError, match=message) as error:
        source[1]
    assert "m.jsonl:2" in str(error.value) and error.value.stage == "parse"


def test_no_manifest_and_no_such_split(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="there is no manifest"):
        ManifestSource(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no conversation of split 'test'; it has train"):
        ManifestSource(write(tmp_path / "m.jsonl", [GOOD]), split="test")


def test_splits_by_group_hash_whatever_the_order(tmp_path: pathlib.Path) -> None:
    lines = [
        {k: v for k, v in GOOD.items() if k != "split"} | {"key": f"k{i}", "group": f"g{i // 3}"} for i in range(300)
    ]
    source = ManifestSource(write(tmp_path / "a.jsonl", lines), split="heldout", heldout_fraction=0.2)
    backwards = ManifestSource(write(tmp_path / "b.jsonl", lines[::-1]), split="heldout", heldout_fraction=0.2)
    keys = {source[i].key for i in range(len(source))}
    assert keys == {backwards[i].key for i in range(len(backwards))}
    assert 20 < len(keys) < 100
    assert keys == {line["key"] for line in lines if split_by_group(line["group"], 0.2) == HELDOUT}


def test_a_wav_cut_short_is_an_error(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, np.zeros(1000, np.float32))
    check_complete(MediaFile("speech", path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match="cut short"):
        check_complete(MediaFile("speech", path))
