"""Records that teach nothing or lie in no data set are said, each with its reason, whatever becomes of the run."""

from __future__ import annotations

import contextlib
import errno
import json
import pathlib
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from aromni_jax.config import LossConfig
from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.text import ByteText
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from data_pipelines.source_kinds import open_source
from data_pipelines.survey import survey, survey_text
from launch.cli import main
from tests.fixtures.data_fakes import config_for, fake_bundle, write_corpus


def record(key: str, task: str, *turns: tuple[str, list[dict[str, str]]], **fields: Any) -> dict[str, Any]:
    messages = [{"role": role, "parts": parts} for role, parts in turns]
    return {"key": key, "task": task, "split": "train", "messages": messages, **fields}


def words(key: str, **fields: Any) -> dict[str, Any]:
    return record(key, "text", ("assistant", [{"text": "words"}]), **fields)


def written(path: pathlib.Path, records: list[Any]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    return path


def quarantined(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    return {line["key"]: line for line in map(json.loads, file.read_text().splitlines())}


def test_turns_that_teach_to_say_nothing_are_quarantined(tmp_path: pathlib.Path) -> None:
    manifest = write_corpus(tmp_path, 4)
    picture, text = [{"image": "picture_0.png"}], [{"text": "a star"}]
    refused = [
        record("no answer", "caption", ("user", picture)),
        record("reversed", "caption", ("assistant", text), ("user", picture)),
        record("ends with a question", "chat", ("user", text), ("assistant", text), ("user", text)),
        record("empty answer", "caption", ("user", picture), ("assistant", [{"text": ""}])),
        record("empty question", "text_to_image", ("user", [{"text": " \n"}]), ("assistant", picture)),
        record("empty transcript", "chat", ("user", text), ("assistant", [{"transcript": ""}, *text])),
        record("silent", "chat", ("user", text), ("assistant", [])),
        record("blank text", "text", ("assistant", [{"text": "\t"}])),
    ]
    written(manifest, [*refused, record("good", "chat", ("user", text), ("assistant", text))])
    assert pretokenize(config_for(manifest, max_bad_fraction=1.0), tmp_path / "data", bundle=fake_bundle())
    assert [stored.key for stored in TokenDataset(tmp_path / "data")] == ["good"]
    found = quarantined(tmp_path / "data" / "quarantine.jsonl")
    assert list(found) == [line["key"] for line in refused] and {line["stage"] for line in found.values()} == {"encode"}
    assert "this one has assistant, user" in found["reversed"]["error"]
    assert "turn 2 (assistant) has an empty text" in found["empty answer"]["error"]
    assert "turn 2 (assistant) has no parts" in found["silent"]["error"]


def test_splits_of_other_names_are_counted_and_said(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    lines = [
        words("a"), words("b", split="heldout"), words("c", split="trian"), words("d", split="validation"),
        words("e", split="trian"), words("f", split=5), words("g", split=None),
    ]  # fmt: skip
    manifest = written(tmp_path / "manifest.jsonl", lines)
    TokenizerBundle(ByteText()).save(tmp_path / "bytes")
    flags = [f"--config.source={manifest}", f"--config.tokenizers={tmp_path / 'bytes'}", "--config.max_bad_fraction=1"]
    told = "3 records of split 'trian', 'validation' are in no data set of split train or heldout"
    for split, keys in (("train", ["a"]), ("heldout", ["b"])):
        output = tmp_path / split
        assert main(["pretokenize", f"--config=configs/pretokenize.py:{split}", *flags, f"--output={output}"]) == 0
        assert told in capsys.readouterr().out
        dataset = TokenDataset(output)
        assert [stored.key for stored in dataset] == keys
        assert dataset.dataset["unclaimed"] == {"trian": 2, "validation": 1}
        # What is no split at all is nobody's, and so reported by everybody.
        found = quarantined(output / "quarantine.jsonl")
        assert list(found) == ["f", "g"] and "split must be a string, 'train' or 'heldout', not null" in str(found["g"])
        assert main(["show", f"--data={output}", "--statistics"]) == 0
        assert told in capsys.readouterr().out
    assert open_source(str(manifest), split="validation").unclaimed == {"trian": 2}


def test_too_many_bad_records_are_all_in_a_file_that_is_named(tmp_path: pathlib.Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", 40)
    lines = manifest.read_text().splitlines()
    (manifest.parent / "picture_0.png").unlink()
    lines[3] = json.dumps(json.loads(lines[3]) | {"task": "captoin"})
    lines[4] = json.dumps(json.loads(lines[4]) | {"messages": [{"role": "user", "parts": [{"text": "x"}]}]})
    lines[5] = "{broken"
    written(manifest, lines)
    told: list[int] = []
    data = tmp_path / "data"
    with pytest.raises(ValueError, match=f"4 in shard_00000.*{data}/shard_00000.quarantine.jsonl.*max_bad_fraction`"):
        pretokenize(
            config_for(manifest), data, bundle=fake_bundle(), progress=lambda event: told.append(event["quarantined"])
        )
    found = quarantined(data / "shard_00000.quarantine.jsonl")
    assert list(found) == ["text_to_image/0", "text_to_speech/3", "text/4", ""]
    # What does not read is known before the first picture is encoded, the rest as it is found.
    assert told[0] == 3 and told[-1] == 4
    assert pretokenize(config_for(manifest, max_bad_fraction=0.1), data, bundle=fake_bundle())


def test_statistics_say_a_place_once(tmp_path: pathlib.Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", 10)
    (manifest.parent / "picture_0.png").unlink()
    lines = manifest.read_text().splitlines()
    written(manifest, [*lines, "{broken"])
    assert pretokenize(config_for(manifest, max_bad_fraction=1.0), tmp_path / "data", bundle=fake_bundle())
    text = survey_text(
        survey(tmp_path / "data", sequence_length=64, loss=LossConfig("uniform", 0.0, "predict", 0.0, 1))
    )
    assert text.count("manifest.jsonl:11: not a conversation") == text.count("manifest.jsonl:11") == 1
    assert "media: manifest.jsonl:1: " in text


def test_texts_without_lines_or_in_another_encoding_are_said(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    for split in ("", "train"):
        with pytest.raises(ValueError, match=r"empty.txt is empty: it has no record to read"):
            open_source(f"text:{tmp_path / 'empty.txt'}", split=split)
    (tmp_path / "latin.txt").write_bytes("Zürich\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt:1: not text in UTF-8, convert it: .*byte 0xfc in position 1"):
        open_source(f"text:{tmp_path / 'latin.txt'}")[0]


def test_shipped_codecs_alone_are_no_tokenizers_of_a_data_set(tmp_path: pathlib.Path) -> None:
    config = config_for(written(tmp_path / "manifest.jsonl", [words("a")]), tokenizers="shipped")
    with pytest.raises(ValueError, match="tokenizer import --kind=image --input=shipped --tokenizer=DIR/image"):
        pretokenize(config, tmp_path / "data")


def test_an_output_that_is_a_file_is_refused(tmp_path: pathlib.Path) -> None:
    manifest = written(tmp_path / "manifest.jsonl", [words("a")])
    with pytest.raises(ValueError, match="manifest.jsonl is a file; --output must name a directory"):
        pretokenize(config_for(manifest), manifest, bundle=fake_bundle())


@contextlib.contextmanager
def files_of_4_kib() -> Iterator[None]:
    """The system takes no more than 4 KiB into a file, as a full disk takes no more at all."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_the_disk_does_not_take_is_an_error_of_the_system_that_names_the_file(tmp_path: pathlib.Path) -> None:
    letters = np.random.default_rng(0).integers(33, 127, (40, 900))
    texts = ["".join(map(chr, row)) for row in letters.tolist()]
    lines = [record(str(n), "text", ("assistant", [{"text": text}])) for n, text in enumerate(texts)]
    config = config_for(written(tmp_path / "manifest.jsonl", lines))
    with files_of_4_kib(), pytest.raises(OSError, match="File too large: '.*shard_00000-data") as caught:
        pretokenize(config, tmp_path / "data", bundle=fake_bundle())
    assert caught.value.errno == errno.EFBIG
    assert pretokenize(config, tmp_path / "data", bundle=fake_bundle())
