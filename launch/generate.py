"""`aromni generate`: text, pictures and speech from a trained model, for one request or for a file of many."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from launch.flags import add_config_argument, load_config

if TYPE_CHECKING:
    from aromni_jax.inference.grammar import Grammar
    from aromni_jax.inference.policy import DecodingConfig, Mode
    from aromni_jax.structs import Example, Message, Part, Task
    from launch.loading import LoadedModel

TASKS = ("text-to-image", "text-to-speech", "speech-to-text", "caption", "speech-to-image", "question", "chat")
_NEEDS = {
    "text-to-image": ("text",),
    "text-to-speech": ("text",),
    "speech-to-text": ("speech",),
    "caption": ("image",),
    "speech-to-image": ("speech",),
    "question": ("text",),
    "chat": (),
}
_MAY_HAVE = {"question": ("text", "image"), "chat": ("text", "image", "speech")}


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
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is sampled (default: 0)")
    parser.add_argument("--max_text_tokens", type=int, default=256, metavar="N", help="longest text (default: 256)")
    parser.add_argument("--max_seconds", type=float, default=10.0, metavar="S", help="longest speech (default: 10)")
    parser.add_argument("--temperature", type=float, metavar="T", help="of pictures and chat (default: the config's)")
    parser.add_argument("--top_p", type=float, metavar="P", help="of pictures and chat (default: the config's)")
    parser.add_argument("--guidance", type=float, metavar="S", help="of pictures, 1 for none (default: the config's)")
    parser.add_argument(
        "--budget", type=int, metavar="N", help="tokens that a dialogue remembers (default: the model's positions)"
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


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing asked: a task and what goes with it, media as paths; of a chat also the dialogue it is a turn of."""

    task: str
    text: str | None = None
    image: str | None = None
    speech: str | None = None
    conversation: str | None = None

    def check(self, where: str) -> None:
        """ValueError naming `where` when the task is unknown or its inputs are not the ones it takes."""
        import difflib

        if self.task not in TASKS:
            near = difflib.get_close_matches(self.task, TASKS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"tasks: {', '.join(TASKS)}"
            raise ValueError(f"{where}: unknown task {self.task!r}; {hint}")
        given = [kind for kind in ("text", "image", "speech") if getattr(self, kind) is not None]
        needed, allowed = _NEEDS[self.task], _MAY_HAVE.get(self.task, _NEEDS[self.task])
        missing = [f"--{kind}" for kind in needed if kind not in given]
        extra = [f"--{kind}" for kind in given if kind not in allowed]
        if missing or not given:
            raise ValueError(
                f"{where}: {self.task} needs {', '.join(missing) or 'something to answer to, such as --text'}"
            )
        if extra:
            raise ValueError(f"{where}: {self.task} does not take {', '.join(extra)}")
        if self.conversation is not None and self.task != "chat":
            raise ValueError(f"{where}: only a chat is a turn of a conversation, not {self.task}")


def read_requests(args: argparse.Namespace) -> list[Request]:
    """The requests of the command line, or of the lines of `--input`.

    Raises:
      ValueError: both or neither are given, or a line is not a request.
    """
    if not args.input:
        if not args.task:
            raise ValueError(f"give a task ({', '.join(TASKS)}) or --input=FILE.jsonl")
        requests = [Request(args.task, args.text, args.image, args.speech)]
        requests[0].check("command line")
        return requests
    if args.text or args.image or args.speech:
        raise ValueError("give --text, --image and --speech in the lines of --input, not beside it")
    path = pathlib.Path(args.input)
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            fields = {"task": args.task, **json.loads(line)}
            request = Request(**fields)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{where} is not a request with task, text, image, speech or conversation: {error}"
            ) from error
        # Media are named relative to the file that names them.
        media = {k: str(path.parent / v) for k in ("image", "speech") if (v := getattr(request, k)) is not None}
        request = dataclasses.replace(request, **media)
        request.check(where)
        requests.append(request)
    if not requests:
        raise ValueError(f"{path} holds no requests")
    return requests


