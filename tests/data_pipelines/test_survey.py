"""The statistics of a data set: hand-computed packing, shares and lengths, and a page that holds them."""

from __future__ import annotations

import html
import json
import pathlib
import re

import numpy as np
import pytest

from aromni_jax.config import LossConfig
from aromni_jax.evaluation.data_page import render_data_page
from aromni_jax.structs import Modality, Task
from data_pipelines.recipe_corpus import recipe_lengths
from data_pipelines.records import TokenDataset
from data_pipelines.show import sample_documents
from data_pipelines.survey import (
    compare_packing,
    cut_by_splitting,
    fill_of_padding,
    survey,
    survey_text,
    ways_to_batch,
)
from data_pipelines.weighting import weight_table
from launch.cli import main
from tests.fixtures.data_fakes import fake_bundle, make_dataset

LOSS = LossConfig("balanced", 0.0, "predict", 0.0, 1)


def test_padding_by_hand():
    lengths_N = np.array([3, 5, 8, 2, 4])
    # Twos: 3+5 of 2*5, 8+2 of 2*8, 4 of 4: 22 of 30. Fours: 18 of 4*8, 4 of 4: 22 of 36.
    assert fill_of_padding(lengths_N, 2) == pytest.approx(22 / 30)
    assert fill_of_padding(lengths_N, 4) == pytest.approx(22 / 36)
    assert fill_of_padding(lengths_N, 16) == pytest.approx(22 / 40)
    assert fill_of_padding(lengths_N, 1) == 1.0 and fill_of_padding(lengths_N[:0], 2) == 0.0


def test_splitting_by_hand():
    # Rows of 10: | 3 5 2. | .6 4 | 10 | 10 10 ...; the document of 8 lies over the first border, with 6 after it.
    assert cut_by_splitting(np.array([3, 5, 8, 4]), 10) == (1, 6)
    assert cut_by_splitting(np.array([10, 10]), 10) == (0, 0)
    # One of 25 from the middle of a row on: 5, then 10 and 10 without their beginning.
    assert cut_by_splitting(np.array([5, 25]), 10) == (1, 20)


def test_comparison_by_hand():
    """Four documents of which two pairs fill a row of 10 exactly, and one that fits no row."""
    rows = compare_packing(np.array([7, 4, 3, 6, 11]), 10, seed=0)
    assert (rows["documents"], rows["too_long"]) == (4, 1)
    assert rows["plan"] == {"rows": 2, "fill": 1.0, "documents_per_row": 2.0}
    stored = {way["batch"]: way["fill"] for way in rows["right_padding"] if way["order"] == "as stored"}
    assert stored == {2: pytest.approx(20 / 26), 16: pytest.approx(20 / 28)}
    ways = ways_to_batch(rows)
    assert ways[0] == ("rows by plan", 1.0, 0.0) and ways[-1][:2] == ("concatenated and split", 1.0)


def test_rows_of_the_released_recipe_are_full():
    lengths_N, _ = recipe_lengths(40_000)
    rows = compare_packing(lengths_N - 1, 4096, seed=0)
    assert rows["plan"]["fill"] >= 0.9987 and rows["too_long"] == 0
    fill_of_2, fill_of_16 = (way["fill"] for way in rows["right_padding"] if way["order"] == "shuffled")
    assert fill_of_16 < fill_of_2 < 0.8 and fill_of_16 < 0.7
    assert 0.1 < rows["split"]["cut_documents"] < 0.3


