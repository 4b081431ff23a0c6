"""The folder of one run: may we write there, does it belong to this config, and files that are never half written.

A workdir holds `config.json` (resolved), `tokenizers/` (at least `vocab.json`), `metrics.jsonl`, `evaluations.jsonl`,
`checkpoints/`, `heartbeats/` (`train.watchdog`), `first_start` and TensorBoard events; with a local tier also `run_id`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from aromni_jax.models.config import resolve_model

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
CHECKPOINTS = "checkpoints"
HEARTBEATS = "heartbeats"
FIRST_START = "first_start"
TOKENIZERS = "tokenizers"
RUN_ID_FILE = "run_id"
RUN_ID_BYTES = 8

MAY_CHANGE = (
    "total_steps",
    "gradient_accumulation_steps",
    "log_every_steps",
    "eval_every_steps",
    "watchdog_seconds",
    "mesh",
    "checkpoint",
    "optimizer.offload",
    "data.mixture",
    "data.weight_unit",
    "data.temperature",
    "data.when_exhausted",
    "data.epochs",
    "data.duplicates",
    "data.verify",
    "data.num_workers",
    "data.prefetch_batches",
    "data.evaluation",
    "data.evaluation_examples",
    "loss.chunk_tokens",
    "model.remat",
    "model.attention",
    "model.scan_layers",
)
"""Config keys (with everything below them) that may differ when a run goes on: they say how, how long and how often,
not what is learned. A longer `total_steps` stretches a schedule that decays to the end of the run. What a mixture may
become is for the data to say, which goes on where each data set stood."""


def prepare(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Makes the folder and proves that it can be written; ValueError with the reason where it cannot, or where it holds
    something else than a run, which a run would write over."""
    path = pathlib.Path(workdir).absolute()
    if "://" in str(workdir):
        raise ValueError(f"workdir {str(workdir)!r}: mount the bucket and give the mounted folder (gcsfuse does that)")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"workdir {path} cannot be written: {error.strerror}; give a folder you may write to with --workdir"
        ) from error
    if not (path / CHECKPOINTS).exists() and not _is_of_a_run(path / CONFIG_FILE):
        raise ValueError(
            f"workdir {path} holds a {CONFIG_FILE} that no run has written (an export, another project?); give another "
            "--workdir, and to start from weights there `aromni import` them and set init_from"
        )
    return path


def _is_of_a_run(config: pathlib.Path) -> bool:
    """Whether a run may write this file anew."""
    if not config.exists():
        return True
    try:
        found = json.loads(config.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and {"total_steps", "optimizer", "mesh"} <= found.keys()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds the folder against a second run, which would write into the same files; a killed run lets go of it.

    Raises:
      ValueError: another process trains in this folder.
    """
    with open(path / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {path}; wait for it, or give another --workdir"
            ) from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): do not start a second run in it", path, error.strerror)
        yield


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside `path` that takes its place when the block ends well: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def run_id(path: pathlib.Path) -> str:
    """What tells this run from every other, also from an earlier one in a folder of the same name: 16 letters, made
    when they are first asked for."""
    file = path / RUN_ID_FILE
    if not file.exists():
        write_text(file, os.urandom(RUN_ID_BYTES).hex() + "\n")
    return file.read_text(encoding="utf-8").strip()


def first_start(path: pathlib.Path, this_start: float) -> float:
    """`time.time()` of the first start of the run in this folder, which that start writes down by asking here."""
    file = path / FIRST_START
    if not file.exists():
        write_text(file, f"{this_start}\n")
    return float(file.read_text(encoding="utf-8"))


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Objects of a JSON lines file in order; a last line cut short by a crash is left out, [] where there is no file.

    Raises:
      ValueError: a line before the last is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    objects = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is not JSON ({error.msg}); remove the line to go on") from error
    return objects


def truncate_json_lines(path: pathlib.Path, last_step: int) -> int:
    """Keeps the objects whose `step` is at most `last_step`, atomically; returns how many were dropped."""
    if not path.exists():
        return 0
    objects = read_json_lines(path)
    kept = [item for item in objects if item["step"] <= last_step]
    write_text(path, "".join(json.dumps(item) + "\n" for item in kept))
    return len(objects) - len(kept)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"optimizer.learning_rate": 1e-4, ...}: leaves of nested mappings by dotted key, as JSON would read them back."""
    if not isinstance(config, dict) or not config:
        return {prefix: json.loads(json.dumps(config))}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)


def _with_model_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The model by its fields, however the config names it: a size alone, or a size and what differs from it."""
    if "model" not in config:
        return config
    return config | {"model": dataclasses.asdict(resolve_model(config["model"], 1, 0))}


def check_same_config(saved: dict[str, Any], current: dict[str, Any], where: pathlib.Path) -> list[str]:
    """Compares two resolved configs; returns one readable line per difference that is allowed (`MAY_CHANGE`).

    Raises:
      ValueError: the configs differ in what is learned, listing every such key with both values.
    """
    old, new = flatten(_with_model_fields(saved)), flatten(_with_model_fields(current))
    lines = {
        key: f"{key}: {json.dumps(old[key]) if key in old else 'absent'} in the workdir, "
        f"{json.dumps(new[key]) if key in new else 'absent'} now"
        for key in sorted(old.keys() | new.keys())
        if (key in old, old.get(key)) != (key in new, new.get(key))
    }
    refused = [line for key, line in lines.items() if not _may_change(key)]
    if refused:
        raise ValueError(
            f"{where} belongs to a run of another config ({'; '.join(refused)}). Set these keys back, or choose "
            f"another --workdir; to start from these weights there, set init_from={where}"
        )
    return list(lines.values())
