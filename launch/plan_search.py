"""`aromni plan --search`: rows per chip x remat policy x mesh x place of the optimizer, each compiled until memory is
known; and the cache of plans.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from aromni_jax.train import toolchain

REMATS = ("dots", "attention", "full", "offload")
"""From the least computed again to the least memory."""
TENSOR_WAYS = (1, 4)
DATA_WAYS = (1, 4)
"""Of each slice. One is walked: it takes the least memory. The others are tried where they may gain."""
MAX_ROWS = 64
"""Rows a chip are doubled from 1 up to here, or until they do not fit."""

_STATE_COPIES = 3
"""A step has no more than that of the state on a chip: old and new, where the compiler cannot update in place, and
gradients. So much may be saved at most by keeping parts of the state elsewhere or in fewer bits."""

Result = dict[str, Any]
Plan = Callable[[dict[str, Any], str, int], Result]
"""(config, topology, slices) -> the result of `estimate.plan`."""


def cached(name: str, plan: Plan) -> Plan:
    """`plan` that answers from the user's cache directory what was asked before: with the same versions and source, and
    the same flags for the compiler.

    An entry that cannot be read counts as none, and where none can be written, stderr says so once.
    """
    facts = [name, toolchain.source_hash(), toolchain.versions()]
    has_warned = False

    def entry(*question: Any) -> pathlib.Path:
        flags = [os.environ.get(variable, "") for variable in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
        key = json.dumps([facts, flags, *question], sort_keys=True)
        folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "aromni" / "plan"
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def answer(config: dict[str, Any], topology: str, num_slices: int) -> Result:
        nonlocal has_warned
        try:
            return json.loads(entry(config, topology, num_slices).read_text(encoding="utf-8"))
        except (OSError, ValueError, RuntimeError):  # RuntimeError: a user without a home.
            pass
        result = plan(config, topology, num_slices)
        try:
            _write(entry(config, topology, num_slices), json.dumps(result))
        except (OSError, RuntimeError) as error:
            if not has_warned:
                print(f"plans are not kept for the next time: {error}; XDG_CACHE_HOME moves them", file=sys.stderr)
            has_warned = True
        return result

    return answer


def _write(file: pathlib.Path, text: str) -> None:
    """All of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def assigned_memory_plan(config: dict[str, Any], topology: str, num_slices: int) -> Result:
    """The plan of one config, in a process of its own that ends when memory is known.

    Raises:
      ValueError: the config does not suit the machine, or the compiler failed; its message.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(
            target=_plan_and_leave, args=(config, topology, num_slices, folder)
        )
        process.start()
        process.join()
        answer = pathlib.Path(folder) / "answer.json"
        if not answer.is_file():
            raise ValueError(f"the compiler ended with status {process.exitcode} and no answer")
        result = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in result:
        raise ValueError(result["error"])
    return result


def _plan_and_leave(config: dict[str, Any], topology: str, num_slices: int, folder: str) -> None:
    dump = pathlib.Path(folder) / "dump"
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=NONE"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()  # Of two the last counts.
    from launch.plan import plan_config

    try:
        result = plan_config(config, topology, num_slices, dump)
    except Exception as error:
        result = {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}
    _write(pathlib.Path(folder) / "answer.json", json.dumps(result))
    os._exit(0)  # The compiler's thread cannot be stopped.


def candidates(
    config: dict[str, Any], model: dict[str, Any], num_slices: int, num_devices: int
) -> Iterator[dict[str, Any]]:
    """The config under every mesh with the least memory and every policy; `model` are the fields of its model."""
    for ways in _distinct(*TENSOR_WAYS, config["mesh"]["tensor"]):
        mesh = _mesh(config, num_devices, num_slices, ways)
        if mesh is None or model["num_heads"] % ways or model["num_kv_heads"] % ways:
            continue
        for remat in REMATS:
            yield copy.deepcopy(config) | {
                "mesh": mesh,
                "model": model | {"remat": remat},
                "gradient_accumulation_steps": 1,
            }


def _distinct(*sizes: int) -> list[int]:
    """Without what is there already, and without -1: the rest of the devices always goes to fsdp."""
    return [size for size in dict.fromkeys(sizes) if size > 0]


def _mesh(config: dict[str, Any], num_devices: int, data: int, tensor: int) -> dict[str, Any] | None:
    """The config's mesh with these axes and fsdp over the rest; None where they do not divide the devices."""
    context = max(config["mesh"]["context"], 1)
    fsdp, left = divmod(num_devices, data * context * tensor)
    return None if left else config["mesh"] | dict(data=data, fsdp=fsdp, context=context, tensor=tensor)