def main(args: argparse.Namespace) -> int:
    """Answers every request and writes the answers."""
    if args.describe:
        from launch.generate_describe import describe_machine

        return describe_machine(args, read_decoding(args))
    requests = read_requests(args)
    from launch.loading import load_model

    started = time.perf_counter()
    loaded = load_model(args.model, template=args.template)
    loaded_at = time.perf_counter()
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    decoding = read_decoding(args)
    single = [i for i, request in enumerate(requests) if request.conversation is None]
    turns = [i for i, request in enumerate(requests) if request.conversation is not None]
    answered: dict[int, tuple[tuple[Part, ...], dict[str, Any]]] = {}
    if single:
        asked = ask(loaded, [requests[i] for i in single], args, decoding)
        if args.stream:
            from launch.generate_stream import stream_answers

            stems = [_stem(i, requests[i]) for i in single]
            streamed = zip(*stream_answers(loaded, asked, stems, output, args.seed), strict=True)
            answered |= zip(single, ((parts, {"latency": latency}) for parts, latency in streamed), strict=True)
        else:
            answers = answer(loaded, asked, args.seed)
            answered |= zip(single, ((parts, {}) for parts in answers), strict=True)
    if turns:
        answered |= _answer_dialogues(loaded, requests, turns, args, decoding, output)
    seconds = {"load": loaded_at - started, "generate": time.perf_counter() - loaded_at}
    lines = []
    for i, request in enumerate(requests):
        parts, told = answered[i]
        is_heard = args.stream or request.conversation is not None
        lines.append(_write(parts, request, output, i, loaded, sound_is_written=is_heard) | told)
    settings = {
        name: getattr(args, name)
        for name in ("model", "seed", "max_text_tokens", "max_seconds", "temperature", "top_p", "guidance", "budget")
    }
    settings["decoding"] = dataclasses.asdict(decoding)
    result = {"settings": settings, "step": loaded.step, "seconds": seconds, "answers": lines}
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in lines:
        print(f"{line['task']}: {'; '.join(line['text'] + line['files'])}")
    return 0


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """Requests ready for the model: the automaton of their tasks, their prompts, and most tokens of each task."""

    grammar: Grammar
    prompts: list[Example]
    limits: dict[Task, int]


def read_decoding(args: argparse.Namespace) -> DecodingConfig:
    """How tokens are chosen: the config, then the flags that bear on pictures and open-ended text."""
    from aromni_jax.config import from_mapping
    from aromni_jax.inference.policy import DecodingConfig

    def adjusted(mode: Mode, *names: str) -> Mode:
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        return dataclasses.replace(mode, **given)

    config = from_mapping(DecodingConfig, load_config(args))
    return dataclasses.replace(
        config,
        image=adjusted(config.image, "temperature", "top_p", "guidance"),
        text=adjusted(config.text, "temperature", "top_p"),
    )


def ask(loaded: LoadedModel, requests: list[Request], args: argparse.Namespace, decoding: DecodingConfig) -> Asked:
    """Encodes the requests, media included, under the settings of the command line."""
    from aromni_jax.inference.grammar import compile_grammar
    from aromni_jax.inference.policy import policy_for
    from aromni_jax.structs import Task
    from aromni_jax.tokenizers import joint

    vocab, bundle = loaded.model.vocab, loaded.bundle

    tasks = {request.task: Task.from_name(request.task) for request in requests}
    policies = {task: policy_for(task, decoding) for task in tasks.values()}
    limits = {task: _limit(task, args, loaded) for task in policies}
    prompts = [
        joint.prompt(
            [_question(request, loaded)], tasks[request.task], vocab, bundle.text, loaded.templates, key=str(i)
        )
        for i, request in enumerate(requests)
    ]
    return Asked(compile_grammar(vocab, policies), prompts, limits)


