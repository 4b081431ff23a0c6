"""Every published layout of Chameleon weights gives the logits that transformers computes with them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from aromni_jax.interop.chameleon import ChameleonDirectory
from tests.fixtures.logits import our_logits
from tests.fixtures.published_weights import (
    NORMS,
    chameleon,
    interleaved,
    logits,
    weights,
    write_config,
    write_meta,
    write_torch,
)
from tests.fixtures.small_models import small_vocab

TOLERANCE = 1e-4
IDS = np.random.default_rng(3).integers(0, small_vocab().size, (2, 21)).astype(np.int32)


def assert_same_function(directory, model, **options) -> ChameleonDirectory:
    opened = ChameleonDirectory(directory, small_vocab(), **options)
    expected = logits(model, IDS)
    assert expected.std() > 0.1, "logits without spread would hide a difference"
    np.testing.assert_allclose(our_logits(opened.model, opened.params(), IDS), expected, atol=TOLERANCE, rtol=0)
    return opened


@pytest.mark.parametrize("swin_norm", [False, True])
@pytest.mark.parametrize("num_files", [1, 3])
def test_torch_files(tmp_path, num_files, swin_norm):
    model = chameleon(small_vocab().size, swin_norm=swin_norm)
    write_config(tmp_path, model)
    write_torch(tmp_path, model.state_dict(), num_files)
    opened = assert_same_function(tmp_path, model)
    assert opened.model.norm_position == ("swin" if swin_norm else "pre")
    assert (opened.rotary, opened.dtype) == ("half_split", "float32")
    assert opened.left_out and all(name.startswith("model.vqmodel.") for name in opened.left_out)


@pytest.mark.parametrize("num_files", [1, 2])
def test_what_save_pretrained_writes(tmp_path, num_files):
    model = chameleon(small_vocab().size)
    model.save_pretrained(tmp_path, max_shard_size="5GB" if num_files == 1 else "60KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (num_files > 1)
    assert_same_function(tmp_path, model)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "module." + name,
        lambda name: name.replace("model.", "model.language_model.", 1),
        lambda name: "language_model." + name,
    ],
)
def test_other_names_of_the_same_tensors(tmp_path, rename):
    model = chameleon(small_vocab().size)
    write_config(tmp_path, model)
    tensors = {rename(name): value for name, value in weights(model).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_torch(tmp_path, tensors)
    assert_same_function(tmp_path, model)


def test_aromni_and_trained_anole_hold_one_norm_vector_and_interleaved_rows(tmp_path):
    model = chameleon(small_vocab().size, ranks=1, swin_norm=True)
    write_config(tmp_path, model, qk_layernorm=True, model_parallel_size="removed")
    tensors = {
        name: value[0].clone() if any(norm in name for norm in NORMS) else value
        for name, value in interleaved(model).items()
    }
    write_torch(tmp_path, tensors, 2)
    assert assert_same_function(tmp_path, model).rotary == "interleaved"


@pytest.mark.parametrize("order", ["half_split", "interleaved"])
def test_a_vector_per_head_from_before_the_release_needs_to_be_told(tmp_path, order):
    model = chameleon(small_vocab().size)
    write_config(tmp_path, model, qk_layernorm=True)
    tensors = weights(model) if order == "half_split" else interleaved(model)
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="say with --rotary"):
        ChameleonDirectory(tmp_path, small_vocab())
    assert_same_function(tmp_path, model, rotary=order)


@pytest.mark.parametrize("swin_norm", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_consolidated_files_of_meta(tmp_path, ranks, swin_norm):
    model = chameleon(small_vocab().size, ranks=ranks, swin_norm=swin_norm)
    write_meta(tmp_path, model, ranks)
    opened = assert_same_function(tmp_path, model)
    assert opened.layout == f"Meta's, {ranks} file(s)" and opened.rotary == "interleaved"
    assert opened.model.norm_position == ("swin" if swin_norm else "pre")
    assert opened.provenance.max_positions == 4096


def test_consolidated_file_of_anole(tmp_path):
    """Anole's script leaves `rope.freqs` in the file as None and writes consolidated.pth."""
    model = chameleon(small_vocab().size, ranks=1, num_key_value_heads=4)
    write_meta(tmp_path, model, anole=True)
    assert_same_function(tmp_path, model)


def test_consolidated_bfloat16_stays_bfloat16(tmp_path):
    """And two ranks give what one gives, bit for bit."""
    model = chameleon(small_vocab().size, ranks=1)
    for ranks in (1, 2):
        write_meta(tmp_path / str(ranks), model, ranks, dtype=torch.bfloat16)
    one, two = (ChameleonDirectory(tmp_path / ranks, small_vocab()) for ranks in ("1", "2"))
    assert one.dtype == two.dtype == "bfloat16"
    for path in one.shapes():
        read = one.read(path, None)
        assert read.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read, two.read(path, None), err_msg=path)


def test_the_comparison_sees_rows_in_the_wrong_order(tmp_path):
    """Read as half-split what is interleaved: the parity above is not blind."""
    model = chameleon(small_vocab().size)
    write_config(tmp_path, model)
    write_torch(tmp_path, interleaved(model))
    opened = ChameleonDirectory(tmp_path, small_vocab())
    difference = our_logits(opened.model, opened.params(), IDS) - logits(model, IDS)
    assert np.abs(difference).max() > 100 * TOLERANCE
