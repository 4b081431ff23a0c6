"""`aromni plan`: compiles the train step for a TPU pod that is not here: does it fit, and how fast can it be?

The compiler knows how much memory a program takes long before it has made code for it. So a plan normally stops there;
`--compile` goes on to the executable, which also finds what only making code can (a kernel that does not fit VMEM).

    aromni plan --config=configs/pretrain.py:debug --topology=local --executable=step.bin
    aromni train --config=configs/pretrain.py:debug --workdir=runs/debug --executable=step.bin

`--executable` keeps what was compiled, for runs of the same model, batch, mesh, versions and source on such devices:
the learning rate and its schedule, the number of steps and the weights of the loss may differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from launch import plan_search
from launch.flags import add_config_argument, check_can_write, load_config

if TYPE_CHECKING:
    from aromni_jax.config import TrainConfig
    from aromni_jax.vocab import JointVocab

LOCAL = "local"
"""The "topology" of the devices that this machine has."""

_CODE_WIDTH = 256
"""Width of the image codebook of the released layout (METHOD section 4)."""

QUIET_COMPILER = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}
"""Keeps libtpu from looking for a machine: it is wanted as a compiler only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `aromni plan`."""
    add_config_argument(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="for example v5e:16x16 or v5p:4x4x4 (chips); with --executable also local, the devices of this machine",
    )
    parser.add_argument("--num_slices", type=int, default=1, metavar="S", help="slices of that shape (default: 1)")
    parser.add_argument(
        "--compile", action="store_true", help="compile to the end, which takes minutes, not only until memory is known"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try rows per chip, remat policies, data and tensor ways, offloading the optimizer; print the best",
    )
    parser.add_argument(
        "--executable",
        metavar="FILE",
        help="compile to the end and write the step there, for `aromni train`",
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")


def main(args: argparse.Namespace) -> int:
    """Prints the plan; exit status 0 also when it does not fit."""
    config = load_config(args)
    if args.num_slices < 1:
        raise ValueError(f"--num_slices={args.num_slices} must be at least 1")
    plain = config.to_dict()
    if args.search and args.executable:
        raise ValueError("--search compiles many steps and --executable writes one; give one of them")
    if args.search and args.compile:
        raise ValueError("--search stops compiling where memory is known, and --compile goes on; give one of them")
    check_can_write("json", args.json)
    if args.topology == LOCAL:
        return _compile_here(plain, args)
    os.environ.update(QUIET_COMPILER)
    if args.executable:
        result = plan_config(plain, args.topology, args.num_slices, executable=args.executable)
        print(describe(result))
        print(f"written: {args.executable} ({pathlib.Path(args.executable).stat().st_size:,} bytes)")
    elif args.search:
        result = _search(plain, args.topology, args.num_slices)
    else:
        name, plan = ("compiled", plan_config) if args.compile else ("assigned", plan_search.assigned_memory_plan)
        result = plan_search.cached(name, plan)(plain, args.topology, args.num_slices)
        print(describe(result))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _compile_here(config_dict: dict[str, Any], args: argparse.Namespace) -> int:
    """Writes the step compiled for the devices of this machine."""
    if not args.executable or args.json or args.num_slices > 1:
        raise ValueError(f"--topology={LOCAL} goes with --executable alone: plans are made for TPUs that are not here")
    import jax

    from aromni_jax import partitioning
    from aromni_jax.config import TrainConfig, from_mapping
    from aromni_jax.models.config import resolve_model
    from aromni_jax.train import executable
    from aromni_jax.train.step import abstract_inputs, make_train_step

    train = from_mapping(TrainConfig, config_dict)
    mesh = partitioning.make_mesh(train.mesh)
    vocab, frozen, code_width = _vocabulary(train)
    model = resolve_model(train.model, vocab.size, code_width)
    started = time.monotonic()
    step: Any = make_train_step(model, train, mesh, vocab, frozen)
    with executable.compiled_anew():
        compiled = step.lower(*abstract_inputs(model, train, mesh, frozen)).compile()
    seconds = time.monotonic() - started
    facts = executable.program_facts(model, train, mesh, vocab, frozen)
    num_bytes = executable.save(args.executable, compiled, facts)
    kind = jax.devices()[0].device_kind
    print(f"compiled for {mesh.size} x {kind} in {seconds:.1f} s; written: {args.executable} ({num_bytes:,} bytes)")
    return 0


def _vocabulary(train: TrainConfig) -> tuple[JointVocab, dict[str, Any], int]:
    """Vocabulary, frozen arrays and code width E that `aromni train` would use; where the data are not here, the
    released layout's, and said so."""
    from launch.training_data import vocabulary_and_frozen

    try:
        vocab, frozen, _ = vocabulary_and_frozen(train)
    except ValueError as error:
        print(f"the step is made for the released vocabulary: {error}", file=sys.stderr)
        return _released(train)
    return vocab, frozen, frozen["image_codebook"].shape[1] if frozen else 0


def _released(train: TrainConfig) -> tuple[JointVocab, dict[str, Any], int]:
    import jax
    import numpy as np

    from aromni_jax.vocab import JointVocab

    vocab = JointVocab.released()
    assert vocab.image
    if not train.loss.perceptual_weight:
        return vocab, {}, 0
    return vocab, {"image_codebook": jax.ShapeDtypeStruct((vocab.image.size, _CODE_WIDTH), np.float32)}, _CODE_WIDTH


