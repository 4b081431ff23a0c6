"""What a training run needs and how fast it can be, from the compiled train step of a machine that is not here.

`jax.experimental.topologies` describes a TPU pod, libtpu compiles for it, and the executable knows its memory. FLOPs
and traffic are counted by hand: the compiler's own cost model counts the body of a scan once.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from aromni_jax import partitioning
from aromni_jax.config import TrainConfig
from aromni_jax.models.config import ModelConfig, attended_pairs, num_parameters, train_flops
from aromni_jax.train.communication import communication_bytes
from aromni_jax.train.metrics import peak_flops
from aromni_jax.train.state import Frozen
from aromni_jax.train.step import abstract_inputs, make_train_step
from aromni_jax.train.update import HOST
from aromni_jax.vocab import JointVocab

_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device: memory a program may have, its bandwidth, and that of the links inside a slice.

    The memory is what the compiler allows, less than the vendor's pages say, because some is reserved. It is read from
    libtpu 0.0.52's refusals, which give the total and the excess. The program itself, which only `--compile` knows,
    takes 1 MiB of it or a few. The rates are from the vendor's pages.
    """

    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float


_MIB = 1 << 20
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(31_485 * _MIB, 1.228e12, 300e9),
    "TPU v5 lite": Chip(16_126 * _MIB, 0.819e12, 200e9),
    "TPU v5": Chip(98_025 * _MIB, 2.765e12, 600e9),
    "TPU v6 lite": Chip(31_992 * _MIB, 1.640e12, 448e9),
    "TPU7x": Chip(97_012 * _MIB, 3.690e12, 600e9),
}
"""By the beginning of `device_kind`; the longest matching name counts."""

BETWEEN_SLICES_BYTES_PER_SECOND = 3.125e9
"""Data-centre network per chip: 100 Gbit/s for a host of four chips, as an assumption."""


def describe_topology(name: str, num_slices: int = 1) -> Sequence[jax.Device]:
    """Devices of a pod that is not here, such as "v5e:16x16". A v4 chip is one device, as it is in a pod.

    Raises:
      ValueError: libtpu is missing, or knows no such shape.
    """
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # Else libtpu describes two cores a chip, of which no mesh is made.
    try:
        return topologies.get_topology_desc(name, platform="tpu", **options).devices
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"no TPU topology {name!r} ({cause[:200]}); known forms are v4:2x2x2, v5e:16x16, v5p:4x4x4, v6e:16x16 and "
            "tpu7x:2x2x1, and the compiler comes with `pip install libtpu`"
        ) from error


