"""A tokenizer.json: the ids of the Hugging Face library for text, and no control token for anything a user writes."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import test_bundle
import test_text
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from aromni_jax.structs import Message, Modality, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.huggingface_text import HuggingFaceText
from aromni_jax.tokenizers.prompts import load_templates
from aromni_jax.tokenizers.text import load_text_tokenizer
from aromni_jax.vocab import JointVocab
from launch.import_ import vocabulary_of

CONTROL = ["<s>", "</s>", "<pad>", "<racm3:break>", "STOP"]


def trained(control=CONTROL, added=(), vocab_size=420) -> dict:
    """A byte-level tokenizer.json, learnt here, that adds <s> to what it encodes and cuts it short."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Corpora do contain what looks like control tokens, and then merges lead to them.
    library.train_from_iterator(test_text.CORPUS + ["STOP"] * 500, trainer)
    library.add_tokens(list(added))
    if "<s>" in control:
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", library.token_to_id("<s>"))]
        )
    library.enable_truncation(4)
    return json.loads(library.to_str())


def ours(raw: dict, text_ids=None) -> HuggingFaceText:
    return HuggingFaceText(json.dumps(raw).encode(), text_ids)


def theirs(raw: dict) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps({**raw, "truncation": None}))
    )


@pytest.fixture(scope="module")
def raw() -> dict:
    return trained(added=["\n\n", "USER:"])


def in_released_rows(raw: dict) -> dict:
    """The same tokenizer with its ids where Chameleon has them, and pictures and reserved rows as its file has them."""
    vocab, rows = JointVocab.released(), raw["model"]["vocab"]
    pieces = [name for name in rows if name not in CONTROL]
    named = (vocab.bos, vocab.eos, vocab.pad, vocab.begin_image, vocab.end_model)
    ids = dict(zip(CONTROL, named, strict=True))
    ids |= {f"IMGIMG{chr(65 + code)}Z": vocab.image.start + code for code in range(9)}
    ids |= {"<reserved12841>": vocab.begin_response}
    control = dict(ids)
    ids |= {name: vocab.text.start + index for index, name in enumerate(pieces)}
    unmarked = ("IMGIMGAZ", "<reserved12841>")
    added = [
        {"id": i, "content": name, "special": name not in unmarked, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for name, i in control.items()
        if name != "IMGIMGBZ"
    ]
    # A row that merges lead to, as they do where pictures were part of the corpus.
    merges = [*raw["model"]["merges"], ["I", "M"], ["IM", "G"]]
    ids |= {name: vocab.text.start + len(pieces) + i for i, name in enumerate(("IM", "IMG", "IMGIMG", "AZ", "BZ"))}
    merges += [["IMG", "IMG"], ["A", "Z"], ["B", "Z"], ["IMGIMG", "BZ"]]
    return {
        **raw,
        "model": {**raw["model"], "vocab": ids, "merges": merges},
        "added_tokens": added,
        "post_processor": None,
        "truncation": None,
    }


def test_ids_are_those_of_the_library(raw):
    mine, reference = ours(raw), theirs(raw)
    for text in [*test_text.CORPUS, *test_text.HARD, "USER:USER: a\n\n\n b"]:
        if "<pad>" not in text and "<s>" not in text:
            ids = mine.encode(text)
            assert ids == reference.encode(text, add_special_tokens=False), text
            assert mine.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False) == text
    assert mine.size == len(reference) == len(reference.get_vocab())


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\u2581<>pad\0"))))
def test_any_text_comes_back(raw, text):
    mine = ours_once(raw)
    ids = mine.encode(text)
    assert mine.decode(ids) == text
    assert all(0 <= i < mine.size for i in ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*CONTROL, "\0", "0", "260", " ", "a red", "USER:", "<", "pad>"])))
def test_no_text_makes_a_control_token(raw, pieces):
    mine, text = ours_once(raw), "".join(pieces)
    ids = mine.encode(text)
    assert not {raw["model"]["vocab"][name] for name in CONTROL} & set(ids)
    assert mine.decode(ids) == text


def ours_once(raw: dict) -> HuggingFaceText:
    """Hypothesis calls its tests many times."""
    if not hasattr(ours_once, "made"):
        ours_once.made = ours(raw)
    return ours_once.made


