"""Files of published VQGANs: what is read can be written and read again; what is wrong with a file is named."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from aromni_jax.interop.torch_files import read_state_dict, write_state_dict
from aromni_jax.interop.vqgan_files import PublishedVQGAN, published_names, write_vqgan
from aromni_jax.tokenizers.image import QUICKSTART, ImageTokenizer
from tests.fixtures.vqgan_tokenizer import CONFIG, random_tokenizer


def tensors(path) -> dict[str, np.ndarray]:
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    return {name: tensor.read() for name, tensor in read_state_dict(path).items()}


@pytest.mark.parametrize("name", ["vqgan.ckpt", "vqgan.safetensors", "directory"])
@pytest.mark.parametrize("encoder_only", [False, True])
def test_load_save_load_gives_identical_tensors(tmp_path, name, encoder_only):
    written = random_tokenizer(dataclasses.replace(CONFIG, encoder_only=encoder_only))
    write_vqgan(written, tmp_path / name)
    # A directory of ours says how large its pictures are.
    size = None if name == "directory" else 16
    opened = PublishedVQGAN(tmp_path / name, size)
    assert opened.config == written.config and not opened.left_out
    loaded = opened.tokenizer()
    assert loaded.fingerprint == written.fingerprint
    again = tmp_path / f"again-{name}"
    write_vqgan(loaded, again)
    first, second = tensors(tmp_path / name), tensors(again)
    assert list(first) == list(second)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert any(key.startswith("decoder.") for key in first) != encoder_only


def test_a_tokenizer_of_published_files_is_saved_as_ours(tmp_path):
    imported = random_tokenizer()
    imported.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert loaded.fingerprint == imported.fingerprint and loaded.config == CONFIG
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    codes_BP = imported.encode(pixels)
    assert codes_BP.shape == (3, 64) == (3, loaded.tokens_per_image)
    np.testing.assert_array_equal(loaded.encode(pixels), codes_BP)
    np.testing.assert_array_equal(loaded.decode(codes_BP), imported.decode(codes_BP))
    # Raw latents and normalised ones make different codes, so the fingerprint keeps them apart.
    other = ImageTokenizer(dataclasses.replace(CONFIG, normalize_latents=True), imported.params, imported.codebook_CE)
    assert other.fingerprint != imported.fingerprint
    assert not np.array_equal(other.encode(pixels), codes_BP)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_wrong_tensor_is_named(tmp_path, suffix):
    path = tmp_path / f"vqgan{suffix}"
    write_vqgan(random_tokenizer(), path)
    good = tensors(path)

    def opened(changes: dict, without: str = "") -> PublishedVQGAN:
        changed = {name: value for name, value in (good | changes).items() if name != without}
        (write_state_dict if suffix == ".ckpt" else lambda p, t: safetensors.numpy.save_file(t, p))(path, changed)
        return PublishedVQGAN(path, 16)

    one = np.zeros(1, np.float32)
    for changes, without, message in (
        ({}, "decoder.up.1.upsample.conv.bias", r"missing decoder\.up\.1\.upsample\.conv\.bias \[64\]"),
        ({}, "encoder.conv_in.weight", r"lacks the tensor encoder\.conv_in\.weight"),
        ({}, "quantize.embedding.weight", r"lacks the tensor quantize\.embedding\.weight"),
        ({"encoder.extra": one}, "", r"unknown encoder\.extra \[1\]"),
        ({"decoder.norm_out.weight": one}, "", r"decoder\.norm_out\.weight has shape \[1\], .* \[32\]"),
        ({"encoder.conv_in.weight": one}, "", r"lacks the tensor encoder\.conv_in\.weight"),
        ({"encoder.down.1.block.0.conv1.weight": np.zeros((33, 3, 3, 3), np.float32)}, "", r"\[32, 33\] channels"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            opened(changes, without)
        assert path.name in str(caught.value)
    with_loss = opened({"loss.discriminator.main.0.weight": one, "loss.logvar": one})
    assert with_loss.left_out == ("loss.discriminator.main.0.weight", "loss.logvar")
    assert with_loss.tokenizer().fingerprint == random_tokenizer().fingerprint


def test_sources_that_are_not_there_or_not_right(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.ckpt"):
        PublishedVQGAN(tmp_path / "none.ckpt", 16)
    write_vqgan(random_tokenizer(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="--image_size"):
        PublishedVQGAN(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="a.safetensors cannot be read"):
        PublishedVQGAN(tmp_path / "a.safetensors", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="lacks model.safetensors"):
        PublishedVQGAN(tmp_path / "empty", 16)
    index = tmp_path / "empty" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match="holds no image tokenizer"):
        PublishedVQGAN(tmp_path / "empty", 16)
    index.write_text("{")
    with pytest.raises(ValueError, match="not an index"):
        PublishedVQGAN(tmp_path / "empty", 16)
    (tmp_path / "empty" / "config.json").write_text("[]")
    index.unlink()
    write_vqgan(random_tokenizer(), tmp_path / "empty" / "model.safetensors")
    with pytest.raises(ValueError, match="not the config"):
        PublishedVQGAN(tmp_path / "empty")


def test_what_has_no_published_form_is_not_written(tmp_path):
    ours = random_tokenizer(dataclasses.replace(QUICKSTART, num_codes=8))
    with pytest.raises(ValueError, match="linear path .*, normalised latents, 8 groups"):
        write_vqgan(ours, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="must end in .safetensors or .ckpt"):
        write_vqgan(random_tokenizer(), tmp_path / "x.zip")
    write_vqgan(random_tokenizer(), tmp_path / "taken")
    with pytest.raises(ValueError, match="not empty"):
        write_vqgan(random_tokenizer(), tmp_path / "taken")
    assert not list(tmp_path.glob("x.*"))


def test_names_are_one_to_one():
    names = [name for name, _ in published_names(CONFIG).values()]
    assert len(set(names)) == len(names)
    assert {"encoder.down.1.attn.0.proj_out.weight", "decoder.up.1.attn.1.norm.bias"} <= set(names)
