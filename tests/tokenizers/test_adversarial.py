"""VQGAN training: a discriminator that learns, its weight as published, restarts that change nothing; plain VQ-VAE."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_image
import torch

from aromni_jax.tokenizers import adversarial, training
from aromni_jax.tokenizers.adversarial import AdversarialRecipe, Adversary
from aromni_jax.tokenizers.image import ImageTokenizer, train_image_tokenizer
from aromni_jax.tokenizers.nets.patchgan import PatchGAN, PatchGANConfig
from aromni_jax.tokenizers.nets.vqgan import VQGAN

GAN = dataclasses.replace(
    test_image.TINY,
    discriminator=PatchGANConfig(channels=8, num_layers=2),
    adversarial=AdversarialRecipe(start_fraction=0.25, weight=0.5, learning_rate=2e-3),
    recipe=dataclasses.replace(test_image.TINY.recipe, total_steps=40, log_every_steps=1),
)


class Stop(Exception):
    """Raised by a progress function to interrupt a training."""


def stop_at(step: int):
    def progress(entry):
        if entry["step"] == step:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    log = []
    tokenizer = train_image_tokenizer(test_image.pictures(), GAN, 0, tmp_path_factory.mktemp("gan"), log.append)
    return tokenizer, log


def test_the_discriminator_starts_late_and_learns(trained):
    _, log = trained
    before, during = log[:10], log[10:]
    assert all("discriminator" not in entry for entry in before)
    assert all("discriminator" in entry for entry in during)
    losses = [entry["discriminator"] for entry in during]
    assert np.mean(losses[-5:]) < losses[0] - 0.05
    assert during[-1]["score_real"] > during[-1]["score_made"]
    weights = np.array([entry["generator_weight"] for entry in during])
    assert np.all(np.isfinite(weights)) and np.all(weights > 0)
    assert all(0 <= entry["codes_used"] <= 1 for entry in log) and log[-1]["codes_used"] > 0.3


def test_the_same_recipe_without_a_discriminator_is_another_tokenizer(trained, tmp_path):
    plain = dataclasses.replace(GAN, discriminator=None, adversarial=None)
    other = train_image_tokenizer(test_image.pictures(), plain, 0, tmp_path)
    assert other.fingerprint != trained[0].fingerprint
    with pytest.raises(ValueError, match="set both, or neither"):
        dataclasses.replace(GAN, adversarial=None)


def test_interrupted_gan_training_ends_with_the_same_tokenizer(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SAVE_EVERY_SECONDS", 0.0)
    for step in (8, 25):  # before and after the discriminator starts
        with pytest.raises(Stop):
            train_image_tokenizer(test_image.pictures(), GAN, 0, tmp_path, stop_at(step))
    log = []
    resumed = train_image_tokenizer(test_image.pictures(), GAN, 0, tmp_path, log.append)
    assert resumed.fingerprint == trained[0].fingerprint
    assert log == trained[1][-len(log) :] and 10 < len(log) < 20


def test_plain_vq_vae_learns_its_codes_by_gradient(tmp_path):
    """Raw latents, no moving averages: codes differ from those a moving average makes, and it learns."""
    recipe = dataclasses.replace(
        test_image.TINY.recipe, codebook_update="gradient", continuous_fraction=0.0, total_steps=60, log_every_steps=5
    )
    config = dataclasses.replace(test_image.TINY, normalize_latents=False, recipe=recipe)
    log = []
    tokenizer = train_image_tokenizer(test_image.pictures(), config, 0, tmp_path / "work", log.append)
    assert log[-1]["psnr"] > log[0]["psnr"] + 2 and log[-1]["perplexity"] > 3
    tokenizer.save(tmp_path / "saved")
    loaded = ImageTokenizer.load(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    codes_BP = loaded.encode(test_image.pictures())
    error = loaded.decode(codes_BP).astype(float) - test_image.pictures()
    # What was saved quantizes as training did: the same quality, up to the difference between batches.
    round_trip_db = 10 * np.log10(255**2 / np.square(error).mean())
    assert round_trip_db == pytest.approx(np.mean([entry["psnr"] for entry in log[-3:]]), abs=1.5)
    moving = dataclasses.replace(config, recipe=dataclasses.replace(recipe, codebook_update="ema"))
    other = train_image_tokenizer(test_image.pictures(), moving, 0, tmp_path / "other")
    assert not np.allclose(other.codebook_CE, tokenizer.codebook_CE, atol=1e-3)


def test_the_weight_is_the_ratio_of_gradients_at_the_last_layer():
    """Against gradients of all parameters, of which the last layer's are picked out."""
    net, discriminator = VQGAN(GAN.net), PatchGAN(GAN.discriminator)
    adversary = Adversary(discriminator, GAN.adversarial, ("decoder", "conv_out", "kernel"))
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.uniform(-1, 1, (3, 16, 16, 3)), jnp.float32)
    key = jax.random.key(0, impl="rbg")  # threefry would take longer to compile than all the rest
    params = jax.jit(net.init)(key, target)["params"]
    opponent = jax.jit(lambda rng: adversarial.initial_state(adversary, rng, target))(key)["params"]
    latents = jnp.asarray(rng.normal(size=(3, 4, 4, 8)), jnp.float32)

    def decode(params):
        return net.apply({"params": params}, latents, method="decode")

    def reconstruction(decoded):
        return jnp.mean(jnp.abs(decoded - target))

    def hinge(decoded):
        return -jnp.mean(discriminator.apply({"params": opponent}, decoded))

    @jax.jit
    def measured(params):
        def weight_of(params):
            return adversarial.generator_loss(adversary, opponent, decode(params), decode, params, reconstruction)[::-1]

        (weight, score), flow = jax.value_and_grad(weight_of, has_aux=True)(params)
        grads = [jax.grad(lambda p, part=part: part(decode(p)))(params) for part in (reconstruction, hinge)]
        norms = [optax.tree.norm(grad["decoder"]["conv_out"]["kernel"]) for grad in grads]
        return score, weight, flow, norms, hinge(decode(params))

    score, weight, flow, (of_reconstruction, of_hinge), expected = measured(params)
    assert float(score) == pytest.approx(float(expected), abs=1e-6)
    assert float(weight) == pytest.approx(0.5 * float(of_reconstruction / (of_hinge + 1e-4)), rel=1e-4)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(flow)), "no gradient through the weight"


