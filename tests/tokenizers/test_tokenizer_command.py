"""`aromni tokenizer`: every action on every kind, through the command line's own parser."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import soundfile
import test_adversarial
import test_bundle
import test_huggingface_text
import test_image
import test_speech
import torch
import transformers

from aromni_jax.config import to_json
from aromni_jax.interop.encodec_files import load_encodec
from aromni_jax.interop.vqgan_files import write_vqgan
from aromni_jax.tokenizers.image import ImageTokenizer
from aromni_jax.tokenizers.speech import SpeechTokenizer
from launch.cli import run
from tests.fixtures.vqgan_tokenizer import random_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with text, pictures, sound, a manifest of them, and saved tokenizers."""
    root = tmp_path_factory.mktemp("corpus")
    for i, (picture, sound) in enumerate(zip(test_image.pictures(3), test_speech.sounds(3))):
        PIL.Image.fromarray(picture).save(root / f"{i}.png")
        soundfile.write(root / f"{i}.wav", sound, 4000)
    (root / "a.txt").write_text("some words\nand more words")
    parts = [[{"text": f"words {i}"}, {"image": f"{i}.png"}] for i in range(3)]
    lines = [
        {"task": "caption", "split": split, "messages": [{"role": "user", "parts": parts[i]}]}
        for i, split in enumerate(["train", "train", "heldout"])
    ]
    (root / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bundle = test_bundle.untrained(0)
    bundle.image.save(root / "image")
    bundle.speech.save(root / "speech")
    return root


def tokenizer(*arguments) -> int:
    return run("tokenizer", [str(argument) for argument in arguments])


def test_text_is_trained_and_comes_back(corpus, tmp_path):
    flags = ("--kind=text", f"--tokenizer={tmp_path / 'text'}")
    manifest = f"--input={corpus / 'manifest.jsonl'}"
    assert tokenizer("train", *flags, manifest, "--vocab_size=280") == 0
    assert tokenizer("encode", *flags, f"--input={corpus / 'a.txt'}", f"--output={tmp_path / 'a.npy'}") == 0
    assert tokenizer("decode", *flags, f"--input={tmp_path / 'a.npy'}", f"--output={tmp_path / 'b.txt'}") == 0
    assert (tmp_path / "b.txt").read_text() == (corpus / "a.txt").read_text()
    assert tokenizer("evaluate", *flags, manifest, f"--json={tmp_path / 'table.json'}") == 0
    assert json.loads((tmp_path / "table.json").read_text())["round_trip"] == 1.0


def test_text_files_are_read_in_pieces(corpus, tmp_path, capsys, monkeypatch):
    """Lines of a file count towards the cap; a piece of a long line is a line too."""
    (tmp_path / "long.txt").write_text("seven words of text in a line\n" * 50, encoding="utf-8")
    flags = ("train", "--kind=text", f"--input={tmp_path / 'long.txt'}", "--vocab_size=280")
    assert tokenizer(*flags, f"--tokenizer={tmp_path / 'a'}", "--max_lines=20") == 0
    assert "50 lines of text; learning from 20 of them, sampled with seed 0" in capsys.readouterr().out
    assert tokenizer(*flags, f"--tokenizer={tmp_path / 'b'}") == 0
    assert "50 lines of text; learning from all" in capsys.readouterr().out
    monkeypatch.setattr("launch.tokenizer_input.LONGEST_PIECE", 10)
    assert tokenizer(*flags, f"--tokenizer={tmp_path / 'c'}") == 0
    assert "150 lines of text" in capsys.readouterr().out


def test_published_text_files(corpus, tmp_path, capsys):
    """A tokenizer.json in, by itself or in its directory; what it does to text is said."""
    raw = test_huggingface_text.trained()
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    flags = ("--kind=text", f"--tokenizer={tmp_path / 'ours'}")
    for source in (tmp_path / "tokenizer.json", tmp_path):
        assert tokenizer("import", *flags, f"--input={source}", "--overwrite") == 0
    told = capsys.readouterr().out
    assert f"{len(raw['model']['vocab'])} ids, fingerprint" in told
    assert "Chameleon" not in told and "every text back" not in told
    table = tmp_path / "table.json"
    assert tokenizer("evaluate", *flags, f"--input={corpus / 'manifest.jsonl'}", f"--json={table}") == 0
    assert json.loads(table.read_text())["round_trip"] == 1.0
    raw = {**test_huggingface_text.in_released_rows(raw), "normalizer": {"type": "NFKC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert tokenizer("import", *flags, f"--input={tmp_path}", "--overwrite") == 0
    told = capsys.readouterr().out
    assert "Chameleon's layout: text has the ids 16384..65535" in told and "not 'e\u0301'" in told
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer("import", *flags, f"--input={tmp_path}", "--overwrite") == 1
    assert "not a tokenizer.json" in capsys.readouterr().err


def test_pictures(corpus, tmp_path):
    flags = ("--kind=image", f"--tokenizer={corpus / 'image'}")
    assert tokenizer("encode", *flags, f"--input={corpus / '0.png'}", f"--output={tmp_path / 'a.npy'}") == 0
    assert np.load(tmp_path / "a.npy").shape == (16,)
    assert tokenizer("decode", *flags, f"--input={tmp_path / 'a.npy'}", f"--output={tmp_path / 'b.png'}") == 0
    assert PIL.Image.open(tmp_path / "b.png").size == (16, 16)
    table = tmp_path / "table.json"
    split = ("--split=train", f"--json={table}")
    assert tokenizer("evaluate", *flags, f"--input={corpus / 'manifest.jsonl'}", *split) == 0
    numbers = json.loads(table.read_text())
    assert numbers["pictures"] == 2 and numbers["codes_per_picture"] == 16
    assert -1 <= numbers["ssim"] <= 1 and numbers["psnr_db"] > 0 and numbers["encode_codes_per_second"] > 0
    page = tmp_path / "page.html"
    assert tokenizer("evaluate", *flags, f"--input={corpus}", f"--report={page}") == 0
    assert page.read_text().count("data:image/png;base64,") == 6


def test_a_recipe_is_a_file_like_the_config_of_a_saved_tokenizer(corpus, tmp_path, capsys):
    recipe = json.loads(to_json(test_adversarial.GAN))
    recipe["recipe"]["total_steps"] = 12
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    flags = ("train", "--kind=image", f"--tokenizer={tmp_path / 'vqgan'}", f"--input={corpus}")
    assert tokenizer(*flags, f"--recipe={tmp_path / 'recipe.json'}") == 0
    assert "discriminator" in capsys.readouterr().out
    assert ImageTokenizer.load(tmp_path / "vqgan").config.discriminator == test_adversarial.GAN.discriminator
    assert tokenizer(*flags, "--recipe=camelon") == 1
    assert "neither a file nor one of quickstart, chameleon" in capsys.readouterr().err
    recipe["discriminater"] = recipe.pop("discriminator")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert tokenizer(*flags, f"--recipe={tmp_path / 'recipe.json'}") == 1
    assert "did you mean 'discriminator'" in capsys.readouterr().err


def test_published_picture_files(tmp_path, capsys):
    """A torch checkpoint in, our tokenizer, codes and a picture, and the transformers directory out."""
    published = random_tokenizer()
    write_vqgan(published, tmp_path / "vqgan.ckpt")
    flags = ("--kind=image", f"--tokenizer={tmp_path / 'ours'}")
    source = f"--input={tmp_path / 'vqgan.ckpt'}"
    assert tokenizer("import", *flags, source) == 1
    assert "--image_size" in capsys.readouterr().err
    assert tokenizer("import", *flags, source, "--image_size=16") == 0
    assert "64 codes a picture" in capsys.readouterr().out
    PIL.Image.fromarray(test_image.pictures(1)[0]).save(tmp_path / "a.png")
    assert tokenizer("encode", *flags, f"--input={tmp_path / 'a.png'}", f"--output={tmp_path / 'a.npy'}") == 0
    assert np.load(tmp_path / "a.npy").shape == (64,)
    assert tokenizer("export", *flags, f"--output={tmp_path / 'hf'}") == 0
    assert tokenizer("import", "--kind=image", f"--tokenizer={tmp_path / 'b'}", f"--input={tmp_path / 'hf'}") == 0
    first, second = (ImageTokenizer.load(tmp_path / name).fingerprint for name in ("ours", "b"))
    assert first == second == published.fingerprint
    assert tokenizer("export", *flags) == 1 and tokenizer("import", *flags) == 1
    errors = capsys.readouterr().err
    assert "needs --output" in errors and "needs --input" in errors


def test_published_speech_files(tmp_path, capsys):
    """An EncodecModel directory and a WavTokenizer checkpoint in, codes of a sound, and the same files out."""
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        num_filters=2, hidden_size=4, codebook_size=16, upsampling_ratios=[4, 2], target_bandwidths=[24.0]
    )
    transformers.EncodecModel(config).save_pretrained(tmp_path / "encodec")
    flags = ("--kind=speech", f"--tokenizer={tmp_path / 'ours'}")
    assert tokenizer("import", *flags, f"--input={tmp_path / 'encodec'}") == 0
    assert "codebook(s) of 16" in capsys.readouterr().out
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(4800) / 20).astype(np.float32), 24_000)
    assert tokenizer("encode", *flags, f"--input={tmp_path / 'a.wav'}", f"--output={tmp_path / 'a.npy'}") == 0
    ours = SpeechTokenizer.load(tmp_path / "ours")
    assert np.load(tmp_path / "a.npy").shape == (ours.num_codebooks, 600)
    assert tokenizer("export", *flags, f"--output={tmp_path / 'again'}") == 0
    assert load_encodec(tmp_path / "again").fingerprint == ours.fingerprint
    assert tokenizer("export", *flags, f"--output={tmp_path / 'wrong.ckpt'}") == 1
    assert "only a WavTokenizer" in capsys.readouterr().err
    assert tokenizer("import", *flags, f"--input={tmp_path / 'missing.ckpt'}", "--overwrite") == 1
    assert "does not exist" in capsys.readouterr().err
    assert tokenizer("import", "--kind=text", *flags[1:], f"--input={tmp_path / 'encodec'}") == 1


