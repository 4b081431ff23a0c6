"""What the documentation tells people to type exists, and help answers without starting jax."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys

import pytest

from launch import cli
from launch.flags import load_config
from tests.fixtures.source_tree import ROOT, identify, parse

HEAVY = ("jax", "flax", "orbax", "torch", "transformers", "tensorflow", "grain", "sklearn")


def documents():
    """(where, text) of everything that shows commands: pages, and the docstrings of configs and commands."""
    for page in (ROOT / "README.md", ROOT / "aromni_jax" / "ARCHITECTURE.md"):
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S)
        cells = re.findall(r"^\|.*\| `(aromni [^`]*)` \|$", text, re.M)
        yield identify(page), "\n".join([*blocks, *cells])
    for file in sorted([*(ROOT / "configs").glob("*.py"), *(ROOT / "launch").glob("*.py")]):
        yield identify(file), ast.get_docstring(parse(file)) or ""


def shown_commands():
    """(where, words) of every command line shown, comments removed and continued lines joined."""
    found = []
    for where, text in documents():
        for line in text.replace("\\\n", " ").splitlines():
            line = line.strip()
            if re.match(r"(aromni|bash|python -m launch\.\w+) ", line):
                found.append((where, tuple(shlex.split(line, comments=True))))
    return found


def test_documentation_shows_commands():
    places = {where for where, _ in shown_commands()}
    assert {"README.md", "configs/pretrain.py"} <= places


@pytest.mark.parametrize(
    ("where", "words"), shown_commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60]
)
def test_shown_command_exists(where, words):
    if words[0] == "bash":
        script = ROOT / words[1]
        assert script.is_file()
        if words[1] == "launch/multiprocess.sh":
            # The script itself says whether it would take the line; what follows "--" is a command of ours.
            rest = words[2:] if words[2] != "--dry-run" else words[3:]
            subprocess.run(["bash", script, "--dry-run", *rest], check=True, capture_output=True)
            check_arguments(rest[2], [word for word in rest[3:] if word != "..."])
        return
    if words[0] == "python":
        command = next(name for name, (module, _) in cli.COMMANDS.items() if module == words[2])
        check_arguments(command, words[3:])
        return
    if words[1:] in (("--help",), ()):
        return
    assert words[1] in cli.COMMANDS
    check_arguments(words[1], words[2:])


def check_arguments(command, words):
    """The parser of `command` knows every flag of `words`, and the config they name builds with their overrides."""
    parser = cli.build_parser(command)
    if "--help" in words:
        return
    args, rest = parser.parse_known_args(words)
    overrides = [word for word in rest if word.startswith("--config.")]
    assert rest == overrides, f"aromni {command} has no {set(rest) - set(overrides)}"
    if overrides or getattr(args, "config", None):
        args.config_overrides = overrides
        load_config(args)


def test_every_command_has_a_module_and_is_in_the_readme():
    shown = {words[1] for where, words in shown_commands() if words[0] == "aromni"} | {"quickstart"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command, (module, summary) in cli.COMMANDS.items():
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
        assert summary and not summary.endswith(".")
        assert command in shown or f"aromni {command}" in readme, f"README does not show aromni {command}"


def test_help_answers_without_jax():
    """Every parser is built in one fresh interpreter; the first that pulls in something heavy is named."""
    program = """
import json, sys
from launch import cli
heavy = json.loads(sys.argv[1])
assert cli.main(["--help"]) == 0
for command in cli.COMMANDS:
    text = cli.build_parser(command).format_help()
    assert command in text
    loaded = [name for name in heavy if name in sys.modules]
    assert not loaded, f"aromni {command} --help imports {loaded}"
"""
    done = subprocess.run([sys.executable, "-c", program, json.dumps(HEAVY)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_runs_as_a_module():
    """`python -m launch.x` is `aromni x`: each command's module ends in the same three lines."""
    for module, _ in cli.COMMANDS.values():
        last = parse(ROOT / (module.replace(".", "/") + ".py")).body[-1]
        assert ast.unparse(last).splitlines()[-1].strip() == "run_module(__file__)", module