def test_the_library_itself_would_make_control_tokens(raw):
    """What the tests above guard against is there: with the library's own switch, merges still lead to STOP."""
    library = tokenizers.Tokenizer.from_str(json.dumps(raw))
    library.encode_special_tokens = True
    assert library.encode("STOP", add_special_tokens=False).tokens == ["STOP"]
    assert len(ours(raw).encode("STOP")) == 2


def test_whole_words_that_skip_merges(raw):
    """With `ignore_merges` a word that stands in the vocabulary is taken as it is, but not if it is a control token."""
    skipping = {**raw, "model": {**raw["model"], "ignore_merges": True}}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    mine = ours({**skipping, "pre_tokenizer": whole})
    for text in CONTROL:
        assert mine.decode(mine.encode(text)) == text and len(mine.encode(text)) > 1
    ids = ours(skipping).encode("a red circle")
    assert ids == theirs(skipping).encode("a red circle", add_special_tokens=False)


def test_control_tokens_are_no_text(raw):
    mine = ours(raw)
    ids = mine.encode("red")
    assert mine.decode([raw["model"]["vocab"]["<s>"], *ids, raw["model"]["vocab"]["</s>"]]) == "red"
    assert mine.decode(ours(raw).encode("é")[:1]) == "\ufffd"
    with pytest.raises(ValueError, match="outside"):
        mine.decode([mine.size])
    with pytest.raises(ValueError, match="not valid Unicode at character 1"):
        mine.encode("a\ud800")


def test_fingerprint_is_of_what_changes_ids(raw):
    mine = ours(raw)
    same = {
        "white space": json.dumps(raw, indent=4),
        "order": json.dumps(dict(reversed(raw.items()))),
        "truncation and padding": json.dumps({**raw, "truncation": None, "post_processor": None}),
        "merges as strings": json.dumps(
            {**raw, "model": {**raw["model"], "merges": [" ".join(merge) for merge in raw["model"]["merges"]]}}
        ),
        "defaults left out": json.dumps({**raw, "model": {k: v for k, v in raw["model"].items() if v}}),
    }
    for why, text in same.items():
        other = HuggingFaceText(text.encode())
        assert other.fingerprint == mine.fingerprint, why
        assert other.encode("a red circle") == mine.encode("a red circle")
    fewer_merges = {**raw, "model": {**raw["model"], "merges": raw["model"]["merges"][:-1]}}
    no_digits = {**raw, "pre_tokenizer": raw["pre_tokenizer"]["pretokenizers"][1]}
    fewer_added = {**raw, "added_tokens": raw["added_tokens"][:-1]}
    for changed in (fewer_merges, no_digits, fewer_added):
        assert ours(changed).fingerprint != mine.fingerprint
    assert ours(raw, (len(CONTROL), mine.size - 1)).fingerprint != mine.fingerprint


def test_ids_behind_the_vocabulary_stay_where_the_file_has_them(raw):
    """Control tokens come first among the added ones here: leaving them out must not move the others."""
    added = [{**raw["added_tokens"][-1], "content": f"<|{i}|>", "id": 1000 + i, "special": i < 3} for i in range(5)]
    mine = ours({**raw, "added_tokens": raw["added_tokens"] + added})
    assert mine.size == 1005
    assert mine.encode("a<|3|><|4|>")[-2:] == [1003, 1004]
    assert max(mine.encode("<|0|><|2|>")) < 1000


def test_save_and_load(raw, tmp_path):
    for text_ids in (None, (len(CONTROL), 300)):
        mine = ours(raw, text_ids)
        mine.save(tmp_path)
        loaded = load_text_tokenizer(tmp_path)
        assert (loaded.size, loaded.fingerprint) == (mine.size, mine.fingerprint)
        assert loaded.encode("a red circle\n\n") == mine.encode("a red circle\n\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "tokenizer.json"]
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))


