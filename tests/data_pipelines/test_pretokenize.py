"""Pre-tokenizing exactly once: any number of workers, killed at any moment, same bytes; bad records are kept."""

from __future__ import annotations

import hashlib
import json
import pathlib

import pytest

from aromni_jax.structs import Image, Speech
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.text import ByteText
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from launch.cli import main
from launch.pretokenize import progress_line, worker_of
from tests.fixtures.data_fakes import config_for, fake_bundle, make_dataset, write_corpus


def digests(directory: pathlib.Path) -> dict[str, str]:
    names = [path for path in directory.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: pathlib.Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", 60)
    config, bundle = config_for(manifest), fake_bundle()
    assert pretokenize(config, tmp_path / "one", bundle=bundle)
    finished = [pretokenize(config, tmp_path / "three", shard_index=i, num_shards=3, bundle=bundle) for i in (2, 0, 1)]
    assert finished == [False, False, True]
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    other_batch = config_for(manifest, media_batch_size=3)
    assert pretokenize(other_batch, tmp_path / "small", bundle=bundle)
    assert digests(tmp_path / "one") == digests(tmp_path / "small")


def test_a_finished_shard_is_not_made_again(tmp_path: pathlib.Path) -> None:
    data = make_dataset(tmp_path, 40)
    before = {path: path.stat().st_mtime_ns for path in data.glob("shard_*")}
    (data / "shard_00001.json").unlink()
    config = config_for(tmp_path / "corpus-data" / "manifest.jsonl")
    assert pretokenize(config, data, bundle=fake_bundle())
    changed = {path.name.split(".")[0] for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed == {"shard_00001"}


def test_bad_records_are_quarantined_with_reasons(tmp_path: pathlib.Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", 40)
    root = manifest.parent
    (root / "picture_0.png").write_bytes((root / "picture_0.png").read_bytes()[:60])  # text_to_image/0
    (root / "sound_2.wav").write_bytes(b"RIFF....")  # speech_to_text/2
    (root / "picture_6.png").unlink()  # caption/6
    lines = manifest.read_text().splitlines()
    lines[10] = "{broken"
    stray = json.loads(lines[20])
    stray["messages"][0]["parts"].append({"speech": "sound_3.wav"})
    lines[20] = json.dumps(stray)
    manifest.write_text("\n".join(lines) + "\n")

    assert pretokenize(config_for(manifest, max_bad_fraction=0.2), tmp_path / "data", bundle=fake_bundle())
    found = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["record"], line["stage"]) for line in found] == [
        (0, "media"), (2, "media"), (6, "media"), (10, "parse"), (20, "encode"),
    ]  # fmt: skip
    assert "picture_0.png" in found[0]["error"] and found[3]["where"] == "manifest.jsonl:11"
    dataset = TokenDataset(tmp_path / "data")
    assert len(dataset) == 35
    assert dataset.dataset["statistics"]["quarantined"] == {"encode": 1, "media": 3, "parse": 1}

    with pytest.raises(ValueError, match=r"too many bad records: \d in shard_0000\d.*the first"):
        pretokenize(config_for(manifest, max_bad_fraction=0.05), tmp_path / "strict", bundle=fake_bundle())
    assert not (tmp_path / "strict" / "dataset.json").exists()


def test_what_is_allowed_to_be_bad_does_not_depend_on_the_number_of_workers(tmp_path: pathlib.Path) -> None:
    """One bad record of 48 is allowed, though it is one of a worker's 16; two are not, though no worker has two."""
    manifest = write_corpus(tmp_path / "corpus", 48)
    config = config_for(manifest, max_bad_fraction=0.03)

    def worker(index: int, output: str) -> bool:
        return pretokenize(config, tmp_path / output, shard_index=index, num_shards=3, bundle=fake_bundle())

    (manifest.parent / "picture_0.png").unlink()
    assert [worker(index, "one") for index in range(3)] == [False, False, True]
    (manifest.parent / "picture_20.png").unlink()
    assert [worker(index, "two") for index in range(2)] == [False, False]
    with pytest.raises(ValueError, match="2 of 48 records are bad, more than max_bad_fraction 0.03"):
        worker(2, "two")


def test_what_encoded_the_media_stays_known(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_dataset(tmp_path, 20)
    before = (data / "dataset.json").read_bytes()
    monkeypatch.setattr("jax.devices", lambda: pytest.fail("asked again"))
    assert pretokenize(config_for(tmp_path / "corpus-data" / "manifest.jsonl"), data, bundle=fake_bundle())
    assert (data / "dataset.json").read_bytes() == before


def test_a_pod_that_is_tried_again_writes_beside_the_one_before(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host name and process number are the same, temporary names are not; what a dead process left goes."""
    from data_pipelines.pretokenize import _Job

    manifest = write_corpus(tmp_path / "corpus", 10)
    first = _Job(config_for(manifest), tmp_path / "data", fake_bundle())
    monkeypatch.setattr("data_pipelines.pretokenize._is_alive", lambda process_id: False)
    (tmp_path / "data" / f".tmp-shard_00000-data-{first.suffix}").write_bytes(b"half")
    second = _Job(config_for(manifest), tmp_path / "data", fake_bundle())
    assert first.suffix != second.suffix and not list((tmp_path / "data").glob(".tmp-*"))


def test_records_too_long_are_dropped_and_counted_or_an_error(tmp_path: pathlib.Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", 40)
    assert pretokenize(config_for(manifest, max_tokens=40), tmp_path / "data", bundle=fake_bundle())
    dataset = TokenDataset(tmp_path / "data")
    dropped = dataset.dataset["statistics"]["quarantined"]["length"]
    assert dropped > 0 and len(dataset) == 40 - dropped and dataset.lengths_N.max() <= 40
    with pytest.raises(ValueError, match="tokens, more than max_tokens 40"):
        pretokenize(config_for(manifest, max_tokens=40, too_long="error"), tmp_path / "other", bundle=fake_bundle())


def test_a_directory_of_another_run_is_refused(tmp_path: pathlib.Path) -> None:
    data = make_dataset(tmp_path, 20)
    with pytest.raises(ValueError, match="another run"):
        pretokenize(config_for(tmp_path / "corpus-data" / "manifest.jsonl", max_tokens=500), data, bundle=fake_bundle())


def test_a_missing_tokenizer_is_said(tmp_path: pathlib.Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", 20)
    bundle = fake_bundle()
    object.__setattr__(bundle, "image", None)
    with pytest.raises(ValueError, match="none for image"):
        pretokenize(config_for(manifest), tmp_path / "data", bundle=bundle)


def test_records_hold_what_the_tokenizers_say(tmp_path: pathlib.Path) -> None:
    data, bundle = make_dataset(tmp_path, 10), fake_bundle()
    for stored in TokenDataset(data):
        index = int(stored.example.key.split("/")[1])
        for message in joint.decode(stored.example, bundle.vocab(), bundle.text):
            for part in message.parts:
                root = tmp_path / "corpus-data"
                if isinstance(part, Image):
                    expected = bundle.image.encode(bundle.image.prepare(root / f"picture_{index}.png")[None])[0]
                    assert (part.codes_P == expected).all()
                elif isinstance(part, Speech):
                    (expected,) = bundle.speech.encode([bundle.speech.prepare(root / f"sound_{index}.wav")])
                    assert (part.codes_KU == expected).all()
                else:
                    assert part.text == stored.facts["label"]


def test_worker_numbers_from_flags_and_cluster_environments() -> None:
    import argparse

    none = argparse.Namespace(shard_index=None, num_shards=None)
    assert worker_of(none, {}) == (0, 1)
    slurm = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert worker_of(none, slurm) == (2, 4)
    assert worker_of(argparse.Namespace(shard_index=None, num_shards=8), {"JOB_COMPLETION_INDEX": "7"}) == (7, 8)
    with pytest.raises(ValueError, match="--num_shards"):
        worker_of(none, {"JOB_COMPLETION_INDEX": "7"})
    # A few tasks of an old array keep their numbers when its size is given.
    assert worker_of(argparse.Namespace(shard_index=None, num_shards=32), slurm) == (12, 32)
    line = progress_line({"done": 4096, "total": 19_000, "seconds": 20.0, "quarantined": 3}, 204.8)
    assert line == "4,096 of 19,000 records, 205 records/s, 1 min 13 s left, 3 bad"


def test_the_command_makes_a_data_set_and_shows_a_row(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    TokenizerBundle(ByteText()).save(tmp_path / "tokenizers")
    line = {"task": "text", "messages": [{"role": "assistant", "parts": [{"text": "hello world"}]}]}
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line | {"key": f"k{i}"}) + "\n" for i in range(9)))
    arguments = [
        f"--config.source={manifest}", f"--config.tokenizers={tmp_path / 'tokenizers'}", "--config.records_per_shard=4",
        f"--output={tmp_path / 'data'}",
    ]  # fmt: skip
    assert main(["pretokenize", *arguments, "--shard_index=1", "--num_shards=2"]) == 0
    assert "complete once the other workers are" in capsys.readouterr().out
    assert main(["pretokenize", *arguments, "--shard_index=0", "--num_shards=2"]) == 0
    assert "is complete" in capsys.readouterr().out
    page = tmp_path / "row.html"
    assert main(["show", f"--data={tmp_path / 'data'}", "--sequence_length=64", f"--html={page}"]) == 0
    assert "'hello world'" in capsys.readouterr().out and "hello world" in page.read_text()
    ByteText().save(tmp_path / "parts" / "text")
    parts = [f"--config.tokenizers={tmp_path / 'parts'}", f"--output={tmp_path / 'same'}"]
    assert main(["pretokenize", *arguments, *parts]) == 0
    made = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("data", "same")]
    assert made[0]["vocab_fingerprint"] == made[1]["vocab_fingerprint"]
    assert main(["pretokenize", *arguments, f"--config.tokenizers={tmp_path}", f"--output={tmp_path / 'none'}"]) == 1
    assert "aromni tokenizer train --kind=text" in capsys.readouterr().err
    assert main(["pretokenize", *arguments, "--config.templates=quickstrat"]) == 1
    assert "quickstrat" in capsys.readouterr().err
    assert main(["show", f"--data={tmp_path}"]) == 1
    assert "not a finished data set" in capsys.readouterr().err
