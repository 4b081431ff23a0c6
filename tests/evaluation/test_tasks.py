"""Which cases are chosen, how they are grouped, and scores on answers whose worth is known."""

from __future__ import annotations

from aromni_jax.evaluation.tasks import (
    Case,
    choose,
    group_of,
    judged_score,
    names_the_thing,
    says_the_same,
    share_score,
    word_error_score,
)
from aromni_jax.structs import Message, Task, Text


def case(key: str, task: Task, answer: str, **facts) -> Case:
    return Case(key, task, Message("user", ()), Message("assistant", (Text(answer),)), facts)


def test_groups_name_what_is_tested():
    assert group_of(case("", Task.SPEECH_TO_TEXT, "x", holdout="voice", kind="digit")) == "voices never heard"
    assert group_of(case("", Task.SPEECH_TO_TEXT, "x", holdout="sample", kind="digit")) == "heard voices"
    assert group_of(case("", Task.CAPTION, "x", holdout="scan", kind="digit")) == "digits"
    assert group_of(case("", Task.CAPTION, "x", holdout="combination", kind="scene")) == "new colour-shape pairs"
    assert group_of(case("", Task.CAPTION, "x")) == "all"


def test_choice_is_balanced_repeatable_and_independent_of_order():
    cases = [
        case(f"{label}-{i}", Task.CAPTION, label, kind="digit", label=label) for label in "0123456789" for i in range(9)
    ]
    chosen = choose(cases, {Task.CAPTION: 20})
    labels = [c.facts["label"] for c in chosen]
    assert all(labels.count(label) == 2 for label in "0123456789")
    assert [c.key for c in choose(cases[::-1], {Task.CAPTION: 20})] == [c.key for c in chosen]
    assert choose(cases, {Task.QUESTION: 5}) == []


def test_right_answers():
    scene = case("", Task.CAPTION, "a big red star", kind="scene", label="red star")
    assert names_the_thing(scene, "There is a star, red.") and not names_the_thing(scene, "a red ring")
    digit = case("", Task.CAPTION, "the number seven", kind="digit", label="7", words="seven")
    assert names_the_thing(digit, "a handwritten seven") and not names_the_thing(digit, "a handwritten one")
    assert says_the_same(scene, "A big red star!") and not says_the_same(scene, "a red star")


def test_scores_beside_chance():
    cases = [
        case(str(i), Task.CAPTION, word, kind="digit", words=word)
        for i, word in enumerate(("one", "two", "three", "four"))
    ]
    perfect = share_score(cases, ["one", "two", "three", "four"], says_the_same, "caption", "digits", "exact")
    assert (perfect.value, perfect.chance) == (1.0, 0.0)
    constant = share_score(cases, ["two"] * 4, says_the_same, "caption", "digits", "exact")
    assert constant.value == constant.chance == 0.25
    words = word_error_score(cases, ["one", "two", "three", "four"], "speech_to_text", "all")
    assert (words.value, words.chance, words.better) == (0.0, 1.0, "lower")
    judged = judged_score(["1", "2"], {"generated": ["1", "1"], "ceiling": ["1", "2"]}, "text_to_image", "digits", "m")
    assert (judged.value, judged.ceiling, judged.real, judged.chance) == (0.5, 1.0, None, 0.5)
