"""The `aromni` command: finds the module of a subcommand, runs it, and turns what users can cause into one line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from launch.flags import is_bad_input

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("launch.quickstart", "the main job on the embedded corpus, from raw data to a report"),
    "tokenizer": ("launch.tokenizer", "train and try text, image and speech tokenizers"),
    "pretokenize": ("launch.pretokenize", "raw corpus to token shards; any number of processes, again after a crash"),
    "show": ("launch.show", "a data set for a human: one packed row to read, see and hear, or statistics of all"),
    "train": ("launch.train", "pretraining and SFT; the same command resumes"),
    "doctor": ("launch.doctor", "devices, versions, bandwidths, clocks and workdir of every process, before a run"),
    "plan": ("launch.plan", "compile the train step for a TPU pod that is not here: does it fit, how fast can it be"),
    "export": ("launch.export", "a Hugging Face Chameleon directory from a checkpoint"),
    "import": ("launch.import_", "a Hugging Face Chameleon directory into a checkpoint"),
    "generate": ("launch.generate", "text, pictures and speech from a trained model"),
    "bench": ("launch.bench", "ratios of speed: ours and the torch reference, in turn on the same cores"),
    "evaluate": ("launch.evaluate", "held-out numbers of a trained model"),
}
"""Subcommand -> module, one line of help."""


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one subcommand; imports its module, which imports no jax at top level."""
    module_name, summary = COMMANDS[command]
    parser = argparse.ArgumentParser(f"aromni {command}", description=summary)
    importlib.import_module(module_name).add_arguments(parser)
    return parser


def _usage() -> str:
    lines = ["usage: aromni COMMAND [arguments]      (aromni COMMAND --help says more)", "", "commands:"]
    lines += [f"  {name:<12} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(lines)


def run(command: str, argv: Sequence[str]) -> int:
    """Runs one subcommand; 0 means done, anything else printed one line that says what to do.

    1 is an error that the user can mend, 2 a wrong command line, 75 what another start may get past, 70 anything else
    that went wrong.
    """
    parser = build_parser(command)
    module = importlib.import_module(COMMANDS[command][0])
    args, rest = parser.parse_known_args(argv)
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    unknown = [argument for argument in rest if not argument.startswith("--config.")]
    if unknown or (overrides and not hasattr(args, "config")):
        options = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches((unknown or overrides)[0].split("=")[0], options, 1)
        parser.error(f"unknown argument {(unknown or overrides)[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    args.config_overrides = overrides
    try:
        return module.main(args)
    except BrokenPipeError:
        # Whoever read the output has gone, and Python would trip over it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"aromni {command}: stopped: nobody reads the output any more", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"aromni {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("AROMNI_TRACEBACK"):
            raise
        return _report(command, error)


def _report(command: str, error: Exception) -> int:
    """Says what went wrong; returns the exit status."""
    from aromni_jax.train.watchdog import EXIT_TRY_AGAIN, EXIT_UNEXPECTED, TryAgain

    if is_bad_input(error):
        print(f"aromni {command}: error: {error}", file=sys.stderr)
        return 1
    if isinstance(error, TryAgain):
        print(f"aromni {command}: error: {error}", file=sys.stderr)
        return EXIT_TRY_AGAIN
    traceback.print_exc()
    cause = str(error).strip().split("\n")[0][:200]
    print(f"aromni {command}: error: this should not happen: {type(error).__name__}: {cause}", file=sys.stderr)
    return EXIT_UNEXPECTED


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else "aromni --help lists them"
        print(f"aromni: unknown command {argv[0]!r}; {hint}", file=sys.stderr)
        return 2
    return run(argv[0], argv[1:])


def run_module(file: str) -> None:
    """Body of `python -m launch.<module>`: `file` is the module's `__file__`."""
    module_name = "launch." + os.path.splitext(os.path.basename(file))[0]
    command = next(name for name, (module, _) in COMMANDS.items() if module == module_name)
    sys.exit(run(command, sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