def answer(loaded: LoadedModel, asked: Asked, seed: int) -> list[tuple[Part, ...]]:
    """What the model answers to each request, media as codes; all together, in batches."""
    from aromni_jax.inference.decode import generate
    from aromni_jax.tokenizers import joint

    show = len(asked.prompts) > 1 and sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if show:
            print(f"\r{done} of {total} answers", end="" if done < total else "\n", file=sys.stderr, flush=True)

    made = generate(
        loaded.model, asked.grammar, asked.prompts, max_new_tokens=asked.limits, seed=seed, progress=progress
    )
    return [joint.parts_of(ids.tolist(), loaded.model.vocab, loaded.bundle.text) for ids in made]


def _stem(index: int, request: Request) -> str:
    """What the files of an answer are called, without their ending."""
    return f"{index:04d}_{request.task.replace('-', '_')}"


def _answer_dialogues(
    loaded: LoadedModel,
    requests: list[Request],
    turns: list[int],
    args: argparse.Namespace,
    decoding: DecodingConfig,
    output: pathlib.Path,
) -> dict[int, tuple[tuple[Part, ...], dict[str, Any]]]:
    """The answers to the requests number `turns`, each with what `result.json` says of it."""
    from aromni_jax.structs import Task
    from launch.generate_dialogue import Turn, answer_dialogues

    asked = [
        Turn(str(requests[i].conversation), _question(requests[i], loaded).parts, _stem(i, requests[i])) for i in turns
    ]
    answers = answer_dialogues(
        loaded,
        asked,
        decoding,
        output,
        budget=args.budget,
        answer_tokens=_limit(Task.CHAT, args, loaded),
        seed=args.seed,
        is_shown=args.stream,
    )
    return dict(zip(turns, answers, strict=True))


def _limit(task: Task, args: argparse.Namespace, loaded: LoadedModel) -> int:
    """Most tokens of an answer: what its parts may take, and their delimiters."""
    from aromni_jax.inference.policy import MEDIA_DELIMITERS
    from aromni_jax.structs import Task

    codec, vocab = loaded.bundle.speech, loaded.model.vocab
    text_tokens, image_tokens = args.max_text_tokens, vocab.tokens_per_image
    speech_tokens = round(args.max_seconds * codec.codes_per_second) * len(vocab.speech) if codec else 0
    if task == Task.TEXT_TO_SPEECH:
        return speech_tokens + MEDIA_DELIMITERS  # no more, or it would be longer than asked
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


def _write(
    parts: tuple[Part, ...],
    request: Request,
    output: pathlib.Path,
    index: int,
    loaded: LoadedModel,
    *,
    sound_is_written: bool,
) -> dict[str, Any]:
    """Writes one answer's files and returns its line of `result.json`."""
    import soundfile
    from PIL import Image as PilImage

    from aromni_jax.structs import Image, Speech, Text

    files: list[str] = []
    texts = [part.text for part in parts if isinstance(part, Text)]
    stem = _stem(index, request)
    for part in parts:
        path = output / f"{stem}.png"
        if isinstance(part, Image):
            assert loaded.bundle.image is not None and part.codes_P is not None
            PilImage.fromarray(loaded.bundle.image.decode(part.codes_P[None])[0]).save(path)
        elif isinstance(part, Speech):
            assert loaded.bundle.speech is not None and part.codes_KU is not None
            path = path.with_suffix(".wav")
            if not sound_is_written:
                waveform = loaded.bundle.speech.decode([part.codes_KU])[0]
                soundfile.write(path, waveform, loaded.bundle.speech.sample_rate_hz, subtype="PCM_16")
        else:
            continue
        files.append(path.name)
    if texts:
        (output / f"{stem}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return {"task": request.task, "request": dataclasses.asdict(request), "text": texts, "files": files}


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
