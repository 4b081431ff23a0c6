"""The compiled train step as a file, so that a pod begins to train without compiling.

The file is one line of JSON and then the bytes of the executable. The line says what shaped the program; a run compares
it with its own before it reads further. Learning rate, schedule, number of steps and weights of the loss are inputs of
the step, so one file serves every value of them.

The bytes hold machine code and a pickle, as jax writes them: load only files you trust as you trust this program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from aromni_jax.config import TrainConfig
from aromni_jax.models.config import ModelConfig
from aromni_jax.train import toolchain
from aromni_jax.train.state import Frozen
from aromni_jax.vocab import JointVocab

FORMAT = "aromni train step 1"

_INPUTS = {
    "optimizer": {"learning_rate", "schedule", "warmup_steps", "final_learning_rate_fraction", "decay_steps"},
    "loss": {"weighting", "task_modality_weights", "transcript_weight"},
}
"""Config keys of these groups that reach the step through its inputs, and so do not shape it."""

_MAX_HEADER_BYTES = 1 << 20


def program_facts(
    model: ModelConfig, train: TrainConfig, mesh: Mesh, vocab: JointVocab, frozen: Frozen
) -> dict[str, Any]:
    """All that the compiled step depends on: {"model.num_layers": 2, "jax": "0.10.2", ...}, values as JSON has them.

    The vocabulary counts without its tokenizers: the step knows where the codes lie, not what they sound like.
    """
    device = mesh.devices.flat[0]
    facts = {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
    names = ("global_batch_size", "sequence_length", "gradient_accumulation_steps", "norm_blend_steps")
    facts |= {name: getattr(train, name) for name in names}
    for group, inputs in _INPUTS.items():
        values = dataclasses.asdict(getattr(train, group))
        facts |= {f"{group}.{name}": value for name, value in values.items() if name not in inputs}
    facts |= {f"mesh.{axis}": size for axis, size in mesh.shape.items()}
    facts |= {
        "mesh.num_slices": train.mesh.num_slices,
        "vocabulary": dataclasses.replace(vocab, tokenizer_fingerprints=()).fingerprint,
        "frozen": {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in sorted(frozen.items())},
        "device_kind": device.device_kind,
        "device_ids": [device.id for device in mesh.devices.flat],
        "cpu": toolchain.cpu_name() if device.platform == "cpu" else None,
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "source": toolchain.source_hash(),
    }
    versions = toolchain.versions()
    if device.platform != "tpu":
        del versions["libtpu"]
    return json.loads(json.dumps(facts | versions))


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """What is compiled inside comes from the compiler and not from jax's compilation cache.

    XLA writes executables for CPUs whole only once: one that was read and is written again lacks code, and running it
    ends with "NOT_FOUND: Function ... not found".
    """
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks for the setting only once.
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def save(file: str | os.PathLike[str], compiled: jax.stages.Compiled, facts: Mapping[str, Any]) -> int:
    """Writes an executable (`compiled_anew`) with the `program_facts` it was made for; returns the number of bytes.

    Raises:
      ValueError: this kind of executable cannot be written, or `file` cannot be.
    """
    try:
        payload = pickle.dumps(serialize_executable.serialize(compiled))
    except Exception as error:
        raise ValueError(
            f"executables for {facts['device_kind']} cannot be saved with jax {facts['jax']} ({_first_line(error)}); "
            "leave --executable out and let each start compile"
        ) from error
    header = {
        "format": FORMAT,
        "facts": dict(facts),
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
    }
    line = json.dumps(header, sort_keys=True).encode() + b"\n"
    path = pathlib.Path(file)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(line + payload)
        part.replace(path)
    except OSError as error:
        raise ValueError(f"the executable cannot be written to {path}: {error.strerror}; give another file") from error
    return len(line) + len(payload)


def open_executable(
    file: str | os.PathLike[str], facts: Mapping[str, Any], mesh: Mesh
) -> Callable[[], Callable[..., Any]]:
    """Compares the file's header with this run's `program_facts`; the result reads the rest and gives the step.

    Raises (also when the result is called):
      ValueError: no such file, a damaged or foreign one, or one made for another program, with every difference.
    """
    path = pathlib.Path(file)
    header = _read_header(path)
    saved = header["facts"]
    absent = "(absent)"
    differences = [
        f"{name}: {_shown(saved.get(name, absent))} in the file, {_shown(facts.get(name, absent))} here"
        for name in sorted({*saved, *facts})
        if saved.get(name, absent) != facts.get(name, absent)
    ]
    if differences:
        raise ValueError(f"executable {path} is of another train step ({'; '.join(differences)}); {_REMEDY}")
    return lambda: _load(path, header, mesh)


_REMEDY = "make it again with `aromni plan --executable=FILE`, or leave --executable out and compile"


def _read_header(path: pathlib.Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            line = stream.readline(_MAX_HEADER_BYTES)
    except OSError as error:
        raise ValueError(f"executable {path} cannot be read: {error.strerror}; {_REMEDY}") from error
    try:
        header = json.loads(line)
        is_ours = header["format"] == FORMAT and isinstance(header["facts"], dict)
    except (ValueError, TypeError, KeyError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} is no saved executable ({FORMAT!r}); {_REMEDY}")
    return header


def _load(path: pathlib.Path, header: dict[str, Any], mesh: Mesh) -> Callable[..., Any]:
    with path.open("rb") as stream:
        stream.readline(_MAX_HEADER_BYTES)
        payload = stream.read()
    if len(payload) != header["payload_bytes"] or hashlib.sha256(payload).hexdigest() != header["payload_sha256"]:
        raise ValueError(
            f"executable {path} is damaged: {len(payload)} bytes of {header['payload_bytes']}, or others than were "
            f"written; {_REMEDY}"
        )
    devices = list(mesh.devices.flat)
    try:
        return serialize_executable.deserialize_and_load(
            *pickle.loads(payload), backend=devices[0].client, execution_devices=devices
        )
    except Exception as error:
        raise ValueError(
            f"executable {path} does not load on these devices ({_first_line(error)}); {_REMEDY}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
