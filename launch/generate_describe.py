"""`aromni generate --describe`: the decoding machine of a model's vocabulary, as a table and as a drawing."""

from __future__ import annotations

import argparse
import pathlib

from aromni_jax.evaluation.automaton import automaton_svg
from aromni_jax.inference.description import as_table, describe
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.policy import DecodingConfig, policy_for
from aromni_jax.structs import Task
from aromni_jax.vocab import JointVocab
from launch.loading import load_vocab


def describe_machine(args: argparse.Namespace, decoding: DecodingConfig) -> int:
    """Prints the machine of `args.task`, or of every task that the vocabulary has codes for, and writes both forms."""
    vocab = load_vocab(args.model)
    tasks = [Task.from_name(args.task)] if args.task else [task for task in Task if _is_possible(task, vocab)]
    states = describe(compile_grammar(vocab, {task: policy_for(task, decoding) for task in tasks}))
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    table = as_table(states)
    (output / "machine.txt").write_text(table + "\n", encoding="utf-8")
    (output / "machine.svg").write_text(automaton_svg(states), encoding="utf-8")
    print(table)
    return 0


def _is_possible(task: Task, vocab: JointVocab) -> bool:
    """Whether the vocabulary has codes for what `task` is asked with and answers with."""
    media = policy_for(task).parts | {"image"} if task == Task.CAPTION else policy_for(task).parts
    hears_or_speaks = "speech" in media or "speech" in task.label
    return ("image" not in media or vocab.image is not None) and (not hears_or_speaks or bool(vocab.speech))
