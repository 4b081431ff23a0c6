"""The report: one HTML file with everything in it (pictures, sound, charts), which opens from a mail and loads nothing.

It is made from results (a JSON-ready mapping) and a directory of samples, so it can be made again without the model.
Numbers are shown as measured, beside chance and beside what the tokenizers alone could reach.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from aromni_jax.evaluation.markup import audio, escape, image, page, percent, section, table, tag, tile
from aromni_jax.evaluation.svg import line_chart

TASK_TITLES = {
    "text_to_image": "Text to image",
    "speech_to_image": "Speech to image",
    "text_to_speech": "Text to speech",
    "speech_to_text": "Speech to text",
    "caption": "Captioning",
    "question": "Questions",
}
JUDGED = (
    "The first samples of each group, not the best. ✓ and ✗ are the verdict of a judge trained on real training "
    "pictures, with what it saw."
)
READ_BACK = (
    "“Read back” is what this same model hears in its own speech. The verdict on digits comes from a judge trained on "
    "real training utterances."
)
RIGHT_ANSWERS = "Green answers count as right: transcripts and answers word by word, captions when they name the thing."
SCORES = (
    "Nothing here was seen in training: other scans, scenes and utterances, and other voices and colour-shape pairs "
    "where it says so. Chance is what always the same answer would get, or the answers given to other questions. "
    "Ceiling is the judge's score on originals that only went through the tokenizer; real, its score on the originals "
    "themselves. Groups are small: a share of 40 cases is known to about ±15 points."
)
LOSSES = (
    "Nats per token on held-out conversations, every token counted once, prompts included. The unigram baseline knows "
    "each token's modality and how often the token occurs in training; uniform knows the modality only."
)
CURVES = "Training loss in nats per token; dashed: the unigram baseline of the same modality on held-out data."

Sample = Mapping[str, Any]


def render_report(results: Mapping[str, Any], samples_dir: pathlib.Path) -> str:
    """The page as one string.

    `results` has: title, summary, scores and samples (of `runner.Results`), losses (kind, name, loss, unigram,
    chance, tokens), curves (modality and task: name -> [step, loss] pairs), stages (name, seconds), facts (name,
    value), export_path, config. Only the title must be there; sections without content are left out.

    Raises:
      FileNotFoundError: a sample's file is missing from `samples_dir`.
    """
    scores, samples = results.get("scores", []), results.get("samples", [])
    body = [
        tag("h1", escape(results["title"])),
        tag("p", escape(results.get("summary", "")), css="lead"),
        _tiles(scores),
        section("Pictures from text", JUDGED, _pictures(samples, "text_to_image", samples_dir)),
        section(
            "Pictures from speech",
            f"Press play to hear the prompt. {JUDGED}",
            _pictures(samples, "speech_to_image", samples_dir),
        ),
        section("Speech from text", READ_BACK, _sounds(samples, samples_dir)),
        section("Text from speech and pictures", RIGHT_ANSWERS, _answers(samples, samples_dir)),
        section("Held-out numbers", SCORES, _score_table(scores)),
        section("Held-out loss", LOSSES, _loss_table(results.get("losses", []))),
        section("Learning", CURVES, _curves(results)),
        _run(results),
    ]
    return page(results["title"], *body)


def _tiles(scores: Sequence[Mapping[str, Any]]) -> str:
    """The numbers a reader looks for first: one tile per task, its first group; the table has all of them."""
    tiles, seen = [], set()
    for score in scores:
        if score["task"] in seen:
            continue
        seen.add(score["task"])
        hints = [
            f"{name} {percent(score[key])}"
            for name, key in (("chance", "chance"), ("ceiling", "ceiling"))
            if score.get(key) is not None
        ]
        tiles.append(
            tile(
                percent(score["value"]),
                f"{TASK_TITLES[score['task']]}, {score['group']}",
                f"{score['metric']}; {', '.join(hints)}" if hints else score["metric"],
            )
        )
    return tag("div", *tiles, css="tiles") if tiles else ""


def _verdict(sample: Sample) -> str:
    if sample.get("correct") is None:
        return ""
    word, kind = ("✓", "good") if sample["correct"] else ("✗", "bad")
    return tag("span", f"{word} {escape(sample.get('verdict', ''))}", css=kind)


def _by_group(samples: Sequence[Sample], task: str) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample["task"] == task:
            groups.setdefault(sample["group"], []).append(sample)
    return groups


def _media(sample: Sample, root: pathlib.Path) -> str:
    """The sample's picture and player, as far as it has them."""
    picture = image(root / sample["image"], sample["asked"]) if "image" in sample else ""
    return picture + (audio(root / sample["sound"]) if "sound" in sample else "")


def _pictures(samples: Sequence[Sample], task: str, root: pathlib.Path) -> str:
    out = []
    for group, members in _by_group(samples, task).items():
        figures = [
            tag("figure", _media(s, root), tag("figcaption", tag("q", escape(s["asked"])), "<br>", _verdict(s)))
            for s in members
        ]
        out += [tag("h3", escape(group.capitalize())), tag("div", *figures, css="pictures")]
    return "".join(out)


