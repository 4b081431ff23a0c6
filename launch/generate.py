"""`aromni generate`: text, pictures and speech from a trained model, for one request or for a file of many."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from launch.flags import BAD_INPUT, add_config_argument, load_config
from launch.generate_output import RESULT_FILE, answered, check_folder, earlier_files, stem_of, unanswered
from launch.generate_requests import TASKS, Refused, Request, read_requests
from launch.model_flags import add_mesh_argument, add_weights_argument, parse_mesh

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aromni_jax.inference.grammar import Grammar
    from aromni_jax.inference.policy import DecodingConfig, Mode
    from aromni_jax.structs import Example, Message, Part, Task
    from aromni_jax.tokenizers.speech import SpeechTokenizer
    from aromni_jax.vocab import JointVocab
    from launch.generate_dialogue import DialogueSizes, Turn
    from launch.loading import LoadedModel

    Answer = tuple[int, tuple[Part, ...], dict[str, Any]]
    """The place of a request, the parts of its answer, and what else `result.json` says of it (its latency, say)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `aromni generate`."""
    parser.add_argument("task", nargs="?", metavar="TASK", help=f"one of {', '.join(TASKS)}; not needed with --input")
    parser.add_argument("--model", required=True, metavar="DIR", help="export directory, or workdir of a run")
    parser.add_argument("--text", metavar="TEXT", help="what is said to the model")
    parser.add_argument("--image", metavar="FILE", help="a picture for it to see")
    parser.add_argument("--speech", metavar="FILE", help="a sound file for it to hear")
    parser.add_argument(
        "--input",
        metavar="FILE.jsonl",
        help='many requests: {"task", "text", "image", "speech"} a line; chats that share a "conversation" are the '
        "turns of one dialogue, in the order of the file",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where PNG, WAV, text and result.json go")
    parser.add_argument(
        "--overwrite", action="store_true", help="remove the answers of an earlier command from --output first"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is sampled (default: 0)")
    parser.add_argument(
        "--max_text_tokens",
        type=int,
        default=256,
        metavar="N",
        help="longest text of an answer, and longest transcript; the config's text_budget where that is less "
        "(default: 256)",
    )
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="longest speech of an answer; the config's speech_budget_frames where those are less (default: 10)",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="of pictures and chat (default: the config's)")
    parser.add_argument("--top_p", type=float, metavar="P", help="of pictures and chat (default: the config's)")
    parser.add_argument("--guidance", type=float, metavar="S", help="of pictures, 1 for none (default: the config's)")
    parser.add_argument(
        "--image_guidance",
        type=float,
        metavar="S",
        help="by the pictures of a prompt, beside --guidance by its words (default: the config's, or --guidance)",
    )
    parser.add_argument(
        "--budget",
        type=int,
        metavar="N",
        help="tokens that a dialogue of --input remembers (default: the model's positions)",
    )
    add_config_argument(parser, "configs/decode.py")
    parser.add_argument(
        "--describe",
        action="store_true",
        help="answer nothing: print the decoding machine of TASK (of every task without one) and what is chosen how in "
        "each of its states; the same in machine.txt and, drawn, in machine.svg",
    )
    parser.add_argument(
        "--stream", action="store_true", help="print text and write sound as they are made, one request after the other"
    )
    parser.add_argument("--template", default="", metavar="NAME", help="prompt templates, where the model names none")
    add_mesh_argument(parser)
    add_weights_argument(parser)


def main(args: argparse.Namespace) -> int:
    """Answers every request and writes the answers; one that cannot be answered loses no other.

    Raises:
      ValueError: a bad command line or model, or not one request that can be answered, before anything is written; or
        requests without an answer, after all others have theirs.
    """
    check_numbers(args)
    check_folder(args.output)
    decoding = read_decoding(args)
    if args.describe:
        from launch.generate_describe import describe_machine

        return describe_machine(args, limit_segments(decoding, args, None))
    requests = read_requests(args)
    replaced = earlier_files(args.output, overwrite=args.overwrite)
    from launch.loading import load_model

    clock = time.perf_counter()
    loaded = load_model(args.model, template=args.template, mesh=parse_mesh(args.mesh), weights=args.weights)
    seconds = {"load": time.perf_counter() - clock, "generate": 0.0}
    decoding = limit_segments(decoding, args, loaded.bundle.speech)
    asked = ask(loaded, requests, args, decoding)
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    for file in replaced:
        file.unlink(missing_ok=True)
    lines = [unanswered(r, asked.errors.get(i, "interrupted before it was answered")) for i, r in enumerate(requests)]
    try:
        clock = time.perf_counter()
        for index, parts, told in _answers(loaded, asked, args, [stem_of(i, r) for i, r in enumerate(requests)]):
            seconds["generate"] += time.perf_counter() - clock
            is_written = args.stream or index in asked.turns
            lines[index] = answered(parts, requests[index], output, index, loaded, sound_is_written=is_written) | told
            clock = time.perf_counter()
    finally:
        # What was answered is told also when the rest is not wanted any more.
        settings = {
            name: getattr(args, name)
            for name in (
                *("model", "mesh", "weights", "seed"),
                *("temperature", "top_p", "guidance", "image_guidance", "budget"),
            )
        }
        # As they held, where flag and config differ.
        settings["max_text_tokens"] = decoding.text_budget
        codec = loaded.bundle.speech
        settings["max_seconds"] = decoding.speech_budget_frames / codec.codes_per_second if codec else None
        settings["decoding"] = dataclasses.asdict(decoding)
        result = {"settings": settings, "step": loaded.step, "seconds": seconds, "answers": lines}
        (output / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in lines:
        if "error" not in line:
            print(f"{line['task']}: {'; '.join(line['text'] + line['files'])}")
    errors = [line["error"] for line in lines if "error" in line]
    if errors:
        raise ValueError(
            f"{len(errors)} of {len(lines)} requests were not answered; {output / RESULT_FILE} says why of each, the "
            f"first: {errors[0]}"
        )
    return 0


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """Requests ready for the model: the automaton of their tasks, their prompts, and most tokens of each task.

    `prompts`, `turns` and `errors` are keyed by a request's place among all of them: it is in one of them. Turns of
    dialogues wait for what is said before them; `sizes` are those of dialogues, where there are any.
    """

    grammar: Grammar
    prompts: dict[int, Example]
    turns: dict[int, Turn]
    limits: dict[Task, int]
    sizes: DialogueSizes | None
    errors: dict[int, str]


def check_numbers(args: argparse.Namespace) -> None:
    """ValueError with the first flag that holds an impossible number, whatever the model and the config."""
    allowed = {
        "seed": (-(2**63) <= args.seed < 2**63, "a whole number of 64 bits"),
        "max_text_tokens": (args.max_text_tokens >= 1, "a whole number of at least 1"),
        "max_seconds": (0 < args.max_seconds < math.inf, "a finite number above 0"),
    }
    for name, (is_allowed, words) in allowed.items():
        if not is_allowed:
            raise ValueError(f"--{name}={getattr(args, name)} is not allowed; give {words}")


def read_decoding(args: argparse.Namespace) -> DecodingConfig:
    """How tokens are chosen: the config, then the flags that bear on pictures and open-ended text.

    Raises:
      ValueError: a flag or a key of the config that is no way to choose tokens, by its name.
    """
    from aromni_jax.config import from_mapping
    from aromni_jax.inference.policy import DecodingConfig

    def adjusted(mode: Mode, *names: str) -> Mode:
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        try:
            return dataclasses.replace(mode, **given)
        except ValueError as error:
            raise ValueError(f"--{error}") from error

    config = from_mapping(DecodingConfig, load_config(args))
    image = config.image
    if args.guidance is not None:
        # One number is for all that is asked: the config's other one belongs to the config's first.
        image = dataclasses.replace(image, image_guidance=None)
    return dataclasses.replace(
        config,
        image=adjusted(image, "temperature", "top_p", "guidance", "image_guidance"),
        text=adjusted(config.text, "temperature", "top_p"),
    )


def limit_segments(decoding: DecodingConfig, args: argparse.Namespace, codec: SpeechTokenizer | None) -> DecodingConfig:
    """The config with no more text than `--max_text_tokens` and no more speech than `--max_seconds`, told in frames
    only where the codec that makes them is known.

    Raises:
      ValueError: a frame of the codec is longer than `--max_seconds`.
    """
    frames = decoding.speech_budget_frames
    if codec is not None:
        # A whole number of frames may come out of floats as a little less.
        longest = math.floor(args.max_seconds * codec.codes_per_second + 1e-6)
        if not longest:
            raise ValueError(
                f"--max_seconds={args.max_seconds} is less than a frame of this model's speech; give at least "
                f"{1 / codec.codes_per_second:g}"
            )
        frames = min(frames, longest)
    return dataclasses.replace(
        decoding, text_budget=min(decoding.text_budget, args.max_text_tokens), speech_budget_frames=frames
    )


def ask(
    loaded: LoadedModel, requests: list[Request | Refused], args: argparse.Namespace, decoding: DecodingConfig
) -> Asked:
    """Encodes the requests, media included, under the settings of the command line; what cannot be asked is noted.

    Raises:
      ValueError: none of them can be asked.
    """
    from aromni_jax.inference.decode import check_request
    from aromni_jax.inference.grammar import check_codes, compile_grammar
    from aromni_jax.inference.policy import policy_for
    from aromni_jax.structs import Task
    from aromni_jax.tokenizers import joint
    from launch.generate_dialogue import Turn, dialogue_sizes

    vocab, bundle = loaded.model.vocab, loaded.bundle
    prompts: dict[int, Example] = {}
    turns: dict[int, Turn] = {}
    errors: dict[int, str] = {}
    for index, request in enumerate(requests):
        try:
            if isinstance(request, Refused):
                raise ValueError(request.error)
            task = Task.from_name(request.task)
            check_codes(vocab, request.task, policy_for(task, decoding))
            question = _question(request, loaded)
            if request.conversation is not None:
                turns[index] = Turn(request.conversation, question.parts, stem_of(index, request))
                continue
            key = request.task if len(requests) == 1 else f"{index} ({request.task})"
            prompts[index] = joint.prompt([question], task, vocab, bundle.text, loaded.templates, key=key)
        except BAD_INPUT as error:
            errors[index] = str(error)
    _check_any(prompts | turns, errors)
    tasks = sorted({prompt.task for prompt in prompts.values()} | ({Task.CHAT} if turns else set()))
    grammar = compile_grammar(vocab, {task: policy_for(task, decoding) for task in tasks})
    limits = {task: _limit(task, decoding, vocab) for task in tasks}
    sizes = dialogue_sizes(loaded, limits[Task.CHAT], args.budget) if turns else None
    for index, prompt in list(prompts.items()):
        try:
            check_request(loaded.model, grammar, prompt, limits[prompt.task])
        except ValueError as error:
            errors[index] = str(error)
            del prompts[index]
    _check_any(prompts | turns, errors)
    return Asked(grammar, prompts, turns, limits, sizes, errors)


def _check_any(askable: dict[int, Any], errors: dict[int, str]) -> None:
    """ValueError with what is wrong with the first request where none is left."""
    if not askable:
        first = errors[min(errors)]
        raise ValueError(
            first if len(errors) == 1 else f"none of {len(errors)} requests can be answered; the first: {first}"
        )


def _answers(loaded: LoadedModel, asked: Asked, args: argparse.Namespace, stems: list[str]) -> Iterator[Answer]:
    """What the model answers, media as codes: one request after the other as a stream, or all together; then turns."""
    output = pathlib.Path(args.output)
    if args.stream:
        from launch.generate_stream import stream_answers

        yield from stream_answers(loaded, asked, stems, output, args.seed)
    elif asked.prompts:
        yield from answer(loaded, asked, args.seed)
    if asked.turns:
        from launch.generate_dialogue import answer_dialogues

        yield from answer_dialogues(loaded, asked, output, seed=args.seed, is_shown=args.stream)


def answer(loaded: LoadedModel, asked: Asked, seed: int) -> Iterator[Answer]:
    """What the model answers to each request, media as codes; all together, in batches."""
    from aromni_jax.inference.decode import generate
    from aromni_jax.tokenizers import joint

    show = len(asked.prompts) > 1 and sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if show:
            print(f"\r{done} of {total} answers", end="" if done < total else "\n", file=sys.stderr, flush=True)

    made = generate(
        loaded.model,
        asked.grammar,
        list(asked.prompts.values()),
        max_new_tokens=asked.limits,
        seed=seed,
        # A row's randomness is its place in the file, whatever becomes of its neighbours.
        row_ids=list(asked.prompts),
        progress=progress,
    )
    for index, ids in zip(asked.prompts, made, strict=True):
        yield index, joint.parts_of(ids.tolist(), loaded.model.vocab, loaded.bundle.text), {}


def _limit(task: Task, decoding: DecodingConfig, vocab: JointVocab) -> int:
    """Most tokens of an answer: what its parts may take, and their delimiters."""
    from aromni_jax.inference.policy import MEDIA_DELIMITERS
    from aromni_jax.structs import Task

    text_tokens, image_tokens = decoding.text_budget, vocab.tokens_per_image
    speech_tokens = decoding.speech_budget_frames * len(vocab.speech)
    if task == Task.TEXT_TO_SPEECH:
        return speech_tokens + MEDIA_DELIMITERS
    parts = {
        Task.TEXT_TO_IMAGE: image_tokens,
        Task.SPEECH_TO_IMAGE: image_tokens + text_tokens,
        Task.CHAT: 2 * text_tokens + speech_tokens + image_tokens,
    }
    return parts.get(task, text_tokens) + 8


def _question(request: Request, loaded: LoadedModel) -> Message:
    """The user's turn with its media tokenized."""
    from aromni_jax.structs import Image, Message, Speech, Text

    parts: list[Part] = []
    if request.image is not None:
        if loaded.bundle.image is None:
            raise ValueError("this model has no image tokenizer: it cannot see pictures")
        parts.append(Image(codes_P=loaded.bundle.image.encode(loaded.bundle.image.prepare(request.image)[None])[0]))
    if request.speech is not None:
        if loaded.bundle.speech is None:
            raise ValueError("this model has no speech tokenizer: it cannot hear")
        waveform = loaded.bundle.speech.prepare(request.speech, report=print)
        parts.append(Speech(codes_KU=loaded.bundle.speech.encode([waveform])[0]))
    if request.text is not None:
        parts.append(Text(request.text))
    return Message("user", tuple(parts))


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
