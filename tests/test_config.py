"""Typed configs: every wrong key or value is an error that names the key and the remedy."""

import dataclasses
import json
import typing

import pytest

from aromni_jax.config import TrainConfig, from_mapping, to_json
from configs import pretrain


def changed(**overrides):
    values = pretrain.get_config("debug").to_dict()
    for path, value in overrides.items():
        node = values
        *parents, name = path.split("__")
        for parent in parents:
            node = node[parent]
        node[name] = value
    return values


def test_a_config_round_trips_through_json():
    config = from_mapping(TrainConfig, pretrain.get_config("7b,mesh=v5p-128"))
    assert from_mapping(TrainConfig, json.loads(to_json(config))) == config
    assert config.optimizer.learning_rate == 6e-5


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(total_stepz=3), "'total_stepz': unknown; did you mean 'total_steps'"),
        (dict(optimizer__learning_rat=3.0), "did you mean 'optimizer.learning_rate'"),
        (dict(total_steps="many"), "'total_steps': must be of type int, not 'many'"),
        (dict(total_steps=0), "'total_steps': 0 is not allowed; give a whole number from 1 to"),
        (dict(optimizer__schedule="cosin"), "did you mean 'cosine'"),
        (dict(mesh=3), "'mesh': must be a group of keys"),
        (dict(gradient_accumulation_steps=3), "does not divide global_batch_size 8"),
        (dict(loss__z_loss_weight=True), "must be of type float"),
    ],
)
def test_wrong_configs_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(TrainConfig, changed(**overrides))


def test_a_missing_key_is_named():
    values = changed()
    del values["seed"]
    with pytest.raises(ValueError, match="'seed': missing"):
        from_mapping(TrainConfig, values)


def numbers(cls, prefix=""):
    """Dotted key -> annotation of everything in `cls` that holds a number."""
    found = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found |= numbers(hint, f"{prefix}{name}.")
        elif hint in (int, float) or typing.get_origin(hint) is typing.Annotated:
            found[prefix + name] = hint
    return found


def with_value(key, value):
    return from_mapping(TrainConfig, changed(**{key.replace(".", "__"): value}))


def test_every_number_has_a_range():
    """A key without one would crash somewhere inside a run, where launchers start it again and again."""
    assert len(numbers(TrainConfig)) > 35
    assert [key for key, hint in numbers(TrainConfig).items() if hint in (int, float)] == []


COUNTS = (
    "global_batch_size",
    "sequence_length",
    "gradient_accumulation_steps",
    "log_every_steps",
    "checkpoint.save_every_steps",
    "checkpoint.keep_last",
    "data.epochs",
    "loss.chunk_tokens",
    "mesh.num_slices",
)
ZERO_MEANS_OFF = (
    "eval_every_steps",
    "norm_blend_steps",
    "watchdog_seconds",
    "checkpoint.keep_every_steps",
    "checkpoint.local_every_steps",
    "data.num_workers",
    "data.prefetch_batches",
    "data.evaluation_examples",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.ema_decay",
    "loss.perceptual_weight",
    "loss.z_loss_weight",
    "loss.transcript_weight",
)


@pytest.mark.parametrize("key", COUNTS)
def test_what_counts_begins_at_one(key):
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"'{key}': {value} is not allowed; give a whole number of at least 1$"):
            with_value(key, value)
    with_value(key, 1)


@pytest.mark.parametrize("key", ZERO_MEANS_OFF)
def test_zero_stays_a_way_to_say_off(key):
    with_value(key, 0)
    with pytest.raises(ValueError, match=f"'{key}': -1(.0)? is not allowed; give a .*number"):
        with_value(key, -1)


@pytest.mark.parametrize(
    "key, allowed, refused",
    [
        ("seed", (0, 2**63 - 1), (-1, 2**63)),
        ("total_steps", (1, 2**31 - 1), (0, 2**31)),
        ("watchdog_seconds", (0.5, 1e9), (1e30,)),
        ("mesh.data", (-1, 1, 512), (0, -2)),
        ("mesh.fsdp", (-1, 1, 512), (0, -2)),
        ("mesh.context", (-1, 1, 512), (0, -2)),
        ("mesh.tensor", (-1, 1, 512), (0, -2)),
        ("optimizer.learning_rate", (0.0, 0.5), (-1.0,)),
        ("optimizer.final_learning_rate_fraction", (0.0, 1.0), (-0.1, 1.1)),
        ("optimizer.b1", (0.0, 0.999), (-0.1, 1.0)),
        ("optimizer.b2", (0.0, 0.999), (-0.1, 1.0)),
        ("optimizer.ema_decay", (0.999,), (1.0,)),
        ("optimizer.eps", (1e-12,), (0.0, -1e-8)),
        ("data.temperature", (0.5, 5.0), (0.0, -1.0)),
    ],
)
def test_ends_of_ranges(key, allowed, refused):
    for value in allowed:
        with_value(key, value)
    for value in refused:
        with pytest.raises(ValueError, match=f"'{key}': {value!r} is not allowed; give a ".replace("+", r"\+")):
            with_value(key, value)


@pytest.mark.parametrize("key", [key for key, hint in numbers(TrainConfig).items() if float in typing.get_args(hint)])
def test_no_float_is_nan_or_infinite(key):
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match=f"'{key}': {value} is not allowed; give a finite number"):
            with_value(key, value)


def test_weights_of_tasks_are_named_to_the_last_key():
    with pytest.raises(ValueError, match=r"'loss.task_modality_weights.caption.image': -0.2 is not allowed"):
        with_value("loss.task_modality_weights", {"caption": {"image": -0.2, "text": 1}})


def test_a_missing_number_is_told_with_its_range():
    values = changed()
    del values["checkpoint"]["keep_last"]
    with pytest.raises(ValueError, match="'checkpoint.keep_last': missing; give a whole number of at least 1"):
        from_mapping(TrainConfig, values)


def test_configs_are_frozen():
    config = from_mapping(TrainConfig, changed())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
