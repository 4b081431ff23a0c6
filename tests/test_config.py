"""Typed configs: every wrong key or value is an error that names the key and the remedy."""

import dataclasses
import json

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
        (dict(total_steps=0), "'total_steps': must be at least 1"),
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


def test_configs_are_frozen():
    config = from_mapping(TrainConfig, changed())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
