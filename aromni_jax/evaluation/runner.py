"""The quickstart suite: asks a model every task on held-out cases, judges the answers, and keeps samples to look at.

Everything that is generated is generated in two calls: first what is made from text, then what is made from media,
among it transcripts of the speech of the first call.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image as PilImage

from aromni_jax.evaluation.judges import PictureJudge, SpeechJudge
from aromni_jax.evaluation.tasks import (
    PICTURE_TASKS,
    SPOKEN_PROMPT_TASKS,
    TEXT_TASKS,
    Case,
    Score,
    group_of,
    judged_score,
    names_the_thing,
    says_the_same,
    share_score,
    word_error_score,
)
from aromni_jax.evaluation.wer import corpus_errors
from aromni_jax.inference.decode import OmniModel, generate
from aromni_jax.inference.grammar import Grammar
from aromni_jax.structs import Example, Image, Message, Speech, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.prompts import Templates

ROUND_TRIP = "round_trip"


@dataclasses.dataclass(frozen=True, eq=False)
class Suite:
    """What is asked of whom: the model with its tokenizers and grammar, the cases, the judges, and the limits.

    A judge may be None: what it would judge is then generated and shown, but not scored.
    """

    model: OmniModel
    bundle: TokenizerBundle
    templates: Templates
    grammar: Grammar
    cases: Sequence[Case]
    picture_judge: PictureJudge | None
    speech_judge: SpeechJudge | None
    max_new_tokens: dict[Task, int]
    batch_size: int = 64
    samples_per_group: int = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """Scores (lines of tables) and samples (JSON-ready; media as file names below the samples directory)."""

    scores: list[Score]
    samples: list[dict[str, Any]]


Progress = Callable[[str, int, int], None]


def run_suite(suite: Suite, samples_dir: pathlib.Path, *, seed: int = 0, progress: Progress | None = None) -> Results:
    """Generates, judges and scores; writes PNG and WAV samples below `samples_dir`.

    `progress` is called with (what is being made, answers done, answers in all).
    """
    samples_dir.mkdir(parents=True, exist_ok=True)
    report = progress or (lambda what, done, total: None)

    def ask(what: str, prompts: Sequence[Example]) -> list[tuple[Any, ...]]:
        answers = generate(
            suite.model,
            suite.grammar,
            prompts,
            max_new_tokens=suite.max_new_tokens,
            seed=seed,
            batch_size=suite.batch_size,
            progress=lambda done, total: report(what, done, total),
        )
        return [joint.parts_of(answer.tolist(), suite.model.vocab, suite.bundle.text) for answer in answers]

    from_text = [case for case in suite.cases if case.task in (Task.TEXT_TO_IMAGE, Task.TEXT_TO_SPEECH)]
    from_media = [case for case in suite.cases if case.task in (*TEXT_TASKS, Task.SPEECH_TO_IMAGE)]
    first = [_prompt(suite, case.task, case.question, case.key) for case in from_text]
    answers = dict(zip((p.key for p in first), ask("pictures and speech from text", first), strict=True))
    spoken = [case for case in from_text if case.task == Task.TEXT_TO_SPEECH]
    again = [
        _prompt(suite, Task.SPEECH_TO_TEXT, Message("user", (answers[case.key][0],)), f"{ROUND_TRIP}/{case.key}")
        for case in spoken
    ]
    second = [_prompt(suite, case.task, case.question, case.key) for case in from_media] + again
    answers |= dict(zip((p.key for p in second), ask("text and pictures from media", second), strict=True))

    scores: list[Score] = []
    samples: list[dict[str, Any]] = []
    for task in (*PICTURE_TASKS, Task.TEXT_TO_SPEECH, *TEXT_TASKS):
        groups: dict[str, list[Case]] = {}
        for case in suite.cases:
            if case.task == task:
                groups.setdefault(group_of(case), []).append(case)
        for group, cases in groups.items():
            parts = [answers[case.key] for case in cases]
            if task in PICTURE_TASKS:
                new = _judge_pictures(suite, task, group, cases, parts, samples_dir)
            elif task == Task.TEXT_TO_SPEECH:
                heard = [_text(answers[f"{ROUND_TRIP}/{case.key}"]) for case in cases]
                new = _judge_speech(suite, group, cases, parts, heard, samples_dir)
            else:
                new = _judge_texts(suite, task, group, cases, [_text(part) for part in parts], samples_dir)
            scores += new.scores
            samples += new.samples
    return Results(scores, samples)


def _prompt(suite: Suite, task: Task, question: Message, key: str) -> Example:
    return joint.prompt([question], task, suite.model.vocab, suite.bundle.text, suite.templates, key=key)


def _text(parts: tuple[Any, ...]) -> str:
    return " ".join(part.text for part in parts if isinstance(part, Text) and not part.is_transcript)


def _judge_pictures(
    suite: Suite, task: Task, group: str, cases: list[Case], parts: list[tuple[Any, ...]], samples_dir: pathlib.Path
) -> Results:
    image_tokenizer = suite.bundle.image
    assert image_tokenizer is not None
    codes = np.stack([next(p.codes_P for p in answer if isinstance(p, Image)) for answer in parts])
    made = image_tokenizer.decode(codes)
    labels = [str(case.facts.get("label", "")) for case in cases]
    scores, verdicts = [], [""] * len(cases)
    if suite.picture_judge:
        truths = [_true_picture(case) for case in cases]
        rebuilt = image_tokenizer.decode(np.stack([codes for _, codes in truths]))
        verdicts = [suite.picture_judge(picture) for picture in made]
        by_source = {
            "generated": verdicts,
            "ceiling": [suite.picture_judge(picture) for picture in rebuilt],
            "real": [suite.picture_judge(pixels) for pixels, _ in truths],
        }
        scores = [judged_score(labels, by_source, task.label, group, "shows what was asked")]
    samples = []
    for i, case in enumerate(cases[: suite.samples_per_group]):
        name = f"{task.label}_{_slug(group)}_{i}"
        PilImage.fromarray(made[i]).save(samples_dir / f"{name}.png")
        sample = _sample(case, group) | {"image": f"{name}.png", "label": labels[i], "verdict": verdicts[i]}
        sample["correct"] = labels[i] == verdicts[i] if verdicts[i] else None
        if task in SPOKEN_PROMPT_TASKS:
            sample["sound"] = _write_sound(case.sound(), suite, samples_dir / f"{name}.wav")
            sample["asked"] = str(case.facts.get("words", ""))
        samples.append(sample)
    return Results(scores, samples)


def _judge_speech(
    suite: Suite,
    group: str,
    cases: list[Case],
    parts: list[tuple[Any, ...]],
    heard: list[str],
    samples_dir: pathlib.Path,
) -> Results:
    speech_tokenizer = suite.bundle.speech
    assert speech_tokenizer is not None
    made = speech_tokenizer.decode([answer[0].codes_KU for answer in parts])
    task = Task.TEXT_TO_SPEECH.label
    rate = corpus_errors(zip((case.words for case in cases), heard, strict=True)).rate
    scores = [Score(task, group, "word error rate, read back by this model", rate, len(cases), better="lower")]
    verdicts = [""] * len(cases)
    if suite.speech_judge and group == "digits":
        labels = [str(case.facts["label"]) for case in cases]
        truths = [_true_sound(case) for case in cases]
        rebuilt = speech_tokenizer.decode([codes for _, codes in truths])
        verdicts = [suite.speech_judge(waveform) for waveform in made]
        by_source = {
            "generated": verdicts,
            "ceiling": [suite.speech_judge(waveform) for waveform in rebuilt],
            "real": [suite.speech_judge(waveform) for waveform, _ in truths],
        }
        scores.insert(0, judged_score(labels, by_source, task, group, "says the asked digit"))
    samples = []
    for i, case in enumerate(cases[: suite.samples_per_group]):
        name = f"{task}_{_slug(group)}_{i}"
        sound = Speech(made[i], speech_tokenizer.sample_rate_hz)
        sample = _sample(case, group) | {"sound": _write_sound(sound, suite, samples_dir / f"{name}.wav")}
        sample |= {"asked": case.words, "heard": heard[i], "label": str(case.facts.get("label", ""))}
        sample |= {"verdict": verdicts[i], "correct": sample["label"] == verdicts[i] if verdicts[i] else None}
        sample["seconds"] = len(made[i]) / speech_tokenizer.sample_rate_hz
        samples.append(sample)
    return Results(scores, samples)


def _judge_texts(
    suite: Suite, task: Task, group: str, cases: list[Case], told: list[str], samples_dir: pathlib.Path
) -> Results:
    if task == Task.SPEECH_TO_TEXT:
        scores, right = [word_error_score(cases, told, task.label, group)], says_the_same
    elif task == Task.CAPTION:
        right = names_the_thing
        scores = [share_score(cases, told, right, task.label, group, "names the thing")]
    else:
        right = says_the_same
        scores = [share_score(cases, told, right, task.label, group, "exact answer")]
    samples = []
    for i, case in enumerate(cases[: suite.samples_per_group]):
        name = f"{task.label}_{_slug(group)}_{i}"
        sample = _sample(case, group) | {"truth": case.words, "told": told[i], "correct": right(case, told[i])}
        sample["asked"] = " ".join(part.text for part in case.question.parts if isinstance(part, Text))
        if case.picture():
            PilImage.fromarray(_true_picture(case)[0]).save(samples_dir / f"{name}.png")
            sample["image"] = f"{name}.png"
        if task in SPOKEN_PROMPT_TASKS:
            sample["sound"] = _write_sound(case.sound(), suite, samples_dir / f"{name}.wav")
        samples.append(sample)
    return Results(scores, samples)


def _sample(case: Case, group: str) -> dict[str, Any]:
    return {"task": case.task.label, "group": group, "key": case.key, "asked": case.words}


def _true_picture(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and codes of the case's picture."""
    picture = case.picture()
    assert picture is not None and picture.pixels_HWC is not None and picture.codes_P is not None
    return picture.pixels_HWC, picture.codes_P


def _true_sound(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Waveform and codes of the case's utterance."""
    sound = case.sound()
    assert sound is not None and sound.waveform_T is not None and sound.codes_KU is not None
    return sound.waveform_T, sound.codes_KU


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in text)


def _write_sound(speech: Speech | None, suite: Suite, path: pathlib.Path) -> str:
    import soundfile

    assert speech is not None and speech.waveform_T is not None and suite.bundle.speech is not None
    rate_hz = speech.sample_rate_hz or suite.bundle.speech.sample_rate_hz
    soundfile.write(path, np.clip(speech.waveform_T, -1, 1), rate_hz, subtype="PCM_16")
    return path.name
