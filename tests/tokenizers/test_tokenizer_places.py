"""`aromni tokenizer` looks before it works: at what would be replaced, is of another kind, or damaged."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import soundfile
import test_bundle
import test_image
import test_speech

from aromni_jax.config import to_json
from aromni_jax.tokenizers import shipped
from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.image import ImageTokenizer
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.tokenizers.text import SentencePieceText
from data_pipelines.pretokenize import pretokenize
from launch.cli import run
from tests.fixtures import published_layouts as made
from tests.fixtures.data_fakes import config_for


def tokenizer(*arguments: object) -> int:
    return run("tokenizer", [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory of an image, a speech and a text tokenizer, and `words.txt` beside them."""
    root = tmp_path_factory.mktemp("saved")
    test_bundle.untrained(0).save(root / "all")
    (root / "words.txt").write_text("some words\nand more words\n" * 9)
    return root


def test_a_text_tokenizer_is_replaced_only_when_asked(
    saved: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ("train", "--kind=text", f"--input={saved / 'words.txt'}", f"--tokenizer={tmp_path / 'text'}")
    assert tokenizer(*flags, "--vocab_size=270") == 0
    before = SentencePieceText.load(tmp_path / "text").fingerprint
    assert tokenizer(*flags, "--vocab_size=280") == 1
    assert "holds a tokenizer already" in capsys.readouterr().err
    assert SentencePieceText.load(tmp_path / "text").fingerprint == before
    assert tokenizer(*flags, "--vocab_size=280", "--overwrite") == 0
    assert SentencePieceText.load(tmp_path / "text").fingerprint != before
    assert tokenizer(*flags[:3], "--vocab_size=100", f"--tokenizer={tmp_path / 'small'}") == 1
    told = capsys.readouterr().err
    needed = told.rsplit("--vocab_size to ")[1].split()[0]
    assert "character_coverage" not in told
    assert tokenizer(*flags[:3], f"--vocab_size={needed}", f"--tokenizer={tmp_path / 'small'}") == 0


def test_a_picture_tokenizer_goes_on_is_kept_or_begins_anew(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    for i in range(3):
        made.picture(tmp_path / f"{i}.png", i)
    (tmp_path / "recipe.json").write_text(to_json(test_image.TINY))
    ours = tmp_path / "ours"
    flags = ("train", "--kind=image", f"--input={tmp_path}", f"--recipe={tmp_path / 'recipe.json'}")
    assert tokenizer(*flags, f"--tokenizer={ours}", "--total_steps=2") == 0
    before = ImageTokenizer.load(ours).fingerprint
    # The same command finds its training finished; another one is another training.
    assert tokenizer(*flags, f"--tokenizer={ours}", "--total_steps=2") == 0
    assert tokenizer(*flags, f"--tokenizer={ours}", "--total_steps=3") == 1
    assert "made with other settings or data" in capsys.readouterr().err
    assert ImageTokenizer.load(ours).fingerprint == before
    assert tokenizer("import", "--kind=image", f"--tokenizer={ours}", "--input=shipped") == 1
    assert "--overwrite to replace it" in capsys.readouterr().err
    assert tokenizer(*flags, f"--tokenizer={ours}", "--total_steps=3", "--overwrite") == 0
    assert ImageTokenizer.load(ours).fingerprint != before
    # What was imported is not the work of the training that was there.
    assert tokenizer("import", "--kind=image", f"--tokenizer={ours}", "--input=shipped", "--overwrite") == 0
    assert tokenizer(*flags, f"--tokenizer={ours}", "--total_steps=3") == 1
    assert ImageTokenizer.load(ours).num_codes == 512


def test_shipped_codecs_become_the_tokenizers_of_a_data_set(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = f"--tokenizer={tmp_path / 'tokenizers' / 'text'}"
    assert tokenizer("train", "--kind=text", f"--input={saved / 'words.txt'}", text, "--vocab_size=270") == 0
    for kind in shipped.KINDS:
        copy = tmp_path / "tokenizers" / kind
        assert tokenizer("import", f"--kind={kind}", "--input=shipped", f"--tokenizer={copy}") == 0
        for name in shipped.shipped_card(kind)["sha256"]:
            assert (copy / name).read_bytes() == (shipped.shipped_directory(kind) / name).read_bytes()
    made.picture(tmp_path / "a.png", 0)
    turns = [("user", {"image": "a.png"}), ("assistant", {"text": "some words"})]
    messages = [{"role": role, "parts": [part]} for role, part in turns]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"task": "caption", "split": "train", "messages": messages}) + "\n")
    assert pretokenize(config_for(manifest, tokenizers=str(tmp_path / "tokenizers")), tmp_path / "data")
    assert TokenizerBundle.load(tmp_path / "data" / "tokenizers").vocab().tokens_per_image == 64


