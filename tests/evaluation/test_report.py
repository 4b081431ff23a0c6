"""The page: complete, escaped, self-contained, and able to say little when there is little to say."""

from __future__ import annotations

import html.parser
import pathlib
import re

import numpy as np
import pytest
import soundfile
from PIL import Image

from aromni_jax.evaluation.report import render_report
from aromni_jax.evaluation.svg import line_chart


def fixture_results(folder: pathlib.Path) -> dict:
    """Results of every kind, with a hostile caption."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(folder / "a.png")
    soundfile.write(folder / "a.wav", rng.normal(0, 0.1, 8000), 16_000)
    picture = {"task": "text_to_image", "group": "digits", "asked": "<script>seven</script>", "image": "a.png"}
    picture |= {"label": "7", "verdict": "1", "correct": False}
    return {
        "title": "A run",
        "summary": "What it is & was.",
        "scores": [
            dict(task="text_to_image", group="digits", metric="shows what was asked", value=0.62, n=40, chance=0.1,
                 ceiling=0.9, real=0.99, better="higher"),
            dict(task="speech_to_text", group="heard voices", metric="word error rate", value=float("inf"), n=4,
                 chance=0.9, ceiling=None, real=None, better="lower"),
        ],
        "samples": [
            picture,
            picture | {"task": "speech_to_image", "sound": "a.wav", "verdict": "7", "correct": True},
            dict(task="text_to_speech", group="digits", asked="seven", heard="", sound="a.wav", seconds=0.5,
                 label="7", verdict="", correct=None),
            dict(task="speech_to_text", group="heard voices", asked="", truth="one", told="two", correct=False,
                 sound="a.wav"),
            dict(task="question", group="scenes", asked="what?", truth="red", told="red", correct=True, image="a.png"),
        ],
        "losses": [
            dict(kind="modality", name="text", loss=1.2, unigram=4.0, chance=6.0, tokens=1234),
            dict(kind="task", name="text", loss=2.0, tokens=10),
        ],
        "curves": {"modality": {"text": [[1, 5.0], [100, 1.0]], "image": [[1, 6.0], [100, float("nan")]]}, "task": {}},
        "stages": [{"name": "corpus", "seconds": 12.0}],
        "facts": [("parameters", "5,000,000")],
        "export_path": "/some/where",
        "config": {"seed": 0},
    }  # fmt: skip


class Checker(html.parser.HTMLParser):
    """Collects unbalanced tags and every address the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "poster")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_balanced_and_escaped(tmp_path):
    page = render_report(fixture_results(tmp_path), tmp_path)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(address.startswith("data:") for address in checker.addresses) and len(checker.addresses) >= 6
    assert not {"script", "link", "iframe", "object"} & set(checker.tags)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "&lt;script&gt;seven" in page
    for shown in (
        "62\u00a0%",
        "∞",
        "1,234",
        "/some/where",
        "5,000,000",
        "Pictures from speech",
        "prefers-color-scheme: dark",
    ):
        assert shown in page


def test_page_of_nothing_is_a_page():
    page = render_report({"title": "Empty"}, pathlib.Path())
    assert "<h1>Empty</h1>" in page and "<table" not in page and "<svg" not in page


def test_missing_sample_is_an_error(tmp_path):
    results = fixture_results(tmp_path)
    (tmp_path / "a.wav").unlink()
    with pytest.raises(FileNotFoundError, match="a.wav"):
        render_report(results, tmp_path)


def test_chart_scales_lines_into_its_frame():
    chart = line_chart(
        {"a": [(0, 0.0), (10, 5.0)], "b": [(0, 5.0), (10, 4.9)], "c": []}, baselines={"a": 4.0, "zzz": 1}
    )
    points = [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", chart)]
    assert all(0 <= x <= 640 and 0 <= y <= 300 for x, y in points)
    assert chart.count("<polyline") == 2 and chart.count("dashed") == 1
    assert line_chart({"a": []}) == "" and line_chart({"a": [(1, float("inf"))]}) == ""
    assert "<polyline" in line_chart({"flat": [(5, 2.0)]})
