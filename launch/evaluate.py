"""`aromni evaluate`: held-out numbers of a trained model, as JSON and as a page with pictures and sound."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from launch.model_flags import add_mesh_argument, add_weights_argument, parse_mesh

if TYPE_CHECKING:
    import numpy as np

    from aromni_jax.evaluation.tasks import Case
    from aromni_jax.structs import Example
    from launch.loading import LoadedModel

SUITES = ("quickstart", "weights")
RESULTS_FILE, REPORT_FILE, SAMPLES = "results.json", "report.html", "samples"
Progress = Callable[[str, float], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `aromni evaluate`."""
    parser.add_argument("--model", required=True, metavar="DIR", help="export directory, or workdir of a run")
    parser.add_argument(
        "--suite",
        default="quickstart",
        choices=SUITES,
        help="quickstart (default): tasks, losses and samples; weights: losses and greedy tokens in float32, bfloat16 "
        "and int8",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="corpus with a manifest.jsonl (default: corpus/ beside the model)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where results.json and report.html go")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is sampled (default: 0)")
    parser.add_argument("--template", default="", metavar="NAME", help="prompt templates, where the model names none")
    add_mesh_argument(parser)
    add_weights_argument(parser)


def main(args: argparse.Namespace) -> int:
    """Evaluates, writes the page, and prints the scores."""
    from aromni_jax.evaluation.report import render_report
    from launch.evaluate_weights import compare_weights
    from launch.loading import load_model

    corpus = pathlib.Path(args.data) if args.data else pathlib.Path(args.model).absolute().parent / "corpus"
    if not (corpus / "manifest.jsonl").is_file():
        raise ValueError(f"no manifest.jsonl in {corpus}; name the corpus with --data=DIR")
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if args.suite == "weights":
        return compare_weights(args, corpus, output)
    loaded = load_model(args.model, template=args.template, mesh=parse_mesh(args.mesh), weights=args.weights)

    def show(what: str, fraction: float) -> None:
        print(f"{fraction:4.0%} {what}", file=sys.stderr, flush=True)

    results = evaluate_model(loaded, corpus, output / SAMPLES, EvaluationSizes(), seed=args.seed, progress=show)
    results |= {
        "title": "AR-Omni: evaluation",
        "summary": f"{args.model}, step {loaded.step}, held-out data of {corpus}.",
    }
    (output / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / REPORT_FILE).write_text(render_report(results, output / SAMPLES), encoding="utf-8")
    for score in results["scores"]:
        print(
            f"{score['task']:<16} {score['group']:<24} {score['metric']:<42} {score['value']:.3f}  ({score['n']} cases)"
        )
    print(output / REPORT_FILE)
    return 0


@dataclasses.dataclass(frozen=True)
class EvaluationSizes:
    """How many held-out cases of each task and group are asked, and how many conversations the loss is taken over.

    `judge_examples` bounds how many training pictures, and how many utterances, the judges learn from. Pictures are
    sampled at `image_temperature` and `image_guidance`; small models need less than the released 1.0 and 3.07.
    """

    cases_per_group: dict[str, int] = dataclasses.field(
        default_factory=lambda: {
            "text_to_image": 40,
            "speech_to_image": 30,
            "text_to_speech": 20,
            "speech_to_text": 40,
            "caption": 30,
            "question": 30,
        }
    )
    loss_cases_per_group: int = 40
    judge_examples: int = 1500
    batch_size: int = 64
    speech_seconds: float = 3.0
    text_tokens: int = 40
    image_temperature: float = 1.0
    image_guidance: float = 3.07


