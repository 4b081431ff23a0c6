"""`aromni show`: the table and the page hold what the row holds."""

from __future__ import annotations

import pathlib

import pytest

from aromni_jax.config import LossConfig
from data_pipelines.show import RowView
from tests.fixtures.data_fakes import fake_bundle, make_dataset

LOSS = LossConfig("response", 0.0, "predict", 0.0, 1)


def test_table_and_page_show_every_segment(tmp_path: pathlib.Path) -> None:
    data = make_dataset(tmp_path, 60)
    shown = ""
    for row in range(4):
        view = RowView(data, row=row, sequence_length=256, loss=LOSS, bundle=fake_bundle())
        text, page = view.to_text(), view.to_html()
        assert f"{len(view.examples)} documents" in text
        for example in view.examples:
            assert example.key in text and example.key in page
        assert "<bos>" in text and "&lt;bos&gt;" in page
        shown += text
        images = sum(span.modality == 1 and span.part >= 0 for e in view.examples for span in e.spans)
        sounds = sum(span.modality == 2 and span.part >= 0 for e in view.examples for span in e.spans)
        assert page.count("<img ") == images and page.count("<audio ") == sounds
        assert "http" not in page.replace("<!doctype html>", "")
    assert "2.00" in shown, "the doubled weight of a caption or a transcript"


def test_a_row_that_is_not_there(tmp_path: pathlib.Path) -> None:
    data = make_dataset(tmp_path, 20)
    with pytest.raises(ValueError, match="row 999 is not there"):
        RowView(data, row=999, sequence_length=256, loss=LOSS, bundle=fake_bundle())
    with pytest.raises(ValueError, match="not a finished data set"):
        RowView(tmp_path, row=0, sequence_length=256, loss=LOSS)