def test_bytes_as_a_last_resort():
    """The other family: words with a mark for their space, and bytes for characters that were never seen."""
    marked = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    marked.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    marked.train_from_iterator(test_text.CORPUS, trainer)
    marked.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    raw = json.loads(marked.to_str())
    with pytest.raises(ValueError, match="no text token for 256 of the 256 bytes"):
        ours(raw)
    raw["added_tokens"] = raw["added_tokens"][:1]
    mine, reference = ours(raw), theirs(raw)
    for text in ("a red circle", "數 \0 é", "<unk>!", "  two  spaces  \n"):
        assert mine.decode(mine.encode(text)) == text
    assert mine.encode("a red 數") == reference.encode("a red 數", add_special_tokens=False)
    raw["model"]["ignore_merges"] = True
    with pytest.raises(ValueError, match="fall back to bytes"):
        ours(raw)


def test_released_layout(raw, tmp_path):
    """The joint tokenizer.json of released weights: text rows are its ids, and nothing written reaches the others."""
    joint_raw = in_released_rows(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(joint_raw))
    mine = HuggingFaceText.from_published(tmp_path)
    bundle = dataclasses.replace(test_bundle.untrained(0), text=mine)
    vocab = JointVocab.released(bundle.fingerprints)
    assert mine.text_ids == (vocab.text.start, vocab.text.stop)
    bundle.save(tmp_path / "bundle", vocab)
    saved = JointVocab.from_json((tmp_path / "bundle" / "vocab.json").read_text())
    assert saved == vocab and vocab.text_offset == 0
    loaded = TokenizerBundle.load(tmp_path / "bundle").text
    reference = theirs(joint_raw)
    for text in ("USER: a red circle", "what is 7?\n", "數"):
        ids = loaded.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False)
        np.testing.assert_array_equal(vocab.text_to_rows(ids), ids)
    everything = "".join(name for name, i in joint_raw["model"]["vocab"].items() if i not in vocab.text)
    assert min(reference.encode(everything)) < vocab.text.start <= min(loaded.encode(everything))
    assert loaded.decode(loaded.encode(everything)) == everything
    messages = [Message("user", (Text(everything),)), Message("assistant", (Text("seven"),))]
    example = joint.encode(messages, Task.QUESTION, vocab, loaded, load_templates("official-v0.1"))
    for span in example.spans:
        rows = example.tokens_L[span.start : span.start + span.length]
        assert span.modality == Modality.TEXT and (span.part < 0 or vocab.text.start <= rows.min())
    assert joint.decode(example, vocab, loaded) == messages


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: {"model": {"type": "WordPiece", "vocab": {}}}, "only byte-pair encoding"),
        (lambda raw: {"model": {**raw["model"], "vocab": {"a": 9}}}, "no text token for 255 of the 256 bytes"),
        (lambda raw: {"pre_tokenizer": None}, "only byte-level encodings"),
        (lambda raw: {"model": {**raw["model"], "merges": [["q", "nowhere"]]}}, "not a tokenizer.json: "),
        (lambda raw: {"added_tokens": [{"content": "x"}]}, "not a tokenizer.json: KeyError"),
    ],
)
def test_files_that_cannot_be_read_are_named(raw, tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**raw, **change(raw)}))
    with pytest.raises(ValueError, match=message) as caught:
        HuggingFaceText.from_published(path)
    assert str(path) in str(caught.value)


def test_files_that_are_none(raw, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HuggingFaceText.from_published(tmp_path)
    for text in ("{", "[]", "{}"):
        with pytest.raises(ValueError, match="not a tokenizer.json"):
            HuggingFaceText(text.encode())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        ours(raw)


def test_imported_weights_get_the_released_rows_of_the_tokenizers_beside_them(raw, tmp_path):
    """Text alone, as for a Chameleon that speaks not: the rows stay, those of pictures and speech mean nothing."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(in_released_rows(raw)))
    HuggingFaceText.from_published(tmp_path).save(tmp_path / "text")
    vocab, released = vocabulary_of(tmp_path), JointVocab.released()
    assert (vocab.size, vocab.text, vocab.specials) == (released.size, released.text, released.specials)
    assert (vocab.image, vocab.tokens_per_image, vocab.speech) == (None, 0, ())
    bundle = TokenizerBundle.from_parts(tmp_path)
    assert dict(vocab.tokenizer_fingerprints) == bundle.fingerprints
    ids = bundle.text.encode("a red circle")
    np.testing.assert_array_equal(vocab.text_to_rows(ids), ids)