def evaluate_model(
    loaded: LoadedModel,
    corpus: pathlib.Path,
    samples_dir: pathlib.Path,
    sizes: EvaluationSizes,
    *,
    seed: int = 0,
    unigram_V: np.ndarray | None = None,
    progress: Progress = lambda what, fraction: None,
) -> dict[str, Any]:
    """Scores, samples and losses of a model on the held-out part of a corpus; JSON-ready.

    `unigram_V` counts how often each vocabulary row is a target in training; without it there is no unigram baseline.
    `progress` is called with what is being done and the fraction of the whole that is done.
    """
    from aromni_jax.evaluation.runner import Suite, run_suite
    from aromni_jax.evaluation.tasks import PICTURE_TASKS, choose
    from aromni_jax.inference.grammar import compile_grammar
    from aromni_jax.inference.policy import MEDIA_DELIMITERS, DecodingConfig, policy_for
    from aromni_jax.structs import Task

    progress("reading held-out conversations", 0.0)
    bundle, vocab = loaded.bundle, loaded.model.vocab
    # The order of fractions below is how long each part takes with the quickstart model.
    possible = [task for task in Task if can_do(task, loaded)]
    outlines = [case for case in outlines_of(corpus, "heldout") if case.task in possible]
    asked = choose(outlines, {Task.from_name(name): n for name, n in sizes.cases_per_group.items()})
    counted = choose(outlines, dict.fromkeys(Task, sizes.loss_cases_per_group))
    cases = with_media({case.key: case for case in [*asked, *counted]}, loaded)
    progress("training the judges on real data", 0.15)
    picture_judge, speech_judge = _judges(corpus, loaded, sizes.judge_examples)
    progress("held-out loss", 0.25)
    examples = encoded([cases[case.key] for case in counted], loaded)
    losses = held_out_losses(loaded, examples, unigram_V)
    limits = dict.fromkeys(Task, sizes.text_tokens)
    limits |= dict.fromkeys(PICTURE_TASKS, vocab.tokens_per_image + MEDIA_DELIMITERS)
    if bundle.speech:
        per_second = bundle.speech.codes_per_second * len(vocab.speech)
        limits[Task.TEXT_TO_SPEECH] = round(sizes.speech_seconds * per_second) + MEDIA_DELIMITERS
    decoding = DecodingConfig()
    pictures = dataclasses.replace(decoding.image, temperature=sizes.image_temperature, guidance=sizes.image_guidance)
    decoding = dataclasses.replace(decoding, image=pictures)
    suite = Suite(
        model=loaded.model,
        bundle=bundle,
        templates=loaded.templates,
        grammar=compile_grammar(vocab, {task: policy_for(task, decoding) for task in possible}),
        cases=[cases[case.key] for case in asked],
        picture_judge=picture_judge,
        speech_judge=speech_judge,
        max_new_tokens=limits,
        batch_size=sizes.batch_size,
    )
    halves = {"pictures and speech from text": 0.35, "text and pictures from media": 0.65}
    result = run_suite(
        suite,
        samples_dir,
        seed=seed,
        progress=lambda what, done, total: progress(what, halves[what] + 0.3 * done / total),
    )
    scores = [dataclasses.asdict(score) for score in result.scores]
    return {"scores": scores, "samples": result.samples, "losses": losses, "step": loaded.step}


def can_do(task: Any, loaded: LoadedModel) -> bool:
    """Whether templates and tokenizers of the model serve `task`."""
    needs_image = "image" in task.label or task.label == "caption"
    needs_speech = "speech" in task.label
    return (
        task in loaded.templates.tasks
        and task.label != "chat"
        and (not needs_image or loaded.bundle.image is not None)
        and (not needs_speech or loaded.bundle.speech is not None)
    )


def outlines_of(corpus: pathlib.Path, split: str) -> list[Case]:
    """Conversations of one question and one answer, their media still files."""
    from aromni_jax.evaluation.tasks import Case
    from data_pipelines.sources import ManifestSource, RawMessage

    source = ManifestSource(corpus / "manifest.jsonl", split=split)
    cases = []
    for conversation in (source[index] for index in range(len(source))):
        *questions, answer = conversation.messages
        if len(questions) <= 1 and answer.role == "assistant":
            # `with_media` turns the raw turns of those that are chosen into messages.
            question: Any = questions[0] if questions else RawMessage("user", ())
            raw_answer: Any = answer
            cases.append(Case(conversation.key, conversation.task, question, raw_answer, conversation.facts))
    return cases


def with_media(outlines: dict[str, Case], loaded: LoadedModel) -> dict[str, Case]:
    """The same cases with their pictures and utterances read, prepared and tokenized; each file once."""
    import numpy as np

    from aromni_jax.structs import Image, Message, Speech, Text

    turns: list[Any] = [turn for case in outlines.values() for turn in (case.question, case.answer)]
    files: dict[str, list[pathlib.Path]] = {"image": [], "speech": []}
    for part in (part for turn in turns for part in turn.parts):
        if not isinstance(part, Text):
            files[part.kind].append(part.path)
    media: dict[pathlib.Path, Any] = {}
    if paths := sorted(set(files["image"])):
        tokenizer = loaded.bundle.image
        assert tokenizer is not None
        pixels = np.stack([tokenizer.prepare(path) for path in paths])
        media |= {p: Image(x, c) for p, x, c in zip(paths, pixels, tokenizer.encode(pixels), strict=True)}
    if paths := sorted(set(files["speech"])):
        speech = loaded.bundle.speech
        assert speech is not None
        waveforms = [speech.prepare(path) for path in paths]
        codes = speech.encode(waveforms)
        rate = speech.sample_rate_hz
        media |= {p: Speech(w, rate, c) for p, w, c in zip(paths, waveforms, codes, strict=True)}

    def filled(turn: Any) -> Message:
        return Message(turn.role, tuple(part if isinstance(part, Text) else media[part.path] for part in turn.parts))

    return {
        key: dataclasses.replace(case, question=filled(case.question), answer=filled(case.answer))
        for key, case in outlines.items()
    }


