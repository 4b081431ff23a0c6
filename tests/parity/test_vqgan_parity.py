"""Our VQGAN is the published one: encoder and codes as transformers has them, decoder and every name as torch has."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import torch
import transformers

from aromni_jax.interop.vqgan_files import PublishedVQGAN, published_names, write_vqgan
from aromni_jax.peers.vqgan import Shape, TorchVQGAN, randomize
from aromni_jax.tokenizers.image import CHAMELEON
from aromni_jax.tokenizers.nets.vqgan import VQGAN

TOLERANCE = 1e-4


def transformers_config(shape: Shape) -> transformers.ChameleonVQVAEConfig:
    return transformers.ChameleonVQVAEConfig(
        embed_dim=shape.code_dim,
        num_embeddings=shape.num_codes,
        latent_channels=shape.latent_channels,
        resolution=shape.image_size,
        base_channels=shape.channels,
        channel_multiplier=list(shape.multipliers),
        num_res_blocks=shape.num_res_blocks,
        attn_resolutions=list(shape.attention) or None,
    )


def pictures(shape: Shape, count: int) -> np.ndarray:
    """Noise at every scale, so that latents of one picture differ."""
    rng = np.random.default_rng(0)
    total = np.zeros((count, shape.image_size, shape.image_size, 3))
    for side in (4, 16, shape.image_size):
        noise = rng.normal(size=(count, side, side, 3))
        total += noise.repeat(shape.image_size // side, 1).repeat(shape.image_size // side, 2)
    return np.clip(128 + 50 * total, 0, 255).astype(np.uint8)


def to_torch(pixels_BHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels_BHWC.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


torch.set_num_threads(1)
SHAPES = {
    "chameleon": Shape(),
    "attention": Shape(image_size=32, multipliers=(1, 2, 2), num_res_blocks=1, attention=(16, 8)),
    "published widths": Shape(64, 128, (1, 1, 2, 2, 4), 2, 256, 256, 8192),
    "many codes": Shape(multipliers=(1, 1, 2), num_res_blocks=1, num_codes=3000),
}


@pytest.fixture(scope="module", params=SHAPES)
def case(request, tmp_path_factory):
    """(shape, torch net, our tokenizer read from torch's own file)."""
    shape = SHAPES[request.param]
    net = TorchVQGAN(shape).eval()
    randomize(net, seed=1)
    path = tmp_path_factory.mktemp("files") / "vqgan.ckpt"
    torch.save({"state_dict": {**net.state_dict(), "loss.logvar": torch.zeros(1)}, "global_step": 7}, path)
    return shape, net, PublishedVQGAN(path, shape.image_size).tokenizer()


def test_encoder_and_codes_equal_transformers(case, tmp_path):
    shape, net, ours = case
    theirs = transformers.ChameleonVQVAE(transformers_config(shape)).eval()
    missing, unexpected = theirs.load_state_dict(net.state_dict(), strict=False)
    assert not missing and all(name.startswith("decoder.") for name in unexpected)
    pixels = pictures(shape, 8)
    with torch.no_grad():
        out = theirs.encode(to_torch(pixels), return_dict=True)
        latents = theirs.quant_conv(out.last_hidden_state).permute(0, 2, 3, 1).numpy()
    assert latents.std() > 0.1, "latents without spread would hide a difference"
    encode = jax.jit(lambda p, x: VQGAN(ours.config.net).apply({"params": p}, x, method="encode"))
    np.testing.assert_allclose(
        encode(ours.params, pixels.astype(np.float32) / 127.5 - 1), latents, atol=TOLERANCE, rtol=0
    )
    codes_BP = ours.encode(pixels)
    expected = out.image_tokens.reshape(codes_BP.shape).numpy()
    assert len(np.unique(expected)) > 20
    assert np.mean(codes_BP == expected) >= 0.999


def test_decoder_equals_torch(case):
    shape, net, ours = case
    codes_BP = np.random.default_rng(1).integers(0, shape.num_codes, (3, ours.tokens_per_image))
    with torch.no_grad():
        expected = net.decode(torch.from_numpy(codes_BP)).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.1
    side = ours.config.net.grid_size
    latents = ours.codebook_CE[codes_BP].reshape(3, side, side, -1)
    decode = jax.jit(lambda p, x: VQGAN(ours.config.net).apply({"params": p}, x, method="decode"))
    np.testing.assert_allclose(decode(ours.params, latents), expected, atol=TOLERANCE, rtol=0)
    rounded = np.clip(np.round((expected + 1) * 127.5), 0, 255)
    assert np.abs(ours.decode(codes_BP).astype(int) - rounded).max() <= 1


@pytest.mark.parametrize("case", ["many codes"], indirect=True)
def test_the_comparison_sees_where_norms_and_padding_stand(case):
    """Other groups, or padding on the other side, give other latents: the parity above is not blind."""
    shape, net, ours = case
    pixels = pictures(shape, 1).astype(np.float32) / 127.5 - 1
    latents = VQGAN(ours.config.net).apply({"params": ours.params}, pixels, method="encode")
    other = dataclasses.replace(ours.config.net, groups=16)
    assert np.abs(VQGAN(other).apply({"params": ours.params}, pixels, method="encode") - latents).max() > 0.01
    shifted = VQGAN(ours.config.net).apply({"params": ours.params}, pixels[:, ::-1, ::-1], method="encode")
    assert np.abs(shifted[:, ::-1, ::-1] - latents).max() > 0.01


@pytest.mark.parametrize("case", ["attention"], indirect=True)
def test_transformers_loads_what_we_write(case, tmp_path):
    shape, net, ours = case
    write_vqgan(ours, tmp_path / "out")
    theirs, loading = transformers.ChameleonVQVAE.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert all(name.startswith("decoder.") for name in loading["unexpected_keys"])
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), net.state_dict()[name].numpy())


