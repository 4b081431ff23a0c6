"""The keys of pre-tokenizing: those of the config file, of the class and of the README's table are the same."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest

from aromni_jax.config import from_mapping
from configs.pretokenize import get_config
from data_pipelines.pretokenize_config import PretokenizeConfig
from tests.fixtures.source_tree import ROOT


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        is_group = isinstance(value, dict) and key == "augmentation"
        found |= flat(value, f"{prefix}{key}.") if is_group else {prefix + key: value}
    return found


def test_the_config_file_has_every_key_with_the_default_of_the_class() -> None:
    config = from_mapping(PretokenizeConfig, get_config())
    here = {name: getattr(config, name) for name in ("source", "split", "tokenizers", "templates")}
    assert config == PretokenizeConfig(**here)
    assert set(flat(get_config().to_dict())) == set(flat(dataclasses.asdict(config)))


def test_the_table_of_the_readme_states_the_keys_and_their_defaults() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| `--config\.` key \|.*\n\|---.*\n((?:\|.*\n)+)", readme, re.M)
    rows = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \|", table, re.M)
    assert len(rows) == table.count("\n")
    known = flat(get_config().to_dict())
    assert {key: ast.literal_eval(default) for key, default in rows} == {key: known[key] for key, _ in rows}
    older = {"source", "split", "heldout_fraction", "columns", "tasks", "tokenizers", "templates"}
    assert {key for key, _ in rows} == set(known) - older - {
        "records_per_shard",
        "media_batch_size",
        "max_bad_fraction",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"too_long": "split_txt"}, "config key 'too_long': 'split_txt' is not one of .*did you mean 'split_text'"),
        ({"too_long": "split_text"}, "set max_tokens"),
        ({"unconditional_fracton": 0.1}, "did you mean 'unconditional_fraction'"),
        ({"unconditional_fraction": -0.1}, "'unconditional_fraction': must be in 0..1, not -0.1"),
        ({"augmentation": {"noise_fracton": 0.1}}, "did you mean 'augmentation.noise_fraction'"),
        ({"augmentation": {"copies": "beside it"}}, "did you mean 'beside'"),
        ({"augmentation": {"snr_db": 10.0}}, "'augmentation.snr_db': must be a list"),
    ],
)
def test_a_wrong_key_or_value_is_answered_with_the_right_one(changes: dict, message: str) -> None:
    values = {"source": "m", "split": "train", "tokenizers": "t", "templates": "quickstart"}
    with pytest.raises(ValueError, match=message):
        from_mapping(PretokenizeConfig, values | changes)


def test_what_does_not_shape_a_shard_is_not_in_its_settings() -> None:
    config = from_mapping(PretokenizeConfig, get_config())
    settings = config.settings_of_shards
    assert settings["too_long"] == "drop" and settings["augmentation"]["snr_db"] == (0.0, 20.0)
    assert not {"source", "tokenizers", "media_batch_size"} & set(settings)
    assert not {"noise", "room"} & set(settings["augmentation"])
    moved = dataclasses.replace(config, media_batch_size=1, tokenizers="elsewhere", max_bad_fraction=0.5)
    assert moved.settings_of_shards == settings
