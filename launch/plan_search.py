"""`aromni plan --search`: rows per chip x remat policy x mesh, each compiled until memory is known; and the cache."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

REMATS = ("dots", "attention", "full", "offload")
"""From the least computed again to the least memory."""
TENSOR_WAYS = (1, 4)
MAX_ROWS = 64
"""Rows a chip are doubled from 1 up to here, or until they do not fit."""

Result = dict[str, Any]
Plan = Callable[[dict[str, Any], str, int], Result]
"""(config, topology, slices) -> the result of `estimate.plan`."""


def cached(name: str, plan: Plan) -> Plan:
    """`plan` that answers from the user's cache directory what was asked before with the same versions and source."""
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "aromni" / "plan"
    facts = [name, _source_hash(), *(f"{package} {_version(package)}" for package in ("jax", "jaxlib", "libtpu"))]

    def answer(config: dict[str, Any], topology: str, num_slices: int) -> Result:
        key = json.dumps([facts, config, topology, num_slices], sort_keys=True)
        file = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        result = plan(config, topology, num_slices)
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(result), encoding="utf-8")
        part.replace(file)
        return result

    return answer


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _source_hash() -> str:
    """SHA-256 over the library, which is all that the compiled step depends on."""
    import aromni_jax

    root = pathlib.Path(aromni_jax.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


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
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=NONE"
    from launch.plan import plan_config

    try:
        result = plan_config(config, topology, num_slices, dump)
    except Exception as error:
        result = {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}
    part = pathlib.Path(folder) / "part.json"
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(part.with_name("answer.json"))
    os._exit(0)  # The compiler's thread cannot be stopped.


def candidates(config: dict[str, Any], model: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(remat, config of one row) for every mesh and policy; `model` are the fields of the config's model."""
    for ways in TENSOR_WAYS:
        if model["num_heads"] % ways or model["num_kv_heads"] % ways:
            continue
        for remat in REMATS:
            changed = copy.deepcopy(config)
            if ways > 1:
                changed["mesh"]["tensor"] = ways
            changed["model"] = model | {"remat": remat}
            changed["gradient_accumulation_steps"] = 1
            yield remat, changed


def search(
    config: dict[str, Any],
    model: dict[str, Any],
    topology: str,
    num_slices: int,
    num_devices: int,
    plan: Plan,
    progress: Callable[[str], None],
) -> list[Result]:
    """Every point of the walk, with `rows_per_chip` added. What does not compile is reported and left out."""
    points: list[Result] = []
    for remat, candidate in candidates(config, model):
        rows = 1
        while rows <= MAX_ROWS:
            asked = copy.deepcopy(candidate) | {"global_batch_size": rows * num_devices}
            what = f"{rows} rows a chip, {remat}, tensor {asked['mesh']['tensor']}"
            started = time.monotonic()
            try:
                result = plan(asked, topology, num_slices)
            except ValueError as error:
                progress(f"{what}: left out ({error})")
                break
            points.append(result | {"rows_per_chip": rows})
            gib = result["hbm_bytes"]["peak"] / (1 << 30)
            fits = "fits" if result["fits"] else "does not fit"
            progress(f"{what}: {gib:.2f} GiB, {fits} ({time.monotonic() - started:.0f} s)")
            if not result["fits"]:
                break
            rows *= 2
    return points


def tokens_per_second(point: Result) -> float:
    """By the roofline."""
    return point["global_batch_size"] * point["sequence_length"] / point["step_seconds_roofline"]


def frontier(points: list[Result]) -> list[Result]:
    """Points that fit and that no other beats in both rows a chip and tokens/s; the largest batch first."""
    fitting = sorted((p for p in points if p["fits"]), key=lambda p: (-p["rows_per_chip"], -tokens_per_second(p)))
    kept: list[Result] = []
    for point in fitting:
        if not kept or tokens_per_second(point) > tokens_per_second(kept[-1]):
            kept.append(point)
    return kept
