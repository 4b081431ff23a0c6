"""What weights of fewer bits cost: losses are those of training, and float32 agrees with itself."""

from __future__ import annotations

import types

import numpy as np
import pytest

from aromni_jax.inference.decode import OmniModel
from aromni_jax.structs import Example, Modality, Role, Span, Task
from launch.evaluate import held_out_losses
from launch.evaluate_weights import _HEADERS, _page, _rows, measure
from launch.model_flags import WEIGHTS
from tests.fixtures.small_models import random_params, small_model, small_vocab

VOCAB = small_vocab()


def examples() -> list[Example]:
    """Twenty conversations of text, of pictures and of speech."""
    rng = np.random.default_rng(0)
    ranges = {Modality.TEXT: VOCAB.text, Modality.IMAGE: VOCAB.image, Modality.SPEECH: VOCAB.speech[0]}
    found = []
    for number in range(20):
        modality = list(Modality)[number % 3]
        length = int(rng.integers(20, 60))
        tokens = rng.integers(ranges[modality].start, ranges[modality].stop, length).astype(np.int32)
        span = Span(0, length, modality, Role.RESPONSE, 0, 0)
        found.append(Example(tokens, (span,), Task.TEXT, str(number)))
    return found


@pytest.fixture(scope="module")
def measured():
    model, found, reference = small_model(), {}, []
    for weights in WEIGHTS:
        omni = OmniModel.of(model, random_params(model), VOCAB, weights=weights)
        found[weights], best = measure(omni, examples(), reference)
        reference = reference or best
        plain = held_out_losses(types.SimpleNamespace(model=omni), examples(), None)
        by_name = {line["name"]: line for line in plain if line["kind"] == "modality"}
        for line in found[weights]["losses"]:
            # bfloat16 rounds what the two ways sum in another order.
            rtol = 2e-3 if weights == "bfloat16" else 1e-5
            assert line["loss"] == pytest.approx(by_name[line["name"]]["loss"], rel=rtol)
            assert line["tokens"] == by_name[line["name"]]["tokens"]
    return found


def test_losses_and_greedy_tokens(measured):
    assert [line["name"] for line in measured["int8"]["losses"]] == [modality.label for modality in Modality]
    for weights, result in measured.items():
        for line, exact in zip(result["losses"], measured["float32"]["losses"], strict=True):
            assert line["loss"] == pytest.approx(exact["loss"], rel=0.02)
            assert line["same_greedy_token"] == 1.0 if weights == "float32" else 0.8 < line["same_greedy_token"] <= 1.0
    of_int8 = [line["same_greedy_token"] for line in measured["int8"]["losses"]]
    assert min(of_int8) < 1.0, "eight bits change something"
    assert measured["int8"]["bytes"] < measured["bfloat16"]["bytes"] < measured["float32"]["bytes"]


def test_every_line_is_told(measured):
    rows = _rows(measured)
    assert len(rows) == 9 and {len(row) for row in rows} == {len(_HEADERS)}
    shown = _page({"title": "T", "summary": "S", "weights": measured})
    assert all(cell in shown for row in rows for cell in row)