def test_sound(corpus, tmp_path, capsys):
    flags = ("--kind=speech", f"--tokenizer={corpus / 'speech'}")
    assert tokenizer("encode", *flags, f"--input={corpus / '0.wav'}", f"--output={tmp_path / 'a.npy'}") == 0
    assert tokenizer("decode", *flags, f"--input={tmp_path / 'a.npy'}", f"--output={tmp_path / 'b.wav'}") == 0
    num_codes = np.load(tmp_path / "a.npy").shape[1]
    assert soundfile.info(tmp_path / "b.wav").frames == num_codes * test_speech.HOP
    assert tokenizer("evaluate", *flags, f"--input={corpus}", f"--json={tmp_path / 'table.json'}") == 0
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert numbers["utterances"] == 3 and -100 <= numbers["si_sdr_db"] <= 100
    assert numbers["encode_codes_per_second"] > 0 and numbers["decode_codes_per_second"] > 0
    assert "converted" not in capsys.readouterr().out


def test_conversions_of_sound_are_told(corpus, tmp_path, capsys):
    """One line for all files that were converted alike; a page of them; silence has no ratio and is counted."""
    for name, rate_hz, shape in (("a", 8000, (4000, 2)), ("b", 8000, (4000, 2)), ("<c>", 4000, (2000,))):
        sound = np.zeros(shape) if name == "a" else np.random.default_rng(0).normal(0, 0.1, shape)
        soundfile.write(tmp_path / f"{name}.wav", sound, rate_hz)
    flags = ("--kind=speech", f"--tokenizer={corpus / 'speech'}", f"--input={tmp_path}")
    line = "a.wav and 1 more: 8000 Hz, 2 channels, converted to 4000 Hz mono"
    page = tmp_path / "page.html"
    assert tokenizer("evaluate", *flags, f"--report={page}") == 0
    told = capsys.readouterr().out
    assert line in told and told.count("converted") == 1 and "1 of 3 utterances are silent" in told
    text = page.read_text()
    assert text.count("data:audio/wav;base64,") == text.count("data:image/png;base64,") == 6
    assert "&lt;c&gt;.wav" in text and "<c>" not in text
    one = (*flags[:2], f"--input={tmp_path / 'b.wav'}", f"--output={tmp_path / 'b.npy'}")
    assert tokenizer("encode", *one) == 0
    assert "b.wav: 8000 Hz, 2 channels, converted to 4000 Hz mono" in capsys.readouterr().out
    recipe = json.loads(to_json(test_speech.TINY))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    trained = ("train", "--kind=speech", f"--tokenizer={tmp_path / 'ours'}", flags[2])
    assert tokenizer(*trained, f"--recipe={tmp_path / 'recipe.json'}", "--total_steps=2") == 0
    assert line in capsys.readouterr().out


def test_errors_are_one_line(corpus, tmp_path, capsys):
    flags = ("--kind=image", f"--tokenizer={corpus / 'image'}")
    for arguments, message in (
        (("encode", *flags, f"--input={corpus / '0.png'}"), "needs --output"),
        (("encode", *flags, f"--input={corpus}", "--output=x.npy"), "holds 3 files"),
        (("evaluate", *flags, f"--input={tmp_path}"), "holds no image"),
        (("evaluate", *flags, f"--input={tmp_path / 'none'}"), "does not exist"),
        (("decode", *flags, f"--input={corpus / 'a.txt'}", "--output=x.png"), "not a .npy file"),
    ):
        assert tokenizer(*arguments) == 1
        assert message in capsys.readouterr().err
