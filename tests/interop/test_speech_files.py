"""Published speech codecs: read, written and read again without a changed bit; what does not fit is named."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from aromni_jax.interop.encodec_files import load_encodec, save_encodec
from aromni_jax.interop.wavtokenizer_files import load_wavtokenizer, save_wavtokenizer
from aromni_jax.peers.wavtokenizer import NUM_CODES, SMALL, WavTokenizerTorch
from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.speech import SpeechTokenizer


def tensors_of(tokenizer: SpeechTokenizer) -> dict[str, np.ndarray]:
    return storage.flatten(tokenizer.params) | {"codebook": tokenizer.codebook}


def assert_equal(one: SpeechTokenizer, other: SpeechTokenizer) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert one.fingerprint == other.fingerprint


@pytest.fixture(scope="module")
def encodec(tmp_path_factory):
    """A directory as `save_pretrained` writes it."""
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        num_filters=2, hidden_size=4, codebook_size=16, upsampling_ratios=[4, 2], target_bandwidths=[24.0, 144.0]
    )
    model = transformers.EncodecModel(config)
    with torch.no_grad():
        for layer in model.quantizer.layers:
            layer.codebook.embed.normal_()
    directory = tmp_path_factory.mktemp("encodec") / "model"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def wavtokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("wavtokenizer") / "model.ckpt"
    WavTokenizerTorch().save(path)
    return path


def test_encodec_round_trip(encodec, tmp_path):
    tokenizer = load_encodec(encodec)
    assert (tokenizer.num_codebooks, tokenizer.num_codes, tokenizer.hop) == (12, 16, 8)
    save_encodec(tokenizer, tmp_path / "again")
    assert_equal(tokenizer, load_encodec(tmp_path / "again"))
    theirs, loading = transformers.EncodecModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert theirs.config.num_quantizers == 12
    few = load_encodec(encodec, num_codebooks=5)
    save_encodec(few, tmp_path / "few")
    assert_equal(few, load_encodec(tmp_path / "few"))


def test_both_namings_of_weight_norm_and_none(encodec, tmp_path):
    tokenizer = load_encodec(encodec)
    tensors = safetensors.numpy.load_file(encodec / "model.safetensors")
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in tensors.items()
    }
    assert old.keys() != tensors.keys()
    (tmp_path / "config.json").write_text((encodec / "config.json").read_text())
    safetensors.numpy.save_file(old, tmp_path / "model.safetensors")
    assert_equal(tokenizer, load_encodec(tmp_path))
    folded = {name: value for name, value in old.items() if not name.endswith(("weight_g", "weight_v"))}
    with torch.no_grad():
        model = transformers.EncodecModel.from_pretrained(encodec)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
                folded[f"{name}.weight"] = module.weight.numpy()
    safetensors.numpy.save_file(folded, tmp_path / "model.safetensors")
    plain, normed = tensors_of(load_encodec(tmp_path)), tensors_of(tokenizer)
    for name in normed:
        np.testing.assert_allclose(plain[name], normed[name], rtol=1e-5, atol=1e-6, err_msg=name)


def rewrite(source, directory, change) -> None:
    directory.mkdir(exist_ok=True)
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text((source / "config.json").read_text())


def test_tensors_that_do_not_fit_are_named(encodec, tmp_path):
    lstm = "encoder.layers.7.lstm.weight_hh_l1"
    rewrite(encodec, tmp_path, lambda tensors: tensors.pop(lstm))
    with pytest.raises(ValueError, match=f"lacks the tensor '{lstm}' of shape .32, 8."):
        load_encodec(tmp_path)
    rewrite(encodec, tmp_path, lambda tensors: tensors.update({"encoder.extra": np.zeros(1, np.float32)}))
    with pytest.raises(ValueError, match=r"unknown tensor 'encoder.extra' \(1 unknown\)"):
        load_encodec(tmp_path)
    embed = "quantizer.layers.3.codebook.embed"
    rewrite(encodec, tmp_path, lambda tensors: tensors.update({embed: np.zeros((16, 5), np.float32)}))
    with pytest.raises(ValueError, match=f"tensor '{embed}' has shape .16, 5., expected .16, 4."):
        load_encodec(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_encodec(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist"):
        load_encodec(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("audio_channels", 2, "audio_channels is 2; stereo models are not read"),
        ("normalize", True, "normalize is True"),
        ("model_type", "dac", "model_type is 'dac', expected 'encodec'"),
        ("norm_type", "time_group_norm", "models with another norm"),
        ("codebook_dim", 3, "codebook_dim 3 must equal hidden_size 4"),
        ("target_bandwidths", [0.1], "leave no codebook"),
        ("num_filters", None, "lacks the key 'num_filters'"),
    ],
)
def test_other_kinds_of_encodec_are_refused(encodec, tmp_path, key, value, message):
    raw = json.loads((encodec / "config.json").read_text())
    raw[key] = value
    if value is None:
        del raw[key]
    rewrite(encodec, tmp_path, lambda tensors: None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        load_encodec(tmp_path)


def test_saved_in_our_form(encodec, wavtokenizer, tmp_path):
    """Every family saves and loads through the one interface; its config.json says which it is."""
    for name, tokenizer in (("a", load_encodec(encodec, 3)), ("b", load_wavtokenizer(wavtokenizer, SMALL))):
        tokenizer.save(tmp_path / name)
        assert_equal(tokenizer, SpeechTokenizer.load(tmp_path / name))
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert raw["family"] == "seanet"
    (tmp_path / "a" / "config.json").write_text(json.dumps(raw | {"family": "opus"}))
    with pytest.raises(ValueError, match="family 'opus' is not one of seanet, wavtokenizer"):
        SpeechTokenizer.load(tmp_path / "a")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_wavtokenizer_round_trip(wavtokenizer, tmp_path, suffix):
    tokenizer = load_wavtokenizer(wavtokenizer, SMALL)
    assert tokenizer.num_codes == NUM_CODES and tokenizer.hop == 600
    path = tmp_path / f"again{suffix}"
    save_wavtokenizer(tokenizer, path)
    assert_equal(tokenizer, load_wavtokenizer(path, SMALL))
    written = (
        torch.load(path, weights_only=True)["state_dict"] if suffix == ".ckpt" else safetensors.numpy.load_file(path)
    )
    published = WavTokenizerTorch().published_tensors()
    unused = ("feature_extractor.encodec.decoder.", "feature_extractor.encodec.quantizer.vq.layers.0._codebook.")
    for name, value in published.items():
        if not name.startswith(unused[0]):
            assert tuple(written[name].shape) == tuple(value.shape), name
        # A norm and a direction, and two biases, can be written in many ways that mean the same.
        if not name.startswith(unused) and "weight_" not in name and "lstm.bias" not in name:
            np.testing.assert_allclose(np.asarray(written[name]), value.numpy(), rtol=0, atol=1e-6, err_msg=name)


def test_wavtokenizer_that_does_not_fit_is_named(wavtokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"'backbone.convnext.3.dwconv.weight' of shape .64, 1, 7."):
        load_wavtokenizer(wavtokenizer, dataclasses.replace(SMALL, num_layers=4))
    with pytest.raises(ValueError, match="unknown tensor 'backbone.convnext.2"):
        load_wavtokenizer(wavtokenizer, dataclasses.replace(SMALL, num_layers=2))
    with pytest.raises(ValueError, match=r"has shape .96, 64., expected .97, 64."):
        load_wavtokenizer(wavtokenizer, dataclasses.replace(SMALL, mlp_dim=97))
    with pytest.raises(FileNotFoundError, match="none.ckpt does not exist"):
        load_wavtokenizer(tmp_path / "none.ckpt")
    (tmp_path / "fake.ckpt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(ValueError, match="fake.ckpt is not a zip file"):
        load_wavtokenizer(tmp_path / "fake.ckpt")
    with pytest.raises(ValueError, match="must end in .ckpt or .safetensors"):
        save_wavtokenizer(load_wavtokenizer(wavtokenizer, SMALL), tmp_path / "x.bin")


def test_families_are_not_written_as_one_another(encodec, wavtokenizer, tmp_path):
    with pytest.raises(ValueError, match="only SEANet codecs"):
        save_encodec(load_wavtokenizer(wavtokenizer, SMALL), tmp_path / "x")
    with pytest.raises(ValueError, match="only a WavTokenizer"):
        save_wavtokenizer(load_encodec(encodec), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="single codebook"):
        load_wavtokenizer(wavtokenizer, SMALL).with_codebooks(1)
    with pytest.raises(ValueError, match=r"num_codebooks must lie in 1\.\.12, not 13"):
        load_encodec(encodec, num_codebooks=13)
