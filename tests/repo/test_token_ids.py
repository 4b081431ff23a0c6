"""Token ids are numbers in `aromni_jax/vocab.py` only; everything else asks the vocabulary."""

from __future__ import annotations

import ast
import re

import pytest

from aromni_jax.vocab import SPECIALS, JointVocab
from tests.fixtures.source_tree import identify, parse, product_files

# Small ids and powers of two are not recognisable as rows by their value; they are caught by their use.
_COMMON_SIZES = {1 << power for power in range(17)}
_TOKEN_NAME = re.compile(r"(^|_)(tokens?|token_ids?|inputs|targets|prompt_ids)(_[A-Z]+)?$")
# `unk_id` is also a setting of SentencePiece, whose ids are not rows.
_SPECIAL_NAME = re.compile(rf"^({'|'.join(set(SPECIALS) - {'unk'})})(_id|_token|_token_id)?$")


def layout_numbers() -> set[int]:
    """Rows of the released layout that mean something by themselves."""
    vocab = JointVocab.released()
    spans = [vocab.text, vocab.image, *vocab.speech]
    numbers = {*vocab.special_ids.values(), *(edge for span in spans for edge in (span.start, span.stop))}
    return {number for number in numbers if number > 255} - _COMMON_SIZES


def is_integer(node: ast.expr) -> bool:
    """A literal that could be a row: -1 and other negative numbers are none."""
    return isinstance(node, ast.Constant) and type(node.value) is int


def name_of(node: ast.expr) -> str:
    """The identifier an expression ends in: `batch.inputs_BL[0]` -> `inputs_BL`."""
    if isinstance(node, ast.Subscript):
        return name_of(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def violations(tree: ast.AST) -> list[str]:
    """Literals that stand for rows of a vocabulary."""
    found = []
    numbers = layout_numbers()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in numbers:
            found.append(f"line {node.lineno}: {node.value} is a row of the released layout")
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            for left, right in ((node.left, node.comparators[0]), (node.comparators[0], node.left)):
                if _TOKEN_NAME.search(name_of(left)) and is_integer(right):
                    found.append(f"line {node.lineno}: {name_of(left)} is compared with a number")
        pairs: list[tuple[str, ast.expr]] = []
        if isinstance(node, ast.Assign):
            pairs = [(name_of(target), node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            pairs = [(name_of(node.target), node.value)]
        elif isinstance(node, ast.Call):
            pairs = [(keyword.arg or "", keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.FunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            pairs = [(a.arg, d) for a, d in zip(positional[::-1], node.args.defaults[::-1], strict=False)]
            pairs += [(a.arg, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d]
        for name, value in pairs:
            if _SPECIAL_NAME.match(name) and is_integer(value):
                found.append(f"line {value.lineno}: control token {name} is given as a number")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "x = 12820",
        "span = (8724, 12820)",
        "mask = tokens_BL == 1",
        "mask = 2 != batch.inputs_BL[:, 0]",
        "pad_id = 1",
        "f(eos=2)",
        "def f(ids, *, pad=1): ...",
        "def f(bos=0): ...",
    ],
)
def test_rule_sees(source):
    assert violations(ast.parse(source))


@pytest.mark.parametrize("source", ["segment_ids_BL == 0", "num_tokens = 4096", "pad = vocab.pad", "modality == 1"])
def test_rule_leaves_alone(source):
    assert not violations(ast.parse(source))


@pytest.mark.parametrize(
    "path", [path for path in product_files() if identify(path) != "aromni_jax/vocab.py"], ids=identify
)
def test_no_token_id_outside_the_vocabulary(path):
    assert not violations(parse(path))
