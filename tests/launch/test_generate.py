"""Requests are checked before a model is loaded, each with a line that says what to do."""

from __future__ import annotations

import argparse
import types

import numpy as np
import pytest
import soundfile

from aromni_jax.inference.policy import DecodingConfig, Mode
from aromni_jax.structs import Speech
from aromni_jax.tokenizers.speech_input import prepare_sound
from aromni_jax.vocab import JointVocab
from launch import generate, generate_describe


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return parser.parse_args([*argv, "--model=m", "--output=o"])


def test_one_request_from_flags():
    (request,) = generate.read_requests(arguments("text-to-image", "--text=a red star"))
    assert request == generate.Request("text-to-image", text="a red star")


def test_many_requests_from_a_file(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"task": "caption", "image": "a.png"}\n\n{"text": "seven"}\n')
    requests = generate.read_requests(arguments("text-to-speech", f"--input={path}"))
    assert requests == [
        generate.Request("caption", image=str(tmp_path / "a.png")),
        generate.Request("text-to-speech", text="seven"),
    ]


@pytest.mark.parametrize(
    "argv, message",
    [
        ((), "give a task"),
        (("text-to-imag", "--text=x"), "did you mean 'text-to-image'"),
        (("text-to-image",), "text-to-image needs --text"),
        (("caption", "--image=a.png", "--text=x"), "caption does not take --text"),
        (("chat",), "chat needs something to answer to"),
    ],
)
def test_bad_requests_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        generate.read_requests(arguments(*argv))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no requests"),
        ("{", "line 1 is not a request"),
        ('{"task": "caption", "picture": "a.png"}', "line 1 is not a request"),
        ('{"task": "caption"}\n{', "line 1: caption needs --image"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        generate.read_requests(arguments(f"--input={path}"))
    with pytest.raises(ValueError, match="beside it"):
        generate.read_requests(arguments(f"--input={path}", "--text=x"))


def test_tasks_may_be_called_as_manifests_call_them(tmp_path):
    (request,) = generate.read_requests(arguments("text_to_image", "--text=a red star"))
    assert request == generate.Request("text-to-image", text="a red star")
    (tmp_path / "in.jsonl").write_text('{"task": "text_to_speech", "text": "six"}\n{"task": null, "text": "seven"}\n')
    requests = generate.read_requests(arguments("text_to_image", f"--input={tmp_path}/in.jsonl"))
    assert [request.task for request in requests] == ["text-to-speech", "text-to-image"]
    with pytest.raises(ValueError, match="unknown task 'text_to_imag'; did you mean 'text-to-image'"):
        generate.read_requests(arguments("text_to_imag", "--text=x"))


def test_a_budget_without_a_dialogue_is_refused(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"task": "chat", "text": "hello"}\n')
    for argv in (("chat", "--text=hello"), (f"--input={tmp_path}/in.jsonl",)):
        with pytest.raises(ValueError, match='--budget=100 is for dialogues.* "conversation"'):
            generate.read_requests(arguments(*argv, "--budget=100"))


@pytest.mark.parametrize(
    "flag",
    [
        *("--max_text_tokens=0", "--max_text_tokens=-3", "--seed=99999999999999999999"),
        *("--max_seconds=0.0", "--max_seconds=-1.0", "--max_seconds=inf", "--max_seconds=nan"),
        *("--temperature=-1.0", "--temperature=nan", "--top_p=0.0", "--top_p=1.5"),
        *("--guidance=-1.0", "--image_guidance=inf"),
    ],
)
def test_an_impossible_number_is_named_by_its_flag_before_a_model_is_loaded(flag):
    args = arguments("text-to-image", "--text=x", flag)
    args.config_overrides = []
    with pytest.raises(ValueError, match=f"^{flag} is not allowed; give a .*number"):
        generate.main(args)


def test_a_folder_that_cannot_take_answers_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text("[1]")
    for output, message, more in (
        ("file", "file is no folder", ()),
        ("file/below/it", "file is no folder", ("--describe",)),
        ("other", "other holds the answers of an earlier command .*; give another folder, or --overwrite", ()),
        ("other", "result.json is not of `aromni generate`", ("--overwrite",)),
    ):
        args = arguments("text-to-image", "--text=x", *more)
        args.config_overrides, args.output = [], str(tmp_path / output)
        with pytest.raises(ValueError, match=message):
            generate.main(args)
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "other" / "result.json").read_text() == "[1]"


