"""A folder of something else is no folder for a run."""

from __future__ import annotations

import json

import pytest

from aromni_jax.config import TrainConfig, from_mapping, to_json
from aromni_jax.train import workdir as workdirs
from configs.pretrain import get_config


@pytest.mark.parametrize("content", [json.dumps({"architectures": ["Chameleon"]}), "not JSON", "[]"])
def test_a_run_writes_over_nobodys_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="holds a config.json that no run has written .*--workdir.*init_from"):
        workdirs.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == content


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(tmp_path):
    (tmp_path / "config.json").write_text(to_json(from_mapping(TrainConfig, get_config("debug"))))
    assert workdirs.prepare(tmp_path) == tmp_path