def _search(config: dict[str, Any], topology: str, num_slices: int) -> dict[str, Any]:
    """Prints the frontier of a search; returns {"frontier": plans, "points": plans}."""
    from aromni_jax.models.config import resolve_model
    from aromni_jax.train import estimate
    from aromni_jax.vocab import JointVocab

    vocab = JointVocab.released()
    model = dataclasses.asdict(resolve_model(config["model"], vocab.size, 0))
    del model["vocab_size"], model["perceptual_dim"]
    points = plan_search.search(
        config,
        model,
        topology,
        num_slices,
        len(estimate.describe_topology(topology, num_slices)),
        plan_search.cached("assigned", plan_search.assigned_memory_plan),
        lambda line: print(line, flush=True),
    )
    best = plan_search.frontier(points)
    print("largest batch first, fastest last:" if best else "nothing fits")
    for point in best:
        print(
            f"  {plan_search.describe_choice(point)}: {point['hbm_bytes']['peak'] / (1 << 30):.2f} GiB"
            + (f" and {point['host_bytes'] / (1 << 30):.2f} of the host" if point["host_bytes"] else "")
            + f", {plan_search.tokens_per_second(point):,.0f} tokens/s at best, bound by {point['bound_by']}"
        )
    if any(point["host_bytes"] for point in best):
        print("transfers to and from the host's memory are not counted")
    return {"frontier": best, "points": points}


def plan_config(
    config_dict: Any,
    topology: str,
    num_slices: int = 1,
    dump: pathlib.Path | None = None,
    executable: str | None = None,
) -> dict[str, Any]:
    """The plan of a training config on the released vocabulary layout; no data set is needed (`dump`: `estimate.plan`).

    With `executable`, the vocabulary is that of the data, and the compiled step is written to that file.

    Raises:
      ValueError: an unknown topology, a config that does not fit its mesh, or no step to write.
    """
    from aromni_jax import optim
    from aromni_jax.config import TrainConfig, from_mapping
    from aromni_jax.models.config import resolve_model
    from aromni_jax.train import estimate

    train = from_mapping(TrainConfig, config_dict)
    optim.make_schedule(train.optimizer, train.total_steps)  # No part of the step, but of what a run would refuse.
    if num_slices > 1:
        data = num_slices if train.mesh.data == 1 else train.mesh.data
        train = dataclasses.replace(train, mesh=dataclasses.replace(train.mesh, num_slices=num_slices, data=data))
    vocab, frozen, code_width = _vocabulary(train) if executable else _released(train)
    model = resolve_model(train.model, vocab.size, code_width)
    devices = estimate.describe_topology(topology, num_slices)
    if not executable:
        return estimate.plan(model, train, vocab, frozen, devices, dump)

    from aromni_jax.train.executable import compiled_anew, program_facts, save

    is_written = False

    def write(compiled: Any, compiled_for: TrainConfig, mesh: Any) -> None:
        nonlocal is_written
        if compiled_for.global_batch_size != train.global_batch_size:
            raise ValueError(
                f"global_batch_size {train.global_batch_size} does not divide over {mesh.size} devices; "
                f"{compiled_for.global_batch_size} does"
            )
        save(executable, compiled, program_facts(model, compiled_for, mesh, vocab, frozen))
        is_written = True

    with compiled_anew():
        result = estimate.plan(model, train, vocab, frozen, devices, on_compiled=write)
    if not is_written:
        raise ValueError(
            f"nothing is written to {executable}: the step needs {result['hbm_bytes']['peak'] / (1 << 30):.2f} GiB and "
            f"a device has {result['hbm_capacity_bytes'] / (1 << 30):.2f}; see `aromni plan` without --executable"
        )
    return result


def describe(result: dict[str, Any]) -> str:
    """The plan in a few lines."""
    gib = 1 << 30
    hbm, capacity = result["hbm_bytes"], result["hbm_capacity_bytes"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    seconds = result["roofline_seconds"]
    best = result["step_seconds_roofline"]
    rows, asked = result["global_batch_size"], result["asked_global_batch_size"]
    rate = rows * result["sequence_length"] / best
    compiled = result["memory_from"] == "executable"
    return "\n".join(
        [
            f"{result['parameters']:,} parameters on {result['devices']} x {result['device_kind']} ({mesh})",
            f"batch: {rows} rows of {result['sequence_length']}"
            + (f" (the config's {asked} do not divide over these devices)" if asked != rows else ""),
            f"memory per device: {hbm['peak'] / gib:.2f} GiB of {capacity / gib:.2f} "
            f"({hbm['arguments'] / gib:.2f} state and batch, {hbm['temporaries'] / gib:.2f} temporaries): "
            + ("fits" if result["fits"] else "does NOT fit")
            + (f"; {result['host_bytes'] / gib:.2f} GiB of the host" if result["host_bytes"] else ""),
            f"step at best {best:.3g} s, {rate:,.0f} tokens/s, bound by {result['bound_by']}: "
            + ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items()),
            ("compiled to the end in" if compiled else "by the compiler's memory report, after")
            + f" {result['compile_seconds']:.0f} s",
        ]
    )


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