def encoded(cases: Sequence[Case], loaded: LoadedModel) -> list[Example]:
    """The conversations as the model's training would have seen them."""
    from aromni_jax.tokenizers import joint

    return [
        joint.encode(
            [*([case.question] if case.question.parts else []), case.answer],
            case.task,
            loaded.model.vocab,
            loaded.bundle.text,
            loaded.templates,
            key=case.key,
        )
        for case in cases
    ]


def _judges(corpus: pathlib.Path, loaded: LoadedModel, limit: int) -> tuple[Any, Any]:
    """A judge of pictures and one of spoken digits, each None where the training data has too little for it."""
    from aromni_jax.evaluation.judges import PictureJudge, SpeechJudge
    from aromni_jax.structs import Text

    pictures: dict[pathlib.Path, str] = {}
    digits: dict[pathlib.Path, str] = {}
    for case in outlines_of(corpus, "train"):
        parts: list[Any] = [part for turn in (case.question, case.answer) for part in turn.parts]
        for part in parts:
            if isinstance(part, Text) or "label" not in case.facts:
                continue
            if part.kind == "image":
                pictures[part.path] = case.facts["label"]
            elif case.facts.get("kind") == "digit":
                digits[part.path] = case.facts["label"]
    picture_judge = speech_judge = None
    chosen = _evenly(sorted(pictures), limit)
    image, speech = loaded.bundle.image, loaded.bundle.speech
    try:
        if chosen and image:
            picture_judge = PictureJudge([image.prepare(path) for path in chosen], [pictures[path] for path in chosen])
    except ValueError as error:
        print(f"pictures are shown but not judged: {error}", file=sys.stderr)
    chosen = _evenly(sorted(digits), limit)
    try:
        if chosen and speech:
            sounds = [speech.prepare(path) for path in chosen]
            speech_judge = SpeechJudge(sounds, [digits[path] for path in chosen], speech.sample_rate_hz)
    except ValueError as error:
        print(f"speech is played but not judged: {error}", file=sys.stderr)
    return picture_judge, speech_judge


def _evenly(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of the items, evenly spread."""
    if len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def held_out_losses(
    loaded: LoadedModel, examples: Sequence[Example], unigram_V: np.ndarray | None
) -> list[dict[str, Any]]:
    """Mean cross-entropy in nats per modality and per task, with the unigram and the uniform baseline per modality."""
    import jax
    import numpy as np

    from aromni_jax.losses import next_token_loss
    from aromni_jax.models.unstacked import forward, whole_head
    from aromni_jax.structs import Modality, Task
    from data_pipelines.pipeline import evaluation_batches

    model, vocab = loaded.model, loaded.model.vocab
    longest = max(len(example.tokens_L) for example in examples)
    length = max(512, -(-longest // 128) * 128)

    @jax.jit
    def sums_of(params: Any, batch: Any) -> tuple[Any, Any]:
        hidden, _ = forward(model.config, params, batch.inputs_BL, batch.positions_BL, batch.segment_ids_BL)
        sums = next_token_loss(
            hidden, whole_head(params), batch, valid_mask_V=vocab.valid_mask_V, chunk_tokens=1024, z_loss_weight=0.0
        ).task_modality
        return sums.sum, sums.weight

    totals = np.zeros((2, len(Task), len(Modality)))
    for batch in evaluation_batches(examples, vocab, sequence_length=length, batch_size=8):
        totals += np.stack([np.asarray(part) for part in sums_of(model.params, batch)])
    targets = np.concatenate([example.tokens_L[1:] for example in examples])
    lines = []
    for modality in Modality:
        loss, count = totals[:, :, modality].sum(1)
        if count:
            rows = (vocab.modality_V == modality) & vocab.valid_mask_V
            lines.append(_loss_line("modality", modality.label, loss, count) | {"chance": math.log(rows.sum())})
            if unigram_V is not None:
                # Add-one smoothing: every row of the modality is possible.
                probability_V = np.where(rows, unigram_V + 1.0, 0)
                probability_V = probability_V / probability_V.sum()
                lines[-1]["unigram"] = float(-np.log(probability_V[targets[rows[targets]]]).mean())
    for task in Task:
        loss, count = totals[:, task].sum(1)
        if count:
            lines.append(_loss_line("task", task.label, loss, count))
    return lines


def _loss_line(kind: str, name: str, loss: float, count: float) -> dict[str, Any]:
    return {"kind": kind, "name": name, "loss": float(loss / count), "tokens": int(count)}


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
