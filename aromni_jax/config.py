"""Typed configuration: an ml_collections ConfigDict becomes frozen dataclasses, and every wrong key is an error.

Config files say what to do, these classes say what can be said. An unknown key is answered with the nearest known
one, a missing key with its type, a mistyped value with the type that was expected, a number out of range with the
range. Nothing reads a ConfigDict after this point, so no default hides in a `.get`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")


class Allowed(NamedTuple):
    """Which numbers a key may hold: beside its type, in `Annotated`. `words` completes "give ..."."""

    test: Callable[[Any], bool]
    words: str


Count = Annotated[int, Allowed(lambda n: n >= 1, "a whole number of at least 1")]
CountOrZero = Annotated[int, Allowed(lambda n: n >= 0, "a whole number of at least 0")]
# Devices count steps in 32 bits; random generators take 63, and no sign.
NumSteps = Annotated[int, Allowed(lambda n: 1 <= n < 2**31, "a whole number from 1 to 2**31 - 1")]
Seed = Annotated[int, Allowed(lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1")]
Axis = Annotated[
    int, Allowed(lambda n: n >= 1 or n == -1, "a whole number of at least 1, or -1 for all devices that remain")
]
Positive = Annotated[float, Allowed(lambda x: x > 0, "a number above 0")]
NotNegative = Annotated[float, Allowed(lambda x: x >= 0, "a number of at least 0")]
Fraction = Annotated[float, Allowed(lambda x: 0 <= x <= 1, "a number from 0 to 1")]
Decay = Annotated[float, Allowed(lambda x: 0 <= x < 1, "a number of at least 0 and below 1")]
# Python's timers count nanoseconds in 63 bits, and the watchdog sets one to six times as long and more.
Seconds = Annotated[float, Allowed(lambda x: 0 <= x <= 1e9, "a number from 0 to 1e9")]


def _fail(path: str, message: str) -> typing.NoReturn:
    raise ValueError(f"config key '{path}': {message}")


def _coerce(value: Any, expected: Any, path: str) -> Any:
    """Returns `value` as type `expected`, or raises ValueError naming `path`."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    origin = typing.get_origin(expected)
    if expected is Any:
        return value
    if origin is Annotated:
        kind, allowed = typing.get_args(expected)
        value = _coerce(value, kind, path)
        if not allowed.test(value):
            _fail(path, f"{value!r} is not allowed; give {allowed.words}")
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(expected)
        if value is None and type(None) in options:
            return None
        for option in (o for o in options if o is not type(None)):
            try:
                return _coerce(value, option, path)
            except ValueError as error:
                last = error
        raise last
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            _fail(path, f"must be a group of keys ({getattr(expected, '__name__', expected)}), not {value!r}")
        return from_mapping(typing.cast(type, expected), value, path)
    if origin is typing.Literal:
        allowed = typing.get_args(expected)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), [str(a) for a in allowed], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            _fail(path, f"{value!r} is not one of {', '.join(map(repr, allowed))}{hint}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            _fail(path, f"must be a list, not {value!r}")
        item_type = typing.get_args(expected)[0]
        return tuple(_coerce(item, item_type, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            _fail(path, f"must be a mapping, not {value!r}")
        value_type = typing.get_args(expected)[1]
        return {str(key): _coerce(item, value_type, f"{path}.{key}") for key, item in value.items()}
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        _fail(path, f"must be of type {getattr(expected, '__name__', expected)}, not {value!r}")
    if expected is float and not math.isfinite(value):
        _fail(path, f"{value!r} is not allowed; give a finite number")
    return value


def _describe(expected: Any) -> str:
    if typing.get_origin(expected) is Annotated:
        return typing.get_args(expected)[1].words
    return f"a value of type {expected.__name__ if isinstance(expected, type) else expected}"


def from_mapping(cls: type[T], values: Mapping[str, Any] | ConfigDict, path: str = "") -> T:
    """Builds the frozen dataclass `cls` from nested mappings or a ConfigDict.

    Raises:
      ValueError: unknown key (with the nearest known one), missing key, or a value of another type or out of range.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    dotted = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean '{dotted}{near[0]}'?" if near else f"known keys: {', '.join(fields)}"
            _fail(f"{dotted}{key}", f"unknown; {hint}")
    built = {}
    for name, field in fields.items():
        if name in values:
            built[name] = _coerce(values[name], hints[name], f"{dotted}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            _fail(f"{dotted}{name}", f"missing; give {_describe(hints[name])}")
    return cls(**built)


def to_json(config: Any) -> str:
    """The resolved config as stable, indented JSON: what a workdir's `config.json` holds."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + "\n"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: whatever devices remain. `num_slices` splits `data` over DCN."""

    data: Axis
    fsdp: Axis
    context: Axis
    tensor: Axis
    num_slices: Count = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and schedule. `decay_steps` is how long `wsd` decays at the end; others decay over the whole run.

    `master_weights` keeps a float32 original of the weights where `model.param_dtype` is bfloat16 (4 bytes a weight
    more); without it, steps of less than about a 256th of a weight are rounded away. Evaluations, exports and
    `init_from` take the bfloat16 weights, with which the losses were measured; the moving average is float32.
    `offload` keeps moments, master weights and moving average in the memory of the host, from where each step fetches
    them layer by layer; it may change between two starts of a run.
    """

    name: typing.Literal["adamw", "adafactor", "lion", "muon"]
    learning_rate: NotNegative
    schedule: typing.Literal["cosine", "linear", "wsd", "constant"]
    warmup_steps: CountOrZero
    final_learning_rate_fraction: Fraction
    b1: Decay
    b2: Decay
    eps: Positive
    weight_decay: NotNegative
    clip_norm: NotNegative
    decay_steps: CountOrZero = 0
    ema_decay: Decay = 0.0
    moment_dtype: typing.Literal["float32", "bfloat16"] = "float32"
    master_weights: bool = True
    offload: bool = False

    def __post_init__(self) -> None:
        if self.offload and self.name == "adafactor":
            _fail("optimizer.offload", "works with adamw, lion and muon; set it to False for adafactor")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective.

    `weighting`: `uniform` counts every token once; `response` doubles the response of recognition and captioning
    (the authors' stage 1); `balanced` lowers a modality's weight as its share of tokens grows, then applies
    `task_modality_weights[task][modality]`; `sft` counts responses only, transcripts by `transcript_weight`.
    """

    weighting: typing.Literal["uniform", "response", "balanced", "sft"]
    perceptual_weight: NotNegative
    perceptual_mode: typing.Literal["predict", "official"]
    z_loss_weight: NotNegative
    chunk_tokens: Count
    task_modality_weights: dict[str, dict[str, NotNegative]] = dataclasses.field(default_factory=dict)
    transcript_weight: NotNegative = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where rows come from.

    `mixture` is "synthetic", or names each pre-tokenized data set: {name: {"path": directory, "weight": share}}.
    `weight_unit` says what a share counts, and a share s becomes s ** (1 / `temperature`). When a data set has been
    read once it begins again, or (`when_exhausted`) the run stops as soon as one, without weights all, has been read
    `epochs` times. `duplicates` says whether copies of a record within a data set are read too. All of this may change
    between two starts of a run: every data set goes on where it stood. `verify` reads every shard before the first step
    and compares its SHA-256; without it, what a record's own hash finds is found when the record is read.
    `num_workers` threads read ahead (0: the caller reads), up to `prefetch_batches` batches; neither changes the order.
    `evaluation` names held-out data sets ({name: directory}), of which `evaluation_examples` each (0: all) are measured
    every `eval_every_steps`.
    """

    mixture: str | dict[str, dict[str, Any]]
    weight_unit: typing.Literal["examples", "tokens"]
    num_workers: CountOrZero
    prefetch_batches: CountOrZero
    shuffle: bool = True
    evaluation: dict[str, str] = dataclasses.field(default_factory=dict)
    evaluation_examples: CountOrZero = 512
    temperature: Positive = 1.0
    when_exhausted: typing.Literal["repeat", "stop"] = "repeat"
    epochs: Count = 1
    duplicates: typing.Literal["keep", "drop"] = "keep"
    verify: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep: the newest `keep_last`, and every `keep_every_steps`-th for good (0: none).

    With a `local_directory`, a folder on a disk of every host, each process also writes what its devices hold there,
    every `local_every_steps`. A restart of as many processes on the same mesh reads it where it is newer and whole.
    """

    save_every_steps: Count
    keep_last: Count
    keep_every_steps: CountOrZero
    asynchronous: bool
    local_directory: str = ""
    local_every_steps: CountOrZero = 0

    def __post_init__(self) -> None:
        if bool(self.local_directory) != (self.local_every_steps > 0):
            _fail(
                "checkpoint.local_every_steps",
                f"{self.local_every_steps} with local_directory {self.local_directory!r}; set both, or '' and 0",
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. `model` is a named size, or a mapping of ModelConfig fields (`size`: what it starts from).

    A process in which no step ends for `watchdog_seconds` (0: for ever) writes its stacks down and ends with status 75;
    compiling, restoring, evaluating and saving may take six times as long. A Swin-Norm run that begins with the weights
    of a pre-norm one (`init_from`) computes the same at its first step, and becomes Swin-Norm over `norm_blend_steps`
    steps (0: at once, which gives up what the weights knew).
    """

    seed: Seed
    model: str | dict[str, Any]
    total_steps: NumSteps
    global_batch_size: Count
    sequence_length: Count
    gradient_accumulation_steps: Count
    optimizer: OptimizerConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    loss: LossConfig
    data: DataConfig
    init_from: str
    log_every_steps: Count
    eval_every_steps: CountOrZero
    watchdog_seconds: Seconds = 600.0
    norm_blend_steps: CountOrZero = 0

    def __post_init__(self) -> None:
        if self.global_batch_size % self.gradient_accumulation_steps:
            _fail(
                "gradient_accumulation_steps",
                f"{self.gradient_accumulation_steps} does not divide global_batch_size {self.global_batch_size}",
            )
        if self.norm_blend_steps > self.total_steps:
            _fail(
                "norm_blend_steps", f"must be from 0 to total_steps = {self.total_steps}, not {self.norm_blend_steps}"
            )
        if self.norm_blend_steps and not self.init_from:
            _fail("norm_blend_steps", "blends from the weights of a pre-norm run; name it with init_from, or set 0")