def states(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config, then with what only the optimizer reads in the host's memory, then with bfloat16 weights besides,
    where the model computes in bfloat16 anyway: ever less memory of the chip."""
    yield config
    if config["optimizer"]["name"] == "adafactor":  # `OptimizerConfig.offload` goes without it.
        return
    if not config["optimizer"].get("offload"):
        config = config | {"optimizer": config["optimizer"] | {"offload": True}}
        yield config
    if config["model"]["dtype"] == "bfloat16" and config["model"]["param_dtype"] == "float32":
        yield config | {
            "optimizer": config["optimizer"] | {"master_weights": True},
            "model": config["model"] | {"param_dtype": "bfloat16"},
        }


def search(
    config: dict[str, Any],
    model: dict[str, Any],
    topology: str,
    num_slices: int,
    num_devices: int,
    plan: Plan,
    progress: Callable[[str], None],
) -> list[Result]:
    """Every point of the walk: a plan, and with it `rows_per_chip`, `optimizer_offload` and `param_dtype`.

    Rows are doubled until they do not fit; then `states` are tried with the rows that were too many. What does not
    compile is reported and left out.

    Raises:
      ValueError: no mesh has the config's `context` on these devices.
    """
    asked: list[dict[str, Any]] = []
    points: list[Result] = []

    def attempt(candidate: dict[str, Any], rows: int) -> Result | None:
        choice = _choice(candidate, rows)
        started = time.monotonic()
        try:
            result = plan(candidate | {"global_batch_size": rows * num_devices}, topology, num_slices)
        except ValueError as error:
            progress(f"{describe_choice(choice)}: left out ({error})")
            return None
        asked.append(candidate)
        points.append(result | choice)
        gib = result["hbm_bytes"]["peak"] / (1 << 30)
        fits = "fits" if result["fits"] else "does not fit"
        progress(f"{describe_choice(choice)}: {gib:.2f} GiB, {fits} ({time.monotonic() - started:.0f} s)")
        return points[-1]

    walks = list(candidates(config, model, num_slices, num_devices))
    if not walks:
        raise ValueError(
            f"mesh.context = {config['mesh']['context']} does not divide the devices of each slice, {num_devices} over "
            f"{num_slices}; set it to a number that does"
        )
    for walk in walks:
        rows, rest = 1, states(walk)
        candidate = next(rest, None)
        while candidate and rows <= MAX_ROWS:
            point = attempt(candidate, rows)
            if point and point["fits"]:
                rows *= 2
            else:
                candidate = next(rest, None) if point and _may_fit_otherwise(point) else None
    for candidate, point in list(zip(asked, points, strict=True)):
        if not _may_gain(point, points):
            continue
        tensor = point["mesh"]["tensor"]
        for data in _distinct(*(num_slices * ways for ways in DATA_WAYS), config["mesh"]["data"]):
            mesh = None if data % num_slices else _mesh(config, num_devices, data, tensor)
            if mesh and data != point["mesh"]["data"]:
                attempt(candidate | {"mesh": mesh}, point["rows_per_chip"])
    return points


def _choice(config: dict[str, Any], rows: int) -> Result:
    return {
        "rows_per_chip": rows,
        "remat": config["model"]["remat"],
        "mesh": {axis: config["mesh"][axis] for axis in ("data", "fsdp", "context", "tensor")},
        "optimizer_offload": config["optimizer"].get("offload", False),
        "param_dtype": config["model"]["param_dtype"],
    }


def describe_choice(point: Result) -> str:
    """What is varied, in half a line."""
    return (
        f"{point['rows_per_chip']} rows a chip, {point['remat']}, "
        + ", ".join(f"{axis} {size}" for axis, size in point["mesh"].items())
        + (", optimizer.offload" if point["optimizer_offload"] else "")
        + (", bfloat16 weights" if point["param_dtype"] == "bfloat16" else "")
    )


def _may_fit_otherwise(point: Result) -> bool:
    """Whether a point that does not fit might with another place or type of its state."""
    least = point["hbm_bytes"]["peak"] - _STATE_COPIES * point["hbm_bytes"]["arguments"]
    return least <= point["hbm_capacity_bytes"]


def _may_gain(point: Result, points: list[Result]) -> bool:
    """Whether the point might be better with another number of data ways, which changes what the links carry.

    A point of the frontier might do with less of it, and one that the links bound might come to be of the frontier.
    """
    if not point["fits"]:
        return False
    best = frontier(points)
    seconds = max(value for bound, value in point["roofline_seconds"].items() if bound != "interconnect")
    rates = [tokens_per_second(other) for other in best if other["rows_per_chip"] >= point["rows_per_chip"]]
    return point in best or point["global_batch_size"] * point["sequence_length"] / seconds > max(rates)


def tokens_per_second(point: Result) -> float:
    """By the roofline."""
    return point["global_batch_size"] * point["sequence_length"] / point["step_seconds_roofline"]


def frontier(points: list[Result]) -> list[Result]:
    """Points that fit and that no other beats in both rows a chip and tokens/s; the largest batch first.

    Of two that are as good in both, it is the one with the smaller product of memory and what the links carry, which by
    the roofline costs nothing as long as something else takes longer, but by a clock may: half as much on the links is
    worth some memory, a hundredth less is not.
    """

    def order(point: Result) -> tuple[float, float, float]:
        price = point["hbm_bytes"]["peak"] * point["roofline_seconds"]["interconnect"]
        return -point["rows_per_chip"], -tokens_per_second(point), price

    kept: list[Result] = []
    for point in sorted((point for point in points if point["fits"]), key=order):
        if not kept or tokens_per_second(point) > tokens_per_second(kept[-1]):
            kept.append(point)
    return kept
