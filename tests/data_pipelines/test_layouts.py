"""Folder layouts: what each gives, in which order, on which side of a split, and what it says about damage."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import pytest

from aromni_jax.structs import Task, Text
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from data_pipelines.source_kinds import KINDS, kinds_table, open_source
from data_pipelines.sources import MediaFile, RecordError
from tests.fixtures import published_layouts as made
from tests.fixtures.data_fakes import config_for, fake_bundle
from tests.fixtures.source_tree import ROOT

SPEECH, PICTURES = (Task.SPEECH_TO_TEXT, Task.TEXT_TO_SPEECH), (Task.CAPTION, Task.TEXT_TO_IMAGE)
# kind: (how to make it, items, tasks, text of its first item, file of its first item)
LAYOUTS: dict[str, tuple[Callable[[pathlib.Path], pathlib.Path], int, tuple[Task, ...], str, str]] = {
    "ljspeech": (made.ljspeech, 3, SPEECH, "Doctor LJ001-0001", "wavs/LJ001-0001.wav"),
    "librispeech": (made.librispeech, 6, SPEECH, "WORDS OF 1272-7-0000", "1272/7/1272-7-0000.flac"),
    "vctk": (made.vctk, 4, SPEECH, "Sentence 1.", "wav48_silence_trimmed/p225/p225_001_mic1.flac"),
    "common_voice": (made.common_voice, 6, SPEECH, 'He said "0".', "clips/common_voice_en_0.mp3"),
    "coco": (made.coco, 4, PICTURES, "Caption 0.", "val2017/000000000009.jpg"),
    "image_folder": (made.image_folder, 3, PICTURES, "the first", "a/one.png"),
}


def keys(source: str, **choices: object) -> list[str]:
    opened = open_source(source, **choices)  # type: ignore[arg-type]
    return [opened[i].key for i in range(len(opened))]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_becomes_records_of_both_tasks(kind: str, tmp_path: pathlib.Path) -> None:
    make, num_items, tasks, text, file = LAYOUTS[kind]
    path = make(tmp_path / "corpus")
    source = open_source(f"{kind}:{path}")
    assert len(source) == 2 * num_items and len(set(keys(f"{kind}:{path}"))) == 2 * num_items
    media = MediaFile("speech" if tasks == SPEECH else "image", tmp_path / "corpus" / file)
    first, second = source[0], source[1]
    assert (first.task, second.task) == tasks
    assert [message.parts for message in first.messages] == [(media,), (Text(text),)]
    assert [message.parts for message in second.messages] == [(Text(text),), (media,)]
    assert [message.role for message in first.messages] == ["user", "assistant"]
    assert [source[i].key for i in (5, 0, 3)] == [keys(f"{kind}:{path}")[i] for i in (5, 0, 3)]
    with pytest.raises(IndexError):
        source[2 * num_items]
    only = open_source(f"{kind}:{path}", tasks=tasks[1].label)
    assert len(only) == num_items and only[0].key == second.key and only.fingerprint != source.fingerprint

    config = config_for(pathlib.Path(f"{kind}:{path}"), split="")
    assert pretokenize(config, tmp_path / "data", bundle=fake_bundle())
    dataset = TokenDataset(tmp_path / "data")
    assert [stored.key for stored in dataset] == keys(f"{kind}:{path}")
    assert dataset.dataset["statistics"]["quarantined"] == {}


def test_a_new_speaker_moves_nobody_and_speakers_are_not_split(tmp_path: pathlib.Path) -> None:
    def sides(num_speakers: int) -> dict[str, str]:
        path = made.common_voice(tmp_path / str(num_speakers), num_speakers)
        both = {split: f"common_voice:{path}" for split in ("train", "heldout")}
        return {key: split for split, source in both.items() for key in keys(source, split=split, heldout_fraction=0.3)}

    few, many = sides(12), sides(20)
    assert len(few) == 48 and len(many) == 80 and set(few.values()) == {"train", "heldout"}
    assert few == {key: side for key, side in many.items() if key in few}
    for i in range(20):
        assert many[f"speech_to_text/common_voice_en_{2 * i}"] == many[f"text_to_speech/common_voice_en_{2 * i + 1}"]


def test_captions_of_one_picture_stay_together(tmp_path: pathlib.Path) -> None:
    path = made.coco(tmp_path / "coco")
    for fraction in (0.1, 0.3, 0.5, 0.7, 0.9):
        train = set() if fraction == 1 else {key.split("/")[1] for key in _or_none(path, "train", fraction)}
        heldout = {key.split("/")[1] for key in _or_none(path, "heldout", fraction)}
        assert not train & heldout and train | heldout == {"9", "25"}


def _or_none(path: pathlib.Path, split: str, fraction: float) -> list[str]:
    try:
        return keys(f"coco:{path}", split=split, heldout_fraction=fraction)
    except ValueError as error:
        assert "no conversation of split" in str(error)
        return []


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("ljspeech", ("metadata.csv", b"no fields here\n"), "metadata.csv:1.*id|text"),
        ("ljspeech", ("metadata.csv", b"LJ001-0001|\xff\xfe|x\n"), "metadata.csv:1.*utf-8"),
        ("librispeech", ("1272/7/1272-7.trans.txt", b"1272-7-0000\n"), "1272-7-0000: the text is empty"),
        ("vctk", ("txt/p225/p225_001.txt", b""), "the text is empty"),
        ("common_voice", ("validated.tsv", b"client_id\tpath\tsentence\nx\ty\n"), "validated.tsv:2.*2 fields where"),
        ("image_folder", ("a/one.txt", b"\xff"), "a/one.png.*utf-8"),
    ],
)
def test_a_bad_record_is_named(kind: str, damage: tuple[str, bytes], message: str, tmp_path: pathlib.Path) -> None:
    path = LAYOUTS[kind][0](tmp_path)
    (tmp_path / damage[0]).write_bytes(damage[1])
    for split in ("", "train", "heldout"):  # what cannot be read is reported on both sides
        source = open_source(f"{kind}:{path}", split=split, heldout_fraction=0.0 if split == "train" else 1.0)
        with pytest.raises(RecordError, match=message) as error:
            source[0]
        assert error.value.stage == "parse"
        if kind not in ("ljspeech", "common_voice"):
            break


def test_bad_records_of_layouts_are_quarantined_and_the_rest_is_kept(tmp_path: pathlib.Path) -> None:
    root = made.vctk(tmp_path / "vctk")
    for file in (root / "wav48_silence_trimmed" / "p225").glob("p225_002_*"):
        file.unlink()
    damaged = root / "wav48_silence_trimmed" / "p226" / "p226_001_mic1.flac"
    damaged.write_bytes(damaged.read_bytes()[:60])
    config = config_for(pathlib.Path(f"vctk:{root}"), split="", tasks="speech_to_text", max_bad_fraction=0.5)
    assert pretokenize(config, tmp_path / "data", bundle=fake_bundle())
    lines = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["where"], line["stage"]) for line in lines] == [
        ("txt/p225/p225_002.txt", "media"), ("txt/p226/p226_001.txt", "media"),
    ]  # fmt: skip
    assert "wav48*/p225/p225_002" in lines[0]["error"] and damaged.name in lines[1]["error"]
    assert [stored.key for stored in TokenDataset(tmp_path / "data")] == [
        "speech_to_text/p225_001", "speech_to_text/p226_002",
    ]  # fmt: skip


def test_pictures_without_a_caption_and_captions_without_a_picture(tmp_path: pathlib.Path) -> None:
    root = made.image_folder(tmp_path / "pictures")
    (root / "a" / "one.txt").unlink()
    (root / "a" / "two.json").write_text('{"label": 3}')
    source = open_source(f"image_folder:{root}")
    with pytest.raises(RecordError, match=r"a/one.png: there is no caption; write one.txt beside it"):
        source[0]
    with pytest.raises(RecordError, match=r"a/two.json: the JSON needs a text in the field caption or text"):
        source[2]
    path = made.coco(tmp_path / "coco")
    content = json.loads(path.read_text())
    content["annotations"][0] = {"id": 1, "image_id": 5, "caption": "x"}
    content["annotations"][1] = {"id": 1}
    path.write_text(json.dumps(content))
    source = open_source(f"coco:{path}", tasks="caption")
    with pytest.raises(RecordError, match=r"captions_val2017.json annotation 0: no picture has the id 5"):
        source[0]
    with pytest.raises(RecordError, match=r"annotation 1: the record lacks the field 'image_id'"):
        source[1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ljspech:x", r"unknown kind of source 'ljspech' .* did you mean 'ljspeech'\? kinds: manifest, ljspeech"),
        ("qqq:x", "unknown kind of source 'qqq' in 'qqq:x'; kinds: manifest"),
        ("manifest:none.jsonl", "there is no manifest none.jsonl"),
        ("ljspeech:none", "there is no none/metadata.csv; ljspeech: takes the folder"),
        ("librispeech:none", "none has no .*trans.txt"),
        ("vctk:none", "no VCTK folder"),
        ("common_voice:none", "there is no none; common_voice: takes"),
        ("coco:none.json", "there is no none.json; coco: takes"),
        ("image_folder:none", "none holds no picture"),
    ],
)
def test_what_is_not_there_is_said(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(source)


def test_tasks_a_layout_cannot_give_and_files_that_are_not_what_they_are_called(tmp_path: pathlib.Path) -> None:
    root = made.ljspeech(tmp_path / "lj")
    with pytest.raises(ValueError, match="cannot give caption; choose from speech_to_text, text_to_speech"):
        open_source(f"ljspeech:{root}", tasks="caption")
    with pytest.raises(ValueError, match="unknown task 'captoin'"):
        open_source(f"ljspeech:{root}", tasks="captoin")
    manifest = tmp_path / "a:b.jsonl"
    manifest.write_text('{"task": "text", "messages": [{"role": "assistant", "parts": [{"text": "x"}]}]}\n')
    assert len(open_source(str(manifest))) == 1  # a file whose name has a colon
    with pytest.raises(ValueError, match="leave config key 'tasks' empty"):
        open_source(str(manifest), tasks="text")
    with pytest.raises(ValueError, match="lacks client_id, sentence"):
        (tmp_path / "other.tsv").write_text("path\tx\n")
        open_source(f"common_voice:{tmp_path / 'other.tsv'}")
    path = made.coco(tmp_path / "coco")
    path.write_text('{"images": []}')
    with pytest.raises(ValueError, match="no COCO captions file"):
        open_source(f"coco:{path}")


def test_the_readme_lists_every_kind() -> None:
    assert kinds_table() in (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{kind}:" in kinds_table() for kind in KINDS)
