"""Text tokenizers: exact round trips, determinism, errors a user can cause."""

from __future__ import annotations

import random

import pytest

from aromni_jax.tokenizers.text import ByteText, SentencePieceText, _sample, load_text_tokenizer

CORPUS = [f"a {size} {colour} circle at the {place}\nUSER: what is {n}?" for size in ("big", "small")
          for colour in ("red", "green", "blue") for place in ("left", "right") for n in range(12)]  # fmt: skip
HARD = [
    "",
    " ",
    "  two  spaces  ",
    "\n",
    "line\n\n\tbreaks\r\n ",
    "naïve café Ünïcödé",
    "数字 ７ \u00a0 \u3000",
    "emoji 👩‍👩‍👧 \U0010ffff",
    "\u2581 the mark \u2581\u2581 itself\u2581",
    "<unk> <s> </s> <0x41> <pad>",
    "nul \0 and \x1f and \ufeff bom",
    "e\u0301 is not \u00e9",
    "12345.67",
]


@pytest.fixture(scope="module")
def bpe() -> SentencePieceText:
    return SentencePieceText.train(CORPUS, 400, seed=0)


@pytest.mark.parametrize("text", HARD)
def test_round_trip_of_hard_strings(bpe, text):
    for tokenizer in (bpe, ByteText()):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.size for i in ids)
        assert tokenizer.decode(ids) == text


def test_round_trip_of_random_strings(bpe):
    generator = random.Random(0)
    for _ in range(300):
        points = (generator.choice([generator.randrange(0xD800), generator.randrange(128), 0x20, 0x0A, 0x2581])
                  for _ in range(generator.randrange(20)))  # fmt: skip
        text = "".join(map(chr, points))
        assert bpe.decode(bpe.encode(text)) == text


def test_words_of_the_corpus_become_few_pieces(bpe):
    assert len(bpe.encode("a big red circle")) <= 8
    assert len(bpe.encode("\n")) == 1


def test_training_is_deterministic_and_sampled_by_seed():
    again = SentencePieceText.train(CORPUS, 400, seed=0)
    assert again.fingerprint == SentencePieceText.train(CORPUS, 400, seed=0).fingerprint
    sampled = [SentencePieceText.train(CORPUS, 330, seed=seed, max_lines=12).fingerprint for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_corpus_larger_than_the_sample_is_read_once_and_not_kept():
    """The words of the second half of a long corpus are learnt too, from a tenth of its lines."""

    class Line(str):
        alive, most = 0, 0

        def __init__(self, text):
            Line.alive += 1
            Line.most = max(Line.most, Line.alive)

        def __del__(self):
            Line.alive -= 1

        def replace(self, *_):  # Training cleans its lines; these stay what they are.
            return self

        def split(self, _):
            return [self]

        def __getitem__(self, _):
            return self

    def corpus():
        for i in range(20_000):
            yield Line("zebras graze early" if i >= 10_000 else "quiet rivers bend")

    told = []
    trained = SentencePieceText.train(corpus(), 290, seed=3, max_lines=2_000, report=told.append)
    assert told == ["20,000 lines of text; learning from 2,000 of them, sampled with seed 3"]
    assert 2_000 <= Line.most < 2_010
    assert len(trained.encode("zebras")) < 6 and len(trained.encode("quiet")) < 5
    again = SentencePieceText.train(map(str, corpus()), 290, seed=3, max_lines=2_000)
    assert again.fingerprint == trained.fingerprint


def test_a_sample_is_fair():
    """Each tenth of a corpus gets about a tenth of the sample (standard deviation 13 lines)."""
    kept, seen = _sample((str(i) for i in range(50_000)), 2_000, seed=0)
    assert seen == 50_000 and len(set(kept)) == 2_000
    tenths = [sum(int(line) // 5_000 == tenth for line in kept) for tenth in range(10)]
    assert min(tenths) > 140 and max(tenths) < 260


def test_a_corpus_that_fits_is_used_whole():
    told = []
    SentencePieceText.train(CORPUS, 400, max_lines=2 * len(CORPUS), report=told.append)
    assert told == [f"{2 * len(CORPUS)} lines of text; learning from all"]
    with pytest.raises(ValueError, match="on 0 lines"):
        SentencePieceText.train(CORPUS, 400, max_lines=0)


def test_vocabulary_larger_than_the_corpus_shrinks():
    assert 256 < SentencePieceText.train(["abc abc"], 5000, seed=0).size < 300


def test_save_and_load(bpe, tmp_path):
    for tokenizer in (bpe, ByteText()):
        tokenizer.save(tmp_path / tokenizer.fingerprint)
        loaded = load_text_tokenizer(tmp_path / tokenizer.fingerprint)
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.size == tokenizer.size
        assert loaded.encode("a red circle") == tokenizer.encode("a red circle")


def test_errors(bpe, tmp_path):
    with pytest.raises(ValueError, match="empty corpus"):
        SentencePieceText.train(["", "\n"], 400)
    with pytest.raises(ValueError, match="100 pieces"):
        SentencePieceText.train(CORPUS, 100)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceText(b"rubbish")
    with pytest.raises(ValueError, match="not valid Unicode at character 1"):
        bpe.encode("a\ud800")
    with pytest.raises(ValueError, match="outside the tokenizer's 0..255"):
        ByteText().decode([256])
    with pytest.raises(ValueError, match="outside"):
        bpe.decode([bpe.size])
    (tmp_path / "config.json").write_text('{"kind": "runes"}')
    with pytest.raises(ValueError, match="'runes'"):
        load_text_tokenizer(tmp_path)
