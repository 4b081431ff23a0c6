"""Histograms: every bar where its numbers say, on top of the series below it."""

from __future__ import annotations

import re

from aromni_jax.evaluation.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, histogram


def bars(svg):
    """(colour, x, y, width, height) of every bar."""
    found = re.findall(r'<rect class="s(\d)" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)">', svg)
    return [(int(colour), *map(float, numbers)) for colour, *numbers in found]


def test_stacked_bars_stand_where_the_numbers_say():
    svg = histogram({"a": [1, 0, 0], "b & c": [3, 4, 0]}, [0, 10, 20, 30], x_label="tokens", first_colour=2)
    unit = (HEIGHT - TOP - BOTTOM) / 4
    floor, bin_width = HEIGHT - BOTTOM, (WIDTH - LEFT - RIGHT) / 2  # the empty last bin is not drawn
    assert bars(svg) == [
        (2, LEFT + 0.5, floor - unit, bin_width - 1, unit),
        (3, LEFT + 0.5, floor - 4 * unit, bin_width - 1, 3 * unit),
        (3, LEFT + bin_width + 0.5, floor - 4 * unit, bin_width - 1, 4 * unit),
    ]
    assert "b &amp; c, 10 to 20: 4" in svg and svg.count('class="name') == 2


def test_one_series_needs_no_name_and_nothing_draws_nothing():
    assert 'class="name' not in histogram({"a": [1], "b": [0]}, [0, 1], x_label="x")
    assert histogram({"a": [0, 0]}, [0, 1, 2], x_label="x") == "" == histogram({}, [0, 1], x_label="x")
    assert ">20k<" in histogram({"a": [20_000]}, [0, 50_000], x_label="x")