def plan(
    model: ModelConfig,
    train: TrainConfig,
    vocab: JointVocab,
    frozen: Frozen,
    devices: Sequence[jax.Device],
    dump: pathlib.Path | None = None,
    on_compiled: Callable[[jax.stages.Compiled, TrainConfig, Mesh], None] | None = None,
) -> dict[str, Any]:
    """Compiles the train step of a config for `devices` and reports memory and a roofline (keys: CLI contract).

    `frozen` may hold `jax.ShapeDtypeStruct`s. Rows are taken as full: one document of `sequence_length` tokens each.
    With `dump`, the directory to which this process has told XLA to write, it returns as soon as memory is assigned:
    the compiler then still makes code, which is most of its work, in a thread that only the end of the process stops.
    `compile_seconds` lasts until then, or without `dump` until the executable is there (`memory_from` says which).
    `on_compiled` then gets it, with the config it was compiled for and its mesh.

    A batch that the devices do not divide is taken up to the next that they do: `asked_global_batch_size` keeps what
    the config says.

    Raises:
      ValueError: dimensions that the mesh does not divide, or a kind of device that is not in `CHIPS`.
    """
    kind = devices[0].device_kind
    names = [name for name in CHIPS if kind.startswith(name)]
    peak = peak_flops(kind)
    if not names or peak is None:
        raise ValueError(f"nothing is known about {kind!r}; known kinds are {', '.join(CHIPS)}")
    chip = CHIPS[max(names, key=len)]
    mesh = partitioning.make_mesh(train.mesh, devices)
    asked = train.global_batch_size
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * train.gradient_accumulation_steps
    train = dataclasses.replace(train, global_batch_size=math.ceil(asked / ways) * ways)
    started = time.monotonic()
    step: Any = make_train_step(model, train, mesh, vocab, frozen)
    inputs = abstract_inputs(model, train, mesh, frozen)
    lowered = step.lower(*inputs)
    compiled, was_refused = None, False
    try:
        if dump is None:
            compiled = lowered.compile()
            hbm = _compiled_memory(compiled)
        else:
            hbm = _assigned_memory(lowered, inputs, dump)
    except jax.errors.JaxRuntimeError as error:
        # The compiler refuses what does not fit, and says how much it would have needed, to two decimals; its report,
        # which is written before that, has every byte.
        if (said := _refused_bytes(str(error))) is None:
            raise
        was_refused, hbm = True, _hbm(inputs, (_reported_bytes(dump) if dump else None) or said)
    compile_seconds = time.monotonic() - started
    if on_compiled and compiled:
        on_compiled(compiled, train, mesh)
    tokens = train.global_batch_size * train.sequence_length
    pairs = train.global_batch_size * attended_pairs([train.sequence_length])
    flops = train_flops(model, tokens, pairs)
    done = flops + _recomputed_flops(model, tokens, pairs, mesh.size)
    sent = communication_bytes(model, train, mesh)
    seconds = {
        "compute": done / (mesh.size * peak),
        "memory": _memory_traffic(model, train, mesh, hbm["arguments"], hbm["temporaries"]) / chip.hbm_bytes_per_second,
        "interconnect": _interconnect_seconds(sent, mesh.shape["data"], train.mesh.num_slices, chip),
    }
    bound_by = max(seconds, key=lambda name: seconds[name])
    return {
        "devices": mesh.size,
        "device_kind": kind,
        "mesh": dict(mesh.shape),
        "num_slices": train.mesh.num_slices,
        "remat": model.remat,
        "global_batch_size": train.global_batch_size,
        "asked_global_batch_size": asked,
        "sequence_length": train.sequence_length,
        "parameters": num_parameters(model),
        "hbm_bytes": hbm,
        "host_bytes": _host_bytes(model, tokens / mesh.size) + _argument_bytes(inputs, on_host=True),
        "hbm_capacity_bytes": chip.hbm_bytes,
        "fits": not was_refused and hbm["peak"] <= chip.hbm_bytes,
        "model_flops_per_step": flops,
        "step_seconds_roofline": seconds[bound_by],
        "roofline_seconds": seconds,
        "bound_by": bound_by,
        "communication_bytes": {axis: round(count) for axis, count in sent.items()},
        "compile_seconds": compile_seconds,
        "memory_from": "executable" if dump is None else "memory report",
    }


def _compiled_memory(compiled: Any) -> dict[str, int]:
    """Bytes of one device: `arguments` (state and batch), `temporaries`, and `peak`."""
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # Donated state is updated in place: only what is not an alias of an argument adds to the peak.
    added = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    return {"arguments": arguments, "temporaries": temporaries, "peak": arguments + temporaries + added}


def _argument_bytes(inputs: Any, on_host: bool = False) -> int:
    """Bytes of state and batch that one device has in its memory, or (`on_host`) in that of its host."""
    leaves = [x for x in jax.tree.leaves(inputs) if (x.sharding.memory_kind == HOST) == on_host]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _hbm(inputs: Any, total: float) -> dict[str, int]:
    """`total` includes the arguments, in the compiler's reports and in its refusals alike."""
    arguments = _argument_bytes(inputs)
    return {"arguments": arguments, "temporaries": max(round(total) - arguments, 0), "peak": round(total)}


def _refused_bytes(refusal: str) -> float | None:
    """What a refused program would have needed; None where it was refused for something else."""
    if not (found := _TOO_MUCH.search(refusal)):
        return None
    return float(found["total"]) * {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}[found["unit"]]


