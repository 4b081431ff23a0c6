"""Length limits: what is cut, what is never cut, and that everything left out has a reason."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aromni_jax.structs import Example, Image, Message, Modality, Part, Speech, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.prompts import load_templates, parse_templates
from aromni_jax.tokenizers.text import ByteText, SentencePieceText
from data_pipelines.length_limits import LengthLimits
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from data_pipelines.sources import RecordError
from tests.fixtures.data_fakes import config_for, fake_bundle, write_corpus

VOCAB, TEXT = fake_bundle().vocab(), ByteText()
PICTURE, SOUND = Image(codes_P=np.arange(16, dtype=np.int32)), Speech(codes_KU=np.arange(30, dtype=np.int32)[None])


def text_document(text: str, key: str = "k") -> Example:
    return joint.encode(
        [Message("assistant", (Text(text),))], Task.TEXT, VOCAB, TEXT, load_templates("quickstart"), key=key
    )


def words_of(example: Example) -> str:
    (message,) = joint.decode(example, VOCAB, TEXT)
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def applied(limits: LengthLimits, example: Example) -> list[Example]:
    return [document for document, _ in limits.apply(example, VOCAB, TEXT)]


@given(st.text(min_size=1, max_size=200), st.integers(3, 40))
def test_split_text_is_the_text_and_every_piece_a_document(text: str, max_tokens: int) -> None:
    example = text_document(text)
    pieces = applied(LengthLimits(0, max_tokens, "split_text"), example)
    bodies = []
    for piece in pieces:
        assert len(piece.tokens_L) <= max_tokens
        assert piece.tokens_L[0] == VOCAB.bos and piece.tokens_L[-1] == VOCAB.eos
        assert sum(span.length for span in piece.spans) == len(piece.tokens_L)
        assert [span.start for span in piece.spans] == np.cumsum([0, *(s.length for s in piece.spans)])[:-1].tolist()
        bodies.append(piece.tokens_L[1:-1])
    np.testing.assert_array_equal(np.concatenate(bodies), example.tokens_L[1:-1])
    assert len(pieces) == max(1, -(-(len(example.tokens_L) - 2) // (max_tokens - 2)))
    assert [piece.key for piece in pieces] == (["k"] if len(pieces) == 1 else [f"k#{i}" for i in range(len(pieces))])


@given(st.text(min_size=1, max_size=200), st.integers(3, 40))
def test_truncated_text_is_its_beginning_and_ends_as_before(text: str, max_tokens: int) -> None:
    example = text_document(text)
    ((cut, done),) = LengthLimits(0, max_tokens, "truncate_text").apply(example, VOCAB, TEXT)
    assert len(cut.tokens_L) <= max_tokens and cut.tokens_L[-1] == VOCAB.eos and cut.key == "k"
    np.testing.assert_array_equal(cut.tokens_L[:-1], example.tokens_L[: len(cut.tokens_L) - 1])
    is_cut = len(example.tokens_L) > max_tokens
    assert done == ({"truncated_from": len(example.tokens_L)} if is_cut else {})
    if is_cut:
        assert len(cut.tokens_L) >= max_tokens - (max_tokens - 2) // 4


def test_borders_are_sentences_then_words_then_characters() -> None:
    sentences = text_document("One two three four. Five six seven. Eight nine ten eleven.")
    pieces = applied(LengthLimits(0, 26, "split_text"), sentences)
    assert [words_of(piece) for piece in pieces] == [
        "One two three four.",
        " Five six seven.",
        " Eight nine ten eleven.",
    ]
    words = applied(LengthLimits(0, 18, "split_text"), text_document("alpha beta gamma delta epsilon"))
    assert [words_of(piece) for piece in words] == ["alpha beta gamma", " delta epsilon"]
    letters = applied(LengthLimits(0, 14, "split_text"), text_document("ÄÖÜ" * 8))
    assert "".join(words_of(piece) for piece in letters) == "ÄÖÜ" * 8  # no character is cut in two
    (cut,) = applied(LengthLimits(0, 26, "truncate_text"), sentences)
    assert words_of(cut) == "One two three four."


def test_pieces_of_a_learned_tokenizer_end_with_words() -> None:
    line = "the quick brown fox jumps over the lazy dog. "
    pieces_text = SentencePieceText.train([line * 3], 300)
    vocab = fake_bundle().vocab().build(text_size=pieces_text.size)
    message = [Message("assistant", (Text(line * 8),))]
    example = joint.encode(message, Task.TEXT, vocab, pieces_text, load_templates("quickstart"), key="k")
    max_tokens = len(example.tokens_L) * 2 // 5
    found = LengthLimits(0, max_tokens, "split_text").apply(example, vocab, pieces_text)
    texts = [joint.decode(piece, vocab, pieces_text)[0].parts[0].text for piece, _ in found]  # type: ignore[union-attr]
    assert "".join(texts) == line * 8 and len(texts) == 3
    assert all(text.rstrip().endswith("dog.") for text in texts)


@pytest.mark.parametrize("policy", ["truncate_text", "split_text"])
@pytest.mark.parametrize(
    ("task", "parts"),
    [
        (Task.CAPTION, (PICTURE, Text("x" * 60))),
        (Task.TEXT_TO_SPEECH, (Text("x" * 60), SOUND)),
        (Task.QUESTION, (Text("x" * 60), Text("y" * 60))),
    ],
)
def test_whatever_is_not_plain_text_is_left_out_whole(policy: str, task: Task, parts: tuple[Part, ...]) -> None:
    messages = [Message(role, (part,)) for role, part in zip(("user", "assistant"), parts, strict=True)]
    example = joint.encode(messages, task, VOCAB, TEXT, load_templates("quickstart"), key="k")
    with pytest.raises(RecordError, match="not plain text that could be cut") as caught:
        LengthLimits(0, 40, policy).apply(example, VOCAB, TEXT)  # type: ignore[arg-type]
    assert caught.value.stage == "length_not_text"


def test_words_of_the_template_stay_and_texts_between_them_are_not_cut() -> None:
    framed = {"turns": {"assistant": ["<begin_response>", "> ", "{text*}", " <", "<end_model>"]}, "end": ["<eos>"]}
    templates = parse_templates(json.dumps({"name": "framed", "tasks": {"text": framed}}), "framed")
    message = Message("assistant", (Text("a" * 20), Text("b" * 20)))
    example = joint.encode([message], Task.TEXT, VOCAB, TEXT, templates, key="k")
    pieces = applied(LengthLimits(0, 23, "split_text"), example)
    assert len(pieces) == 3
    for piece in pieces:
        np.testing.assert_array_equal(piece.tokens_L[:4], example.tokens_L[:4])
        np.testing.assert_array_equal(piece.tokens_L[-4:], example.tokens_L[-4:])
        assert (piece.modality_L == Modality.TEXT).all()
    assert "".join(map(words_of, pieces)) == "a" * 20 + "b" * 20
    pieces_of = ["{text}", " or ", "{text}"]
    either = {"name": "either", "tasks": {"text": {"turns": {"assistant": pieces_of}, "end": ["<eos>"]}}}
    parted = joint.encode([message], Task.TEXT, VOCAB, TEXT, parse_templates(json.dumps(either), "either"), key="k")
    with pytest.raises(RecordError, match="not plain text"):
        LengthLimits(0, 23, "split_text").apply(parted, VOCAB, TEXT)
    with pytest.raises(ValueError, match="max_tokens': 8 leaves no room for text beside the 8 other tokens"):
        LengthLimits(0, 8, "split_text").apply(example, VOCAB, TEXT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, "drop"), "'min_tokens': must be 0"),
        ((0, -5, "drop"), "'max_tokens': must be 0"),
        ((9, 8, "drop"), "9 is more than max_tokens 8"),
        ((0, 0, "split_text"), "'split_text' does nothing without a limit; set max_tokens"),
    ],
)
def test_limits_that_make_no_sense_are_refused(arguments: tuple[int, int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthLimits(*arguments)  # type: ignore[arg-type]


def test_every_record_is_stored_or_named_with_a_reason(tmp_path: pathlib.Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", 30)
    long_text = {"task": "text", "split": "train", "key": "long", "facts": {"label": "x"}}
    long_text["messages"] = [{"role": "assistant", "parts": [{"text": "one two three. " * 20}]}]  # type: ignore[assignment]
    manifest.write_text(manifest.read_text() + json.dumps(long_text) + "\n")
    everything = fake_bundle()
    assert pretokenize(config_for(manifest), tmp_path / "all", bundle=everything)
    lengths = {stored.key: len(stored.tokens_L) for stored in TokenDataset(tmp_path / "all")}
    for policy, stage in (("truncate_text", "truncated"), ("split_text", None), ("drop", "length")):
        config = config_for(manifest, min_tokens=14, max_tokens=40, too_long=policy, max_bad_fraction=0.0)
        out = tmp_path / policy
        assert pretokenize(config, out, bundle=everything)
        dataset = TokenDataset(out)
        remarks = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
        counted = dataset.dataset["statistics"]["quarantined"]
        assert {kind: sum(r["stage"] == kind for r in remarks) for kind in counted} == counted
        assert counted["too_short"] == sum(length < 14 for length in lengths.values()) > 0
        (of_long,) = [r for r in remarks if r["key"] == "long"] or [{"stage": None}]
        assert of_long["stage"] == stage
        stored = {example.key.split("#")[0] for example in dataset}
        left_out = {r["key"] for r in remarks if r["stage"] != "truncated"}
        assert stored | left_out == set(lengths) and not stored & left_out
        assert dataset.lengths_N.max() <= 40 and dataset.lengths_N.min() >= 14
        made = [example.facts["pretokenize"] for example in dataset if example.key.startswith("long")]
        if policy == "split_text":
            assert made == [{"piece": i, "pieces": 8} for i in range(8)]
        elif policy == "truncate_text":
            assert made == [{"truncated_from": 302}] and "had 302 tokens; it was cut to" in str(remarks)
