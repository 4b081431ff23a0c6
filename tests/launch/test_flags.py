"""Configs and overrides on the command line."""

import argparse
import os

import pytest

from launch import cli, flags


def load(config, *overrides):
    return flags.load_config(argparse.Namespace(config=config, config_overrides=list(overrides)))


def test_overrides_keep_types(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from the checkout: shipped configs are found by name
    config = load(
        "configs/pretrain.py:7b,weighting=uniform", "--config.optimizer.learning_rate=1e-4", "--config.seed=7"
    )
    assert (config.optimizer.learning_rate, config.seed, config.loss.weighting) == (1e-4, 7, "uniform")
    assert load("configs/pretrain.py:7b", "--config.data.mixture=synthetic").data.mixture == "synthetic"
    mixture = load("configs/pretrain.py:debug", "--config.data.mixture=synthetic", "--config.data.shuffle=false").data
    assert mixture.shuffle is False


def test_every_field_of_the_model_is_a_key():
    """`model = "7b"` names a size, a mapping may start from one: fields that neither writes have those of the size."""
    assert load("configs/pretrain.py:7b", "--config.model.remat=offload").model.to_dict() == {
        "size": "7b",
        "remat": "offload",
    }
    unrolled = load("configs/bench.py:1b", "--config.model.num_layers=2", "--config.model.attention=blocked").model
    assert (unrolled.size, unrolled.num_layers, unrolled.attention) == ("1b", 2, "blocked")


@pytest.mark.parametrize(
    "config, override, message",
    [
        ("configs/pretrian.py", "", "no config file 'configs/pretrian.py'; shipped ones are configs/"),
        ("configs/pretrain.py:8b", "", "unknown size '8b'; sizes: debug"),
        ("configs/pretrain.py:7b,mesh=v9", "", "unknown mesh 'v9'"),
        ("configs/pretrain.py:debug", "--config.optimizer.learning_rat=1", "did you mean 'optimizer.learning_rate'"),
        ("configs/pretrain.py:debug", "--config.total_steps=soon", "must be of type int, not 'soon'"),
        ("configs/pretrain.py:debug", "--config.total_steps", "give a value"),
        ("configs/pretrain.py:debug", "--config.model.num_layers=few", "must be of type int, not 'few'"),
        ("configs/pretrain.py:debug", "--config.model.remmat=full", "did you mean 'model.remat'"),
    ],
)
def test_wrong_configs_say_what_to_do(config, override, message):
    with pytest.raises(ValueError, match=message):
        load(config, *([override] if override else []))


def test_the_command_answers_errors_in_one_line(capsys):
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert cli.main(["train", "--config=configs/pretrain.py:nope", f"--workdir={os.devnull}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("aromni train: error: unknown size 'nope'") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["train", "--config=x", "--workdir=y", "--wrkdir=z"])
    assert "did you mean --workdir" in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(command in listed for command in cli.COMMANDS)
