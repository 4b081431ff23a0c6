"""Laws about files: which room may import which, how long a file may be, what it may be called and what it may use."""

from __future__ import annotations

import ast
import sys

import pytest

from tests.fixtures.source_tree import (
    PACKAGES,
    ROOT,
    code_names,
    identify,
    imports,
    is_module,
    module_name,
    parse,
    product_files,
    room_of,
    tables,
)

MAX_LINES = 500
ROOMS, PLACES = tables(ROOT / "aromni_jax" / "ARCHITECTURE.md")
RANK = {code_names(room)[0]: int(rank) for rank, room, _, _ in ROOMS}
ALLOWED = {code_names(room)[0]: set(code_names(allowed)) for _, room, _, allowed in ROOMS}

# Second APIs of libraries we use, and libraries that belong in tests and extras only; `peers` is what needs an extra.
PEER_LIBRARIES = ("torch", "transformers")
FORBIDDEN = ("torch", "torchvision", "torchaudio", "tensorflow", "transformers", "flax.nnx", "haiku", "grain.python")


def test_table_of_rooms_goes_downward():
    upward = [(room, low) for room, lows in ALLOWED.items() for low in lows if RANK[low] >= RANK[room]]
    assert not upward


def test_every_file_has_a_room_and_every_room_has_files():
    assert {room_of(module_name(path)) for path in product_files()} == set(RANK)


@pytest.mark.parametrize("path", product_files(), ids=identify)
def test_imports_follow_the_table_of_rooms(path):
    room = room_of(module_name(path))
    assert room in ALLOWED
    wrong = [
        f"line {line}: {name} ({target})"
        for line, name in imports(path)
        if (target := room_of(name)) is not None and target != room and target not in ALLOWED[room]
    ]
    assert not wrong, f"{identify(path)} is in room {room}"


def test_places_of_the_page_exist():
    missing = [name for _, file in PLACES for name in code_names(file) if not (ROOT / name).is_file()]
    assert not missing


@pytest.mark.parametrize("path", product_files(), ids=identify)
def test_only_one_api_of_each_library(path):
    wrong = [
        f"line {line}: {name}"
        for line, name in imports(path)
        if any(name == banned or name.startswith(banned + ".") for banned in FORBIDDEN)
        and not (room_of(module_name(path)) == "peers" and name.split(".")[0] in PEER_LIBRARIES)
        or (name.startswith("orbax") and not name.startswith("orbax.checkpoint.v1"))
    ]
    assert not wrong


def all_python_files():
    return sorted([*product_files(), *(ROOT / "tests").rglob("*.py"), ROOT / "setup.py"])


@pytest.mark.parametrize("path", all_python_files(), ids=identify)
def test_files_are_short_and_say_what_they_are_for(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    assert not text.strip() or ast.get_docstring(parse(path)), "a module begins with a docstring"


@pytest.mark.parametrize("path", product_files(), ids=identify)
def test_public_names_have_docstrings(path):
    bare = [
        f"line {node.lineno}: {node.name}"
        for node in parse(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare


def test_no_module_is_called_like_the_standard_library_or_utils():
    # Packages stand beside their modules on nobody's path, so only the last part of a name can be shadowed.
    names = {path: path.stem if path.stem != "__init__" else path.parent.name for path in product_files()}
    wrong = [
        identify(path)
        for path, name in names.items()
        if name in sys.stdlib_module_names or name in ("utils", "util", "helpers", "common_utils", "misc")
    ]
    assert not wrong


@pytest.mark.parametrize("path", product_files(), ids=identify)
def test_nothing_is_left_for_later(path):
    """No marks of unfinished work, and no import by a name in a string (a registry), but for the command table."""
    text = path.read_text(encoding="utf-8")
    marks = [mark for mark in ("TODO", "FIXME", "XXX", "NotImplementedError") if mark in text]
    assert not marks
    if identify(path) != "launch/cli.py":
        assert "importlib.import_module" not in text and "__import__(" not in text


def test_first_party_imports_name_modules_that_exist():
    """`from package.module import name` with a wrong module would only fail when that function runs."""
    wrong = []
    for path in product_files():
        for line, name in imports(path):
            if name.split(".")[0] not in PACKAGES:
                continue
            parent = name.rsplit(".", 1)[0] if not is_module(name) else name
            if not is_module(parent):
                wrong.append(f"{identify(path)}:{line}: {name}")
    assert not wrong