_TOO_MUCH = re.compile(r"(HLO temporaries \(|memory space hbm\. Used )(?P<total>[\d.]+)(?P<unit>[MGT])")
"""Refused when memory is assigned; or at the end, where all fits but the program itself."""
_TOTAL_BYTES = re.compile(r"Memory Space: default.*\nTotal bytes: (\d+)")


def compile_until(lowered: Any, look: Callable[[], _Found | None]) -> tuple[_Found | None, Any]:
    """(what `look` found among what the compiler writes, None) as soon as it finds something; else (None, executable).

    Where something was found the compiler still works: only `os._exit` ends the process. Raises what the compiler does.
    """
    compiled: list[Any] = []
    failed: list[BaseException] = []

    def compile_it() -> None:
        try:
            compiled.append(lowered.compile())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=compile_it, daemon=True)
    thread.start()
    while thread.is_alive():
        if found := look():
            return found, None
        thread.join(0.5)
    if failed:
        raise failed[0]
    return None, compiled[0]


def _assigned_memory(lowered: Any, inputs: Any, dump: pathlib.Path) -> dict[str, int]:
    """`_compiled_memory` from the compiler's memory report, which it writes long before it has made code."""
    total, compiled = compile_until(lowered, lambda: _reported_bytes(dump))
    return _hbm(inputs, total) if total else _compiled_memory(compiled)


def _reported_bytes(dump: pathlib.Path) -> int | None:
    """The total of the memory report in `dump`; None while there is none."""
    for report in dump.glob("*jit_traced*memory-usage-report.txt"):
        if found := _TOTAL_BYTES.search(report.read_text(encoding="utf-8", errors="replace")):
            return int(found[1])
    return None


def _passes(model: ModelConfig) -> int:
    """How often a weight is read for one microbatch: forward, backward, and forward again where nothing was kept."""
    return 2 if model.remat in ("none", "dots") else 3


def _recomputed_flops(model: ModelConfig, num_tokens: float, num_pairs: float, num_devices: int) -> float:
    """FLOPs of what the backward pass computes again: what the policy does not keep, and the logits where several
    devices hold the table (one takes the gradient at once)."""
    c = model
    logits = 2.0 * c.vocab_size * c.d_model * num_tokens if num_devices > 1 else 0.0
    projections = 4.0 * c.num_layers * c.d_model * (c.num_heads + c.num_kv_heads) * c.head_dim * num_tokens
    mlp = 6.0 * c.num_layers * c.d_model * c.mlp_dim * num_tokens
    scores = 4.0 * c.num_layers * c.num_heads * c.head_dim * num_pairs
    if c.remat in ("none", "dots"):
        return logits
    if c.remat == "attention":
        return logits + projections + mlp
    return logits + mlp + projections + scores


def _host_bytes(model: ModelConfig, num_tokens: float) -> int:
    """Memory of the host that one device needs for the inputs of all layers; moving them is taken to be hidden."""
    if model.remat != "offload":
        return 0
    return round(model.num_layers * num_tokens * model.d_model * jax.numpy.dtype(model.dtype).itemsize)


def _memory_traffic(model: ModelConfig, train: TrainConfig, mesh: Mesh, arguments: int, temporaries: int) -> float:
    """Bytes a device moves to and from its memory in a step, at least: the state read and written, temporaries written
    and read, and the weights of its tensor share read in every pass of every microbatch."""
    weights = num_parameters(model) / mesh.shape["tensor"] * jax.numpy.dtype(model.dtype).itemsize
    return 2.0 * (arguments + temporaries) + train.gradient_accumulation_steps * _passes(model) * weights


def _interconnect_seconds(sent: dict[str, float], data: int, num_slices: int, chip: Chip) -> float:
    """Seconds a device spends sending in a step if nothing overlaps.

    With slices, a sum over data is scattered within each, goes between them in parts, and is gathered within each.
    """
    slow = sent["data"] * (num_slices - 1) / max(data - 1, 1)
    return (sum(sent.values()) - slow) / chip.link_bytes_per_second + slow / BETWEEN_SLICES_BYTES_PER_SECOND
