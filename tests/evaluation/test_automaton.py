"""The drawing of the decoding automaton: valid XML with a box for every state and an arc for every way on."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from aromni_jax.evaluation.automaton import automaton_svg
from aromni_jax.inference.description import describe
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.policy import Policy, policy_for
from aromni_jax.structs import Task
from aromni_jax.vocab import JointVocab

VOCAB = JointVocab.build(text_size=40, image_codes=16, tokens_per_image=6, speech_codes=(8, 8, 4))
SVG = "{http://www.w3.org/2000/svg}"
ROUND = Policy(start=("text",), after={"text": ("image", "end"), "image": ("text", "end")})


@pytest.mark.parametrize("policies", [{task: policy_for(task) for task in Task}, {Task.CHAT: ROUND}])
def test_every_state_and_every_way_on_is_drawn(policies):
    states = describe(compile_grammar(VOCAB, policies))
    root = ElementTree.fromstring(automaton_svg(states))
    assert [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "task"] == [
        t.command for t in policies
    ]
    _, *boxes = root.iter(f"{SVG}rect")
    assert len(boxes) == len(states)
    arcs = [path for path in root.iter(f"{SVG}path") if (path.get("class") or "").startswith("arc")]
    moves = [move for state in states if state.kind != "done" for move in state.moves]
    assert len(arcs) == len(moves)
    assert sum("late" in arc.get("class") for arc in arcs) == sum(move.when == "at budget" for move in moves)
    width, height = (float(root.get(side)) for side in ("width", "height"))
    sides = [[float(box.get(side)) for side in ("x", "y", "width", "height")] for box in boxes]
    assert all(x + w <= width and y + h <= height for x, y, w, h in sides)
    for arc in arcs:
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", arc.get("d"))]
        assert all(0 <= x <= width for x in numbers[::2])
        assert 0 <= numbers[1] + 0.75 * (numbers[3] - numbers[1]) <= height
    assert f"end_image {VOCAB.end_image}; at budget" in {title.text for title in root.iter(f"{SVG}title")}


def test_arcs_lead_to_the_right_unless_they_lead_back():
    root = ElementTree.fromstring(automaton_svg(describe(compile_grammar(VOCAB, {Task.CHAT: ROUND}))))
    labels = [text for text in root.iter(f"{SVG}text") if text.get("class") == "label"]
    names = [next(iter(label.itertext())) for label in labels]
    # start -> text -> image -> after image -> done, and from after image back to text
    assert sorted(names) == sorted(
        ["text", "begin_image", "end_image (forced)", "text", *["eos, end_model"] * 2, "text", "image"]
    )
