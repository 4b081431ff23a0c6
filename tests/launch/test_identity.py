"""What a checkpoint must say about its run before it is read."""

from __future__ import annotations

import json
import types

import pytest

from aromni_jax.config import TrainConfig, from_mapping, to_json
from aromni_jax.vocab import JointVocab
from configs.pretrain import get_config
from launch.train import _identity_check

RESOLVED = json.loads(to_json(from_mapping(TrainConfig, get_config("debug"))))
VOCAB = JointVocab.build(text_size=20)


def check(tmp_path, config):
    read = []
    batches = types.SimpleNamespace(restore=read.append)
    facts = types.SimpleNamespace(config=config, vocab_fingerprint=VOCAB.fingerprint, data_position={"step": 3})
    _identity_check(tmp_path, RESOLVED, VOCAB, batches)(facts)  # type: ignore[arg-type]
    return read


def test_a_checkpoint_from_before_a_key_existed_goes_on(tmp_path):
    old = {key: value for key, value in RESOLVED.items() if key != "watchdog_seconds"}
    old["optimizer"] = {key: value for key, value in RESOLVED["optimizer"].items() if key != "master_weights"}
    assert check(tmp_path, old) == [{"step": 3}]


def test_another_value_is_refused(tmp_path):
    other = RESOLVED | {"optimizer": RESOLVED["optimizer"] | {"learning_rate": 0.5}}
    with pytest.raises(ValueError, match="optimizer.learning_rate: 0.5 in the workdir"):
        check(tmp_path, other)


def test_a_key_there_is_no_more_is_shown(tmp_path):
    with pytest.raises(ValueError, match="old_key: 1 in the workdir, absent now"):
        check(tmp_path, RESOLVED | {"old_key": 1})
