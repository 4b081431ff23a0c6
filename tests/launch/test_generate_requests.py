"""`aromni generate` asked for what cannot be: one line says why, and no other request loses its answer."""

from __future__ import annotations

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import soundfile

from aromni_jax.interop.chameleon import METADATA_FILE, Provenance, TreeSource, export_chameleon
from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.image import ImageTokenizer
from aromni_jax.tokenizers.shipped import shipped_directory
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.tokenizers.text import ByteText
from launch import cli, generate_stream
from tests.fixtures.small_models import random_params, small_model

MAX_POSITIONS = 140


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A model of random weights with the shipped tokenizers and few positions."""
    directory = tmp_path_factory.mktemp("exported")
    bundle = TokenizerBundle(
        ByteText(),
        ImageTokenizer.load(shipped_directory("image")),
        SpeechTokenizer.load(shipped_directory("speech")),
    )
    vocab = bundle.vocab()
    bundle.save(directory / "tokenizers", vocab)
    model = small_model(vocab_size=vocab.size, perceptual_dim=0)
    provenance = Provenance(step=1, template="quickstart", max_positions=MAX_POSITIONS)
    export_chameleon(
        TreeSource(random_params(model)),
        model,
        vocab,
        directory / "model",
        provenance=provenance,
        dtype="float32",
        tokenizers=directory / "tokenizers",
    )
    return directory / "model"


@pytest.fixture
def media(tmp_path):
    """A good picture and a good sound, and everything that may be wrong with others."""
    PIL.Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(tmp_path / "good.png")
    PIL.Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "words.png").write_text("this is no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    sound = np.sin(np.arange(8000) / 9).astype(np.float32)
    soundfile.write(tmp_path / "good.wav", sound, 16000)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:5000])
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "silent.wav", sound[:0], 16000)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(8000) == 7000, np.nan, sound), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "long.wav", np.zeros(5 * 16000), 16000)
    return tmp_path


BAD = (
    ({"task": "caption", "image": "cut.png"}, "cut.png cannot be read as a picture"),
    ({"task": "caption", "image": "words.png"}, "words.png cannot be read as a picture"),
    ({"task": "caption", "image": "empty.png"}, "empty.png cannot be read as a picture"),
    ({"task": "caption", "image": "none.png"}, "none.png"),
    ({"task": "caption", "image": "."}, ""),
    ({"task": "speech-to-text", "speech": "cut.wav"}, "cut.wav is cut short"),
    ({"task": "speech-to-text", "speech": "empty.wav"}, "empty.wav cannot be read as sound"),
    ({"task": "speech-to-text", "speech": "silent.wav"}, "silent.wav has no samples"),
    ({"task": "speech-to-text", "speech": "nan.wav"}, "nan.wav has a value that is not a number (sample 7000)"),
    ({"task": "speech-to-text", "speech": "long.wav"}, "is too long: it has 209 tokens, the model 140 positions"),
    ({"task": "text-to-image", "text": "x" * 70}, "shorten what is asked"),
    ({"task": "text-to-imag", "text": "x"}, "unknown task 'text-to-imag'; did you mean 'text-to-image'?"),
)
ONLY_IN_FILES = (
    ("{", "line {} is not a request with task, text, image, speech"),
    ("[1]", "line {} is not a request with task, text, image, speech, conversation: not an object"),
    ('{"task": "caption", "picture": "good.png"}', "line {} is not a request"),
    ('{"task": "question", "text": 5}', "text must be a string, not 5"),
    ('{"task": "caption"}', "line {}: caption needs --image"),
    ('{"text": "of no task"}', "line {}: unknown task ''"),
    ('{"task": "question", "text": "\\ud800"}', "not valid Unicode"),
)
GOOD = (
    {"task": "caption", "image": "good.png"},
    {"task": "text-to-speech", "text": "seven\u2028eight"},
    {"task": "speech-to-text", "speech": "good.wav"},
    {"task": "text-to-image", "text": "a star"},
    {"task": "chat", "image": "good.png", "text": "hello"},
)


def ask(capsys, export, output, *argv):
    more = ["--max_text_tokens=6", "--max_seconds=0.2", f"--output={output}"]
    status = cli.main(["generate", f"--model={export}", *more, *argv])
    said = capsys.readouterr()
    path = output / "result.json"
    return status, said, json.loads(path.read_text())["answers"] if path.is_file() else None


@pytest.mark.parametrize("request_and_message", BAD, ids=lambda case: next(reversed(case[0].values()))[:12])
def test_a_bad_request_is_answered_in_one_line(export, media, capsys, request_and_message):
    request, message = request_and_message
    fields = {k: str(media / v) if k in ("image", "speech") else v for k, v in request.items()}
    argv = [fields.pop("task"), *(f"--{name}={value}" for name, value in fields.items())]
    status, said, _ = ask(capsys, export, media / "out", *argv)
    assert status == 1 and message in said.err
    assert said.err.startswith("aromni generate: error: ") and said.err.count("\n") == 1


def test_bad_lines_lose_no_other_answer(export, media, capsys):
    """Each good line has the answer that it has among good ones; each bad one says what is wrong with it."""
    bad = [(json.dumps(request), message) for request, message in BAD] + list(ONLY_IN_FILES)
    good = [json.dumps(request, ensure_ascii=False) for request in GOOD]
    lines, places = [line for line, _ in bad], []
    for number, line in enumerate(good):
        places.append(3 * number + 1)
        lines.insert(places[-1], line)
    (media / "mixed.jsonl").write_text("\n".join(lines), encoding="utf-8")
    filler = json.dumps({"task": "question", "text": "filler"})
    whole = [line if i in places else filler for i, line in enumerate(lines)]
    (media / "whole.jsonl").write_text("\n".join(whole), encoding="utf-8")
    status, _, wanted = ask(capsys, export, media / "whole", f"--input={media}/whole.jsonl")
    assert status == 0 and not any("error" in line for line in wanted)

    for name, more in (("mixed", []), ("streamed", ["--stream"])):
        status, said, answers = ask(capsys, export, media / name, f"--input={media}/mixed.jsonl", *more)
        assert status == 1 and f"{len(bad)} of {len(lines)} requests were not answered" in said.err
        assert len(answers) == len(lines)
        failed = [(i, line) for i, line in enumerate(answers) if i not in places]
        for (i, line), (_, message) in zip(failed, bad, strict=True):
            assert message.format(i + 1) in line["error"] and line["text"] == line["files"] == []
        for place in places:
            answers[place].pop("latency", None)
            assert answers[place] == wanted[place]
            for file in wanted[place]["files"]:
                assert (media / name / file).is_file()


def test_no_text_and_no_sound_is_longer_than_asked(export, media, capsys):
    """Where something else bounds an answer, too: the result tells what held."""
    (media / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in GOOD[:3]))
    for name, more, tokens, seconds in (
        ("flags", ["--max_text_tokens=3", "--max_seconds=0.11"], 3, 0.1),
        ("config", ["--config.text_budget=2", "--config.speech_budget_frames=2"], 2, 0.05),
    ):
        output = media / name
        status, _, (caption, spoken, heard) = ask(capsys, export, output, f"--input={media}/in.jsonl", *more)
        assert status == 0
        # A byte is a token of this model.
        assert 0 < len(caption["text"][0]) <= tokens and len(heard["text"][0]) <= tokens
        waveform, rate_hz = soundfile.read(output / spoken["files"][0])
        assert 0 < len(waveform) <= seconds * rate_hz
        settings = json.loads((output / "result.json").read_text())["settings"]
        assert settings["max_text_tokens"] == settings["decoding"]["text_budget"] == tokens
        assert settings["max_seconds"] == seconds
    assert settings["decoding"]["speech_budget_frames"] == 2
    status, said, _ = ask(
        capsys, export, media / "none", *("caption", f"--image={media}/good.png"), "--max_seconds=0.01"
    )
    assert (
        status == 1
        and "--max_seconds=0.01 is less than a frame of this model's speech; give at least 0.025" in said.err
    )


def test_answers_of_an_earlier_command_are_kept_or_replaced_whole(export, media, capsys):
    (media / "many.jsonl").write_text("".join(json.dumps(request) + "\n" for request in (*GOOD[:4], {"task": "../in"})))
    (media / "one.jsonl").write_text(json.dumps(GOOD[0]) + "\n")
    output = media / "out"
    assert ask(capsys, export, output, f"--input={media}/many.jsonl")[0] == 1
    (output / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    assert {"0001_text_to_speech.wav", "0003_text_to_image.png", "0000_caption.txt"} < before.keys()
    status, said, _ = ask(capsys, export, output, f"--input={media}/one.jsonl")
    assert status == 1 and f"--output={output} holds the answers of an earlier command" in said.err
    # What cannot be answered costs nothing that is there.
    wrong = ["caption", f"--image={media}/cut.png", "--overwrite"]
    assert ask(capsys, export, output, *wrong)[0] == 1
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert ask(capsys, export, output, f"--input={media}/one.jsonl", "--overwrite")[0] == 0
    assert {file.name for file in output.iterdir()} == {"notes.txt", "result.json", "0000_caption.txt"}


def test_no_model_is_loaded_where_no_line_can_be_answered(tmp_path, capsys):
    for text, message in (("", "holds no requests"), ("{\n[]", "line 1 is not a request")):
        (tmp_path / "in.jsonl").write_text(text)
        status, said, _ = ask(capsys, tmp_path / "no model", tmp_path / "out", f"--input={tmp_path}/in.jsonl")
        assert status == 1 and message in said.err


def test_a_task_that_the_vocabulary_has_no_codes_for_loses_no_other(export, media, capsys, tmp_path):
    """A model that hears and speaks, asked for a picture."""
    bundle = TokenizerBundle(ByteText(), None, SpeechTokenizer.load(shipped_directory("speech")))
    vocab = bundle.vocab()
    bundle.save(tmp_path / "tokenizers", vocab)
    model = small_model(vocab_size=vocab.size, perceptual_dim=0)
    export_chameleon(
        TreeSource(random_params(model)),
        model,
        vocab,
        tmp_path / "model",
        provenance=Provenance(step=1, template="quickstart"),
        dtype="float32",
        tokenizers=tmp_path / "tokenizers",
    )
    (media / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in GOOD))
    status, _, answers = ask(capsys, tmp_path / "model", tmp_path / "out", f"--input={media}/in.jsonl")
    assert status == 1
    errors = [line.get("error", "") for line in answers]
    assert errors[1] == errors[2] == ""
    assert "cannot see pictures" in errors[0] and "text-to-image makes images" in errors[3]


def test_a_model_of_another_vocabulary_is_refused(export, tmp_path, capsys):
    def damaged(change):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(export, tmp_path / "model")
        change(tmp_path / "model")
        status, said, _ = ask(capsys, tmp_path / "model", tmp_path / "out", "text-to-image", "--text=x")
        assert status == 1 and said.err.count("\n") == 1
        return said.err

    def other_tokenizer(directory):
        shutil.rmtree(directory / "tokenizers" / "speech")
        bundle = TokenizerBundle(ByteText(), ImageTokenizer.load(shipped_directory("image")))
        bundle.save(directory / "tokenizers")

    def other_size(directory):
        path = directory / METADATA_FILE
        metadata = json.loads(path.read_text())
        metadata["vocab"]["size"] += 128
        path.write_text(json.dumps(metadata))

    assert "restore the ones it was trained with" in damaged(other_tokenizer)
    assert "vocabulary" in damaged(other_size)
    assert "holds no tokenizers" in damaged(lambda directory: shutil.rmtree(directory / "tokenizers"))


def test_an_interrupted_stream_keeps_what_was_answered(export, media, capsys, monkeypatch):
    (media / "in.jsonl").write_text("".join(json.dumps(GOOD[i]) + "\n" for i in (1, 2, 4)))
    argv = [f"--input={media}/in.jsonl", "--stream"]
    status, _, wanted = ask(capsys, export, media / "whole", *argv)
    assert status == 0
    whole = generate_stream.stream_tokens

    def interrupted(model, grammar, prompt, *, row_id, **settings):
        for run in whole(model, grammar, prompt, row_id=row_id, **settings):
            yield run
            if row_id == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(generate_stream, "stream_tokens", interrupted)
    status, said, answers = ask(capsys, export, media / "part", *argv)
    assert status == 130 and "interrupted" in said.err
    assert [line.get("error") for line in answers] == [None, *["interrupted before it was answered"] * 2]
    for line in (answers[0], *wanted):
        del line["latency"]
    assert answers[0] == wanted[0]

    monkeypatch.setattr(generate_stream, "stream_tokens", whole)
    status, _, answers = ask(capsys, export, media / "again", *argv)
    assert status == 0 and [line | {"latency": None} for line in answers] == [
        line | {"latency": None} for line in wanted
    ]


def test_nobody_reads_the_output(monkeypatch, capfd):
    def closed(args):
        raise BrokenPipeError

    monkeypatch.setattr("launch.generate.main", closed)
    assert cli.main(["generate", "caption", "--model=m", "--output=o"]) == 1
    said = capfd.readouterr().err
    assert "nobody reads the output" in said and "Traceback" not in said