def test_conversion_of_speech_is_told(tmp_path, capsys):
    """What is done to a sound before the model hears it is printed; a sound that fits is nobody's news."""

    class Codec:
        def prepare(self, sound, rate_hz=None, report=None):
            return prepare_sound(sound, rate_hz, 4000, report)

        def encode(self, waveforms):
            return [np.zeros((1, len(waveform) // 10), np.int32) for waveform in waveforms]

    loaded = types.SimpleNamespace(bundle=types.SimpleNamespace(speech=Codec(), image=None))
    soundfile.write(tmp_path / "a.wav", np.zeros((8000, 2)), 8000)
    soundfile.write(tmp_path / "b.wav", np.zeros(4000), 4000)
    for name, told in (("a.wav", "a.wav: 8000 Hz, 2 channels, converted to 4000 Hz mono\n"), ("b.wav", "")):
        message = generate._question(generate.Request("speech-to-text", speech=str(tmp_path / name)), loaded)
        assert isinstance(message.parts[0], Speech) and message.parts[0].codes_KU.shape == (1, 400)
        assert capsys.readouterr().out == (f"{tmp_path}/{told}" if told else "")


def test_flags_go_before_the_config_and_the_config_before_nothing():
    def decoding(*argv, overrides=()):
        args = arguments("chat", *argv)
        args.config_overrides = list(overrides)
        return generate.read_decoding(args)

    assert decoding() == DecodingConfig()
    released = decoding("--config=configs/decode.py:released", "--temperature=0.5")
    assert released.text == Mode(0.5, top_p=0.96, repetition_penalty=1.2)
    assert released.image == Mode(0.5, top_p=0.96, guidance=3.07, image_guidance=1.15)
    assert released.recognition == Mode(1.2, top_p=0.96, repetition_penalty=1.2)
    assert decoding(overrides=["--config.image.guidance=1.0"]).image == Mode(1.0, top_p=0.96)
    target = "--config=configs/decode.py:released"
    assert decoding(target, "--guidance=1").image == Mode(1.0, top_p=0.96)
    both = decoding(target, "--guidance=2", "--image_guidance=1.5").image
    assert (both.guidance, both.image_guidance) == (2.0, 1.5)
    assert decoding(overrides=["--config.image.image_guidance=1.5"]).image.picture_guidance == 1.5
    assert decoding(target, overrides=["--config.image.image_guidance=None"]).image.picture_guidance == 3.07
    with pytest.raises(ValueError, match="did you mean 'image.guidance'"):
        decoding(overrides=["--config.image.guidence=1.0"])


def test_the_machine_is_described_without_weights_or_a_request(tmp_path, monkeypatch, capsys):
    pictures = JointVocab.build(text_size=40, image_codes=16, tokens_per_image=4)
    monkeypatch.setattr(generate_describe, "load_vocab", lambda directory: pictures)
    args = arguments("--describe", "--config=configs/decode.py:released")
    args.output, args.config_overrides = str(tmp_path / "out"), []
    assert generate.main(args) == 0
    table = (tmp_path / "out" / "machine.txt").read_text()
    assert capsys.readouterr().out == table
    assert "caption: text" in table and "text-to-image: image" in table
    assert "speech" not in table and "chat" not in table  # this vocabulary has no speech codes
    assert "temperature 1.2, top-p 0.96, repetition penalty 1.2 (answer)" in table
    assert (tmp_path / "out" / "machine.svg").read_text().startswith("<svg")
    args.task = "text-to-speech"
    with pytest.raises(ValueError, match="no speech codes"):
        generate.main(args)