def test_what_is_not_the_tokenizer_that_is_asked_for_is_said(
    saved: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    decoded = ("decode", "--kind=image", "--input=x.npy", "--output=x.png")
    for place, message in (
        (tmp_path / "nothere", "nothere holds no tokenizer (it has no config.json); make one with"),
        (saved / "all", f"did you mean --tokenizer={saved / 'all' / 'image'}?"),
        (saved / "all" / "text", "is a tokenizer of text; give --kind=text, or a tokenizer of image"),
        (saved / "all" / "speech", "is a tokenizer of speech"),
    ):
        assert tokenizer(*decoded, f"--tokenizer={place}") == 1
        assert message in capsys.readouterr().err
    for action in ("train", "import"):
        assert tokenizer(action, "--kind=text", "--input=x.txt", f"--tokenizer={saved / 'words.txt'}") == 1
        assert "words.txt is a file; name a directory" in capsys.readouterr().err


def test_files_that_cannot_be_written_are_said_before_the_work(
    saved: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageTokenizer, "load", lambda directory: pytest.fail("work was done"))
    monkeypatch.setattr(SpeechTokenizer, "load", lambda directory: pytest.fail("work was done"))
    image, speech = (
        (f"--kind={kind}", f"--tokenizer={saved / 'all' / kind}", "--input=x") for kind in ("image", "speech")
    )
    for arguments, message in (
        (("evaluate", *image, f"--json={tmp_path / 'no' / 'x.json'}"), "there is no directory"),
        (("evaluate", *speech, f"--report={tmp_path}"), "is a directory; give a file in it"),
        (("encode", *image, f"--output={tmp_path / 'x.txt'}"), "files that end in .npy"),
        (("decode", *image, f"--output={tmp_path / 'x.xyz'}"), "files that end in .png, .jpg, .jpeg, .webp, .bmp"),
        (("decode", *speech, f"--output={tmp_path / 'x.png'}"), "files that end in .wav, .flac, .ogg"),
    ):
        assert tokenizer(*arguments) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["text", "image", "speech"])
def test_codes_are_integers(
    kind: str, saved: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / {"text": "x.txt", "image": "x.png", "speech": "x.wav"}[kind]
    flags = ("decode", f"--kind={kind}", f"--tokenizer={saved / 'all' / kind}", f"--output={output}")
    np.save(tmp_path / "half.npy", np.full((1, 16), 0.5))
    np.savez(tmp_path / "many.npz", a=np.zeros(16, np.int32))
    for name, message in (("half.npy", "holds float64; codes are"), ("many.npz", "holds an archive of arrays")):
        assert tokenizer(*flags, f"--input={tmp_path / name}") == 1
        assert message in capsys.readouterr().err
    assert not output.exists()


def test_damaged_files_are_left_out_up_to_a_share(
    saved: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    for i, sound in enumerate(test_speech.sounds(3)):
        soundfile.write(tmp_path / f"{i}.wav", sound, 4000)
    for name in ("x", "y"):
        (tmp_path / f"{name}.wav").write_bytes(b"no sound")
    flags = ("--kind=speech", f"--input={tmp_path}")
    speech = ("evaluate", *flags, f"--tokenizer={saved / 'all' / 'speech'}")
    assert tokenizer(*speech) == 1
    told = capsys.readouterr().err
    assert "2 of 5 could not be read, more than --max_bad_fraction=0.01" in told and "raise --max_bad_fraction" in told
    assert "x.wav" in told and "y.wav" in told
    assert tokenizer(*speech, "--max_bad_fraction=0.5", f"--json={tmp_path / 'table.json'}") == 0
    assert "2 of 5 could not be read and are left out; the first: " in capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text())["utterances"] == 3
    (tmp_path / "recipe.json").write_text(to_json(test_speech.TINY))
    trained = ("train", *flags, f"--tokenizer={tmp_path / 'ours'}", f"--recipe={tmp_path / 'recipe.json'}")
    assert tokenizer(*trained, "--total_steps=2") == 1
    assert tokenizer(*trained, "--total_steps=2", "--max_bad_fraction=0.5") == 0
    for i in range(3):
        (tmp_path / f"{i}.wav").unlink()
    assert tokenizer(*speech, "--max_bad_fraction=1") == 1
    assert "none of 2 could be read" in capsys.readouterr().err