def _sounds(samples: Sequence[Sample], root: pathlib.Path) -> str:
    out = []
    for group, members in _by_group(samples, "text_to_speech").items():
        figures = []
        for s in members:
            heard = f"read back: {escape(s.get('heard') or '(nothing)')} · {s.get('seconds', 0):.1f} s"
            figures.append(
                tag("figure", tag("q", escape(s["asked"])), " ", _verdict(s), _media(s, root), tag("figcaption", heard))
            )
        out += [tag("h3", escape(group.capitalize())), tag("div", *figures, css="sounds")]
    return "".join(out)


def _answers(samples: Sequence[Sample], root: pathlib.Path) -> str:
    out = []
    for task, title in {"speech_to_text": "Transcripts", "caption": "Captions", "question": "Answers"}.items():
        for group, members in _by_group(samples, task).items():
            rows = []
            for s in members:
                told = tag("span", escape(s["told"] or "(nothing)"), css="good" if s["correct"] else "bad")
                rows.append(
                    [_media(s, root), escape(s["asked"] if task == "question" else ""), told, escape(s["truth"])]
                )
            headers = ["", "question" if task == "question" else "", "the model", "the truth"]
            out += [tag("h3", f"{title}: {escape(group)}"), table(headers, rows)]
    return "".join(out)


def _score_table(scores: Sequence[Mapping[str, Any]]) -> str:
    if not scores:
        return ""
    rows = []
    for s in scores:
        chance = s.get("chance")
        beaten = None if chance is None else (s["value"] < chance if s["better"] == "lower" else s["value"] > chance)
        kind = {None: "", True: " good", False: " bad"}[beaten]
        rows.append(
            [
                TASK_TITLES[s["task"]],
                escape(s["group"]),
                escape(s["metric"]),
                tag("td", percent(s["value"]), css=f"number main{kind}"),
                *(percent(s.get(name)) for name in ("chance", "ceiling", "real")),
                str(s["n"]),
            ]
        )
    return table(["task", "group", "measure", "model", "chance", "ceiling", "real", "cases"], rows, range(3, 8))


def _loss_table(losses: Sequence[Mapping[str, Any]]) -> str:
    out = []
    for kind, title in (("modality", "By modality"), ("task", "By task")):
        rows = []
        for line in (line for line in losses if line["kind"] == kind):
            unigram = line.get("unigram")
            colour = "" if unigram is None else " good" if line["loss"] < unigram else " bad"
            value = tag("td", f"{line['loss']:.3f}", css=f"number main{colour}")
            baselines = [f"{line[name]:.3f}" for name in ("unigram", "chance") if name in line]
            rows.append([escape(line["name"].replace("_", " ")), value, *baselines, f"{line['tokens']:,}"])
        if rows:
            names = ["unigram", "uniform"][: len(rows[0]) - 3]
            out += [tag("h3", title), table(["", "model", *names, "tokens"], rows, range(1, 5))]
    return "".join(out)


def _curves(results: Mapping[str, Any]) -> str:
    curves = results.get("curves", {})
    losses = [line for line in results.get("losses", []) if line.get("unigram") is not None]
    baselines = {line["name"]: line["unigram"] for line in losses if line["kind"] == "modality"}
    charts = []
    for kind, title in (("modality", "By modality"), ("task", "By task")):
        series = {name.replace("_", " "): points for name, points in curves.get(kind, {}).items()}
        chart = line_chart(series, baselines=baselines if kind == "modality" else None)
        if chart:
            charts.append(tag("div", tag("h3", title), chart))
    return tag("div", *charts, css="charts") if charts else ""


def _run(results: Mapping[str, Any]) -> str:
    out = []
    if results.get("facts"):
        out.append(table([], [[escape(name), escape(value)] for name, value in results["facts"]], [1]))
    stages = results.get("stages", [])
    if stages:
        longest = max(stage["seconds"] for stage in stages) or 1
        rows = [
            [
                escape(stage["name"]),
                f"{stage['seconds']:.0f} s",
                f'<td class="bars"><div class="bar" style="width:{100 * stage["seconds"] / longest:.1f}%"></div></td>',
            ]
            for stage in stages
        ]
        total = sum(stage["seconds"] for stage in stages)
        out += [tag("h3", "Time per stage"), table([], [*rows, ["all", f"{total:.0f} s", ""]], [1])]
    if results.get("export_path"):
        out.append(tag("h3", "The exported model") + tag("p", tag("code", escape(results["export_path"]))))
    if results.get("config"):
        text = escape(json.dumps(results["config"], indent=2, sort_keys=True))
        out.append(tag("details", tag("summary", "Configuration"), tag("pre", text)))
    return tag("h2", "The run") + "".join(out) if out else ""