def test_the_published_shape_has_the_published_names():
    """All tensors of Chameleon's tokenizer, without making one: torch on its meta device, ours abstract."""
    shape = Shape(512, 128, (1, 1, 2, 2, 4), 2, 256, 256, 8192)
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in TorchVQGAN(shape).state_dict().items()}
        encoder = transformers.ChameleonVQVAE(transformers.ChameleonVQVAEConfig())
    ours = dict(published_names(CHAMELEON).values())
    assert ours == expected
    assert set(ours) >= set(encoder.state_dict())
    assert all(ours[name] == tuple(value.shape) for name, value in encoder.state_dict().items())
    assert round(sum(map(math.prod, ours.values())) / 1e6, 1) == 68.7
    assert CHAMELEON.net.grid_size**2 == 1024


def test_an_encoder_of_transformers_is_read_from_a_whole_chameleon(tmp_path):
    """The directory of a `ChameleonForConditionalGeneration`: no decoder, other weights around, bfloat16."""
    shape = Shape(channels=32, multipliers=(1, 2), num_res_blocks=1)
    config = transformers.ChameleonConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vq_config=transformers_config(shape).to_dict(),
        vocabulary_map={},
    )
    model = transformers.ChameleonForConditionalGeneration(config)
    randomize(model.model.vqmodel, seed=2)
    model.save_pretrained(tmp_path / "whole", max_shard_size="100KB")
    opened = PublishedVQGAN(tmp_path / "whole")
    assert opened.config.encoder_only and opened.config.net.image_size == shape.image_size
    ours = opened.tokenizer()
    pixels = pictures(shape, 2)
    with torch.no_grad():
        expected = model.model.vqmodel.encode(to_torch(pixels), return_dict=True).image_tokens
    assert np.mean(ours.encode(pixels).reshape(-1) == expected.numpy()) >= 0.999
    with pytest.raises(ValueError, match=r"vqgan\.ckpt"):
        ours.decode(np.zeros((1, ours.tokens_per_image), np.int32))

    # Shards with nothing of the image tokenizer need not be there.
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith("model.vqmodel.")}
    others = set(index.values()) - needed
    assert others
    for name in others:
        (tmp_path / "whole" / name).unlink()
    assert PublishedVQGAN(tmp_path / "whole").tokenizer().fingerprint == ours.fingerprint

    model.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    rounded = PublishedVQGAN(tmp_path / "bfloat16").tokenizer()
    expected = model.model.vqmodel.quantize.embedding.weight.detach().float().numpy()
    np.testing.assert_array_equal(rounded.codebook_CE, expected)
