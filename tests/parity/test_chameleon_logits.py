"""Logits of an export, computed by transformers, equal ours: the reference is `ChameleonForConditionalGeneration`."""

from __future__ import annotations

import argparse

import jax
import numpy as np
import pytest
import torch
import transformers

from aromni_jax.config import TrainConfig, from_mapping
from aromni_jax.interop.chameleon import ChameleonDirectory, Provenance, TreeSource, export_chameleon
from launch.export import export_workdir
from launch.flags import load_config
from launch.import_ import import_directory
from launch.train import run_training
from tests.fixtures.logits import our_logits
from tests.fixtures.published_weights import logits
from tests.fixtures.small_models import random_params, small_model, small_vocab

TOLERANCE = 1e-4
SHAPES = {
    "swin, grouped": dict(norm_position="swin", num_kv_heads=2),
    "swin, all heads": dict(norm_position="swin", num_kv_heads=4),
    "pre, grouped": dict(norm_position="pre", num_kv_heads=2),
    "pre, all heads": dict(norm_position="pre", num_kv_heads=4),
    "long wavelengths, loose eps": dict(rope_theta=500_000.0, norm_eps=1e-3),
}


def token_ids(rows: int = 2, length: int = 21) -> np.ndarray:
    """Every modality and control token of the vocabulary, in no order."""
    return np.random.default_rng(3).integers(0, small_vocab().size, (rows, length)).astype(np.int32)


def their_model(directory, dtype=torch.float32):
    model, loading = transformers.ChameleonForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, output_loading_info=True
    )
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert all(name.startswith("model.vqmodel.") for name in loading["missing_keys"])
    return model.eval()


def export(model, params, directory, dtype="float32", **options):
    provenance = Provenance(step=1, max_positions=64)
    export_chameleon(TreeSource(params), model, small_vocab(), directory, provenance=provenance, dtype=dtype, **options)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(tmp_path, name):
    model = small_model(**SHAPES[name])
    params = random_params(model)
    export(model, params, tmp_path / "out", max_shard_bytes=40_000)
    ids_BL = token_ids()
    expected = logits(their_model(tmp_path / "out"), ids_BL)
    assert expected.std() > 0.1, "logits without spread would hide a difference"
    np.testing.assert_allclose(our_logits(model, params, ids_BL), expected, atol=TOLERANCE, rtol=0)


def test_the_comparison_sees_a_norm_in_the_wrong_place(tmp_path):
    """The same tensors under the other norm position give other logits: the parity above is not blind."""
    model = small_model(norm_position="swin")
    params = random_params(model)
    export(model, params, tmp_path / "out")
    expected = logits(their_model(tmp_path / "out"), token_ids())
    assert np.abs(our_logits(small_model(norm_position="pre"), params, token_ids()) - expected).max() > 100 * TOLERANCE


def test_class_logits_are_not_masked(tmp_path):
    """With the empty vocabulary map of an export, `model(...).logits` holds image logits too."""
    model = small_model()
    params = random_params(model)
    export(model, params, tmp_path / "out")
    with torch.no_grad():
        found = their_model(tmp_path / "out")(input_ids=torch.from_numpy(token_ids().astype(np.int64))).logits
    np.testing.assert_allclose(found.numpy(), our_logits(model, params, token_ids()), atol=TOLERANCE, rtol=0)


def test_bfloat16_export_holds_the_rounded_weights(tmp_path):
    """Computed in float32 on both sides, so that only the stored values are compared."""
    model = small_model()
    export(model, random_params(model), tmp_path / "out", dtype="bfloat16")
    opened = ChameleonDirectory(tmp_path / "out")
    assert opened.dtype == "bfloat16"
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), opened.params())
    expected = logits(their_model(tmp_path / "out"), token_ids())
    np.testing.assert_allclose(our_logits(model, rounded, token_ids()), expected, atol=TOLERANCE, rtol=0)


def test_greedy_continuation_equals_transformers(tmp_path):
    """Twenty tokens of their cached generation are the argmax of our full forward pass."""
    model = small_model()
    params = random_params(model)
    export(model, params, tmp_path / "out")
    theirs = their_model(tmp_path / "out")
    theirs.generation_config.eos_token_id = None
    prompt = token_ids(rows=1, length=5)
    with torch.no_grad():
        out = theirs.generate(torch.from_numpy(prompt.astype(np.int64)), max_new_tokens=20, do_sample=False)
    ids_BL = out.numpy().astype(np.int32)
    predicted = our_logits(model, params, ids_BL).argmax(-1)
    np.testing.assert_array_equal(predicted[:, 4:-1], ids_BL[:, 5:])


@pytest.mark.slow
@pytest.mark.parametrize(("norm_position", "num_kv_heads"), [("swin", 2), ("pre", 4)])
def test_logits_equal_transformers_after_training(tmp_path, norm_position, num_kv_heads):
    """The whole road: train, save, export the workdir, import it again; both exports are one model to transformers."""
    config = load_config(argparse.Namespace(config="configs/pretrain.py:debug", config_overrides=[]))
    with config.unlocked(), config.ignore_type():
        config.model = dict(size="debug", norm_position=norm_position, num_kv_heads=num_kv_heads)
        config.total_steps = 6
        config.optimizer.ema_decay = 0.5
    result = run_training(from_mapping(TrainConfig, config), tmp_path / "run", with_progress=False)
    export_workdir(tmp_path / "run", tmp_path / "out", dtype="float32")
    ids_BL = np.random.default_rng(0).integers(0, result.vocab.size, (2, 33)).astype(np.int32)
    params = jax.device_get(result.state.params)
    assert np.abs(params["layers"]["mlp_norm"]["scale"] - 1).max() > 1e-4, "training moved the norms"
    expected = logits(their_model(tmp_path / "out"), ids_BL)
    np.testing.assert_allclose(our_logits(result.model, params, ids_BL), expected, atol=TOLERANCE, rtol=0)

    import_directory(tmp_path / "out", tmp_path / "imported")
    export_workdir(tmp_path / "imported", tmp_path / "again", dtype="float32")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / d).glob("*.*")} for d in ("out", "again"))
    assert first == second