def test_the_gradient_penalty_is_the_squared_slope():
    """A linear discriminator w x + b has slope w everywhere: one step with gamma g moves w by -g w more."""

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, kernel_init=nn.initializers.constant(2.0), name="dense")(x.reshape(len(x), -1))

    real, made = jnp.full((4, 2), 0.5), jnp.full((4, 2), -0.5)

    def kernel_after(gamma: float) -> np.ndarray:
        recipe = AdversarialRecipe(start_fraction=0.0, weight=1.0, learning_rate=0.1, gradient_penalty=gamma)
        adversary = Adversary(Linear(), recipe, ())
        state = adversarial.initial_state(adversary, jax.random.key(0), real)
        new, metrics = adversarial.discriminator_step(adversary, state, real, made)
        assert float(metrics["score_real"]) == pytest.approx(2.0) and float(metrics["score_made"]) == pytest.approx(
            -2.0
        )
        return np.asarray(new["params"]["dense"]["kernel"])

    # Both hinges are satisfied, so only the penalty has a gradient; Adam's first step has the length of its rate.
    np.testing.assert_allclose(kernel_after(0.0), 2.0, atol=1e-6)
    np.testing.assert_allclose(kernel_after(1.0), 1.9, atol=1e-3)


def test_patchgan_equals_torch():
    """The published layers with batch statistics, in torch, with the same weights."""
    config = PatchGANConfig(channels=8, num_layers=3)
    x = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    params = PatchGAN(config).init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: leaf * 8 + 0.1 * np.arange(leaf.shape[-1]) / leaf.shape[-1], params)
    layers: list[torch.nn.Module] = []
    widths = [3, 8, 16, 32, 64]
    for i, (before, after) in enumerate(zip(widths[:-1], widths[1:])):
        conv = torch.nn.Conv2d(before, after, 4, stride=2 if i < 3 else 1, padding=1, bias=i == 0)
        conv.weight.data = torch.from_numpy(np.array(params[f"conv_{i}"]["kernel"]).transpose(3, 2, 0, 1).copy())
        layers.append(conv)
        if i:
            norm = torch.nn.BatchNorm2d(after)
            norm.weight.data = torch.from_numpy(np.array(params[f"norm_{i}"]["scale"]))
            norm.bias.data = torch.from_numpy(np.array(params[f"norm_{i}"]["bias"]))
            layers.append(norm)
        else:
            conv.bias.data = torch.from_numpy(np.array(params["conv_0"]["bias"]))
        layers.append(torch.nn.LeakyReLU(0.2))
    score = torch.nn.Conv2d(64, 1, 4, padding=1)
    score.weight.data = torch.from_numpy(np.array(params["score"]["kernel"]).transpose(3, 2, 0, 1).copy())
    score.bias.data = torch.from_numpy(np.array(params["score"]["bias"]))
    with torch.no_grad():
        expected = torch.nn.Sequential(*layers, score)(torch.from_numpy(x).permute(0, 3, 1, 2))
    ours = PatchGAN(config).apply({"params": params}, x)
    assert expected.std() > 0.1
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1).numpy(), atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="at least 1"):
        PatchGANConfig(channels=8, num_layers=0)