def test_numbers_are_those_of_the_records(tmp_path: pathlib.Path):
    data = make_dataset(tmp_path, 40)
    numbers = json.loads(json.dumps(survey(data, sequence_length=256, loss=LOSS)))
    dataset = TokenDataset(data)
    lengths = [len(stored.tokens_L) for stored in dataset]
    assert numbers["tokens"] == sum(lengths) and numbers["documents"] == 40
    assert numbers["lengths"]["all"]["max"] == max(lengths)
    assert numbers["lengths"]["all"]["median"] == sorted(lengths)[19]
    by_task = numbers["histogram_by_task"]
    assert {task: sum(counts) for task, counts in by_task["documents"].items()} == {
        task: line["documents"] for task, line in numbers["lengths"].items() if task != "all"
    }
    table_TMR = weight_table(LOSS, dataset.counts_TMR)
    weights = {(share["task"], share["modality"]): share["weight_share"] for share in numbers["shares"]}
    whole = (dataset.counts_TMR * table_TMR).sum()
    expected = (dataset.counts_TMR * table_TMR)[Task.CAPTION, Modality.IMAGE].sum() / whole
    assert weights["caption", "image"] == pytest.approx(expected) and sum(weights.values()) == pytest.approx(1)
    contents = {(int(stored.task), stored.tokens_L.tobytes()) for stored in dataset}
    assert numbers["copies"] == 40 - len(contents)
    images = sum((stored.spans_S6[:, 2] == Modality.IMAGE).any() for stored in dataset)
    assert sum(numbers["histograms_by_modality"]["modalities"]["image"]["documents"]) == images
    text = survey_text(numbers)
    assert "rows by plan" in text and "caption" in text and "left out or cut: nothing" in text


def test_page_shows_documents_and_reasons(tmp_path: pathlib.Path):
    data = make_dataset(tmp_path, 40, max_tokens=40)
    numbers = survey(data, sequence_length=20, loss=LOSS)
    assert numbers["rows"]["too_long"] and numbers["quarantine"]["by_stage"]
    samples = sample_documents(data, per_task=2, bundle=fake_bundle())
    page = render_data_page(numbers, ways_to_batch(numbers["rows"]), samples)
    pictures = sum("<img " in part["html"] for sample in samples for part in sample["parts"])
    sounds = sum("<audio " in part["html"] for sample in samples for part in sample["parts"])
    assert page.count("<img ") == pictures > 0 and page.count("<audio ") == sounds > 0
    for sample in samples:
        assert sample["key"] in page
    assert "more than max_tokens 40" in page and "rows by plan" in page
    assert page.count('<svg class="chart"') == 4
    assert "http" not in page.replace("<!doctype html>", "")
    # A damaged record is shown as what it is.
    shard = data / "shard_00000.array_record"
    content = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    written = np.flatnonzero(content)
    content[written[len(written) // 4 : len(written) // 2]] ^= 1
    shard.write_bytes(content.tobytes())
    everything = sample_documents(data, per_task=40, bundle=fake_bundle())
    assert [sample["key"] for sample in everything if sample["parts"][0]["role"] == "damaged"]


def test_a_place_is_named_once(tmp_path: pathlib.Path):
    data = make_dataset(tmp_path, 40, max_tokens=40)
    file = data / "quarantine.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    entries[1]["error"] = f"{entries[1]['where']}, feature image: no picture"  # as sources say it
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    numbers = survey(data, sequence_length=20, loss=LOSS)
    page = render_data_page(numbers, ways_to_batch(numbers["rows"]), [])
    for text in (survey_text(numbers), html.unescape(page)):
        for entry in entries[:2]:
            assert len(re.findall(rf"{re.escape(entry['where'])}[:,]", text)) == 1


def test_the_command_prints_and_writes(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    data = make_dataset(tmp_path, 20)
    (data / "tokenizers" / "vocab.json").rename(tmp_path / "vocab.json")  # the fakes cannot be loaded again
    for leftover in sorted((data / "tokenizers").rglob("*"), reverse=True):
        leftover.unlink() if leftover.is_file() else leftover.rmdir()
    (data / "tokenizers").rmdir()
    files = [f"--html={tmp_path / 'page.html'}", f"--json={tmp_path / 'numbers.json'}"]
    assert main(["show", f"--data={data}", "--statistics", "--sequence_length=256", "--weighting=sft", *files]) == 0
    assert "tokens a document" in capsys.readouterr().out
    assert json.loads((tmp_path / "numbers.json").read_text())["weighting"] == "sft"
    assert "text ids" in (tmp_path / "page.html").read_text()
    assert main(["show", f"--data={data}", files[1]]) == 1
    assert "--statistics" in capsys.readouterr().err
    assert main(["show", f"--data={data}", "--statistics", "--sequence_length=0"]) == 1
    assert "must be at least 1" in capsys.readouterr().err
