"""SEANet training in parts: the balancer's shares, residual codebooks, and the discriminator against torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from aromni_jax.tokenizers.balancing import BalancedCriterion, BalanceRecipe
from aromni_jax.tokenizers.nets import residual_vq, spectral
from aromni_jax.tokenizers.nets.residual_vq import ResidualCodebooks
from aromni_jax.tokenizers.nets.stft_discriminator import StftDiscriminator, StftDiscriminatorConfig

CONFIG = StftDiscriminatorConfig(channels=3, windows=(64, 32))
RNG = jax.random.key(0, impl="rbg")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def criterion(scale: float = 1.0, update_probability: float = 1.0) -> BalancedCriterion:
    losses = {
        "waveform": lambda made, target: scale * jnp.mean(jnp.abs(made - target)),
        "mel": lambda made, target: jnp.mean(jnp.square(made - target)),
    }
    recipe = BalanceRecipe(learning_rate=1e-2, update_probability=update_probability)
    return BalancedCriterion(losses, StftDiscriminator(CONFIG), recipe)


@pytest.fixture(scope="module")
def state():
    return jax.jit(criterion().initial_state)(RNG, noise(2, 256))


def gradient(state, scale: float, against: bool):
    """(gradient at the decoder's output, metrics, state after) of one step."""
    judge, target = criterion(scale), noise(2, 256, seed=1)

    def loss(decoded):
        total, metrics, after = judge.codec_loss(state, decoded, target, None, None, against)
        return total, (metrics, after)

    found, (metrics, after) = jax.jit(jax.grad(loss, has_aux=True))(noise(2, 256))
    return np.asarray(found), metrics, after


def test_shares_of_the_gradient_do_not_depend_on_the_scale_of_a_loss(state):
    made, target = noise(2, 256), noise(2, 256, seed=1)
    one, metrics, after = gradient(state, 1.0, against=False)
    many, larger, _ = gradient(state, 1000.0, against=False)
    assert float(larger["waveform"]) == pytest.approx(1000 * float(metrics["waveform"]), rel=1e-5)
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-7)
    parts = (np.sign(made - target), made - target)
    unit = [part / np.linalg.norm(part, axis=1).mean() for part in parts]
    # At the first step a norm is its own average, so each loss has exactly its share.
    np.testing.assert_allclose(one, (0.1 * unit[0] + 1.0 * unit[1]) / 1.1, rtol=1e-4, atol=1e-7)
    assert all(float(after["norms"][name][1]) == pytest.approx(1e-3) for name in ("waveform", "mel"))
    assert not np.any(after["norms"]["generator"]), "not at work yet"


def test_the_discriminator_takes_its_share(state):
    plain, _, _ = gradient(state, 1.0, against=False)
    found, metrics, after = gradient(state, 1.0, against=True)
    of_opponent = found - plain * 1.1 / 7.1
    assert 0 < np.linalg.norm(of_opponent, axis=1).mean() <= 6 / 7.1 + 1e-4
    assert {"waveform", "mel", "generator", "features"} == metrics.keys()
    assert all(float(norm[1]) > 0 for norm in after["norms"].values())


def test_the_discriminator_learns_when_it_is_due(state):
    real, made = noise(2, 256), 0.1 * noise(2, 256, seed=1)
    always, never = criterion(), criterion(update_probability=0.0)
    step = jax.jit(lambda state: always.learn(state, real, made, RNG, against=True))
    now, losses = state, []
    for _ in range(20):
        now, metrics = step(now)
        losses.append(float(metrics["discriminator"]))
    assert losses[0] == pytest.approx(2.0, abs=0.5) and losses[-1] < losses[0] - 0.2
    same, _ = jax.jit(lambda state: never.learn(state, real, made, RNG, against=True))(state)
    jax.tree.map(np.testing.assert_array_equal, same["params"], state["params"])
    assert always.learn(state, real, made, RNG, against=False) == (state, {})


def test_residual_codebooks_start_near_the_data_and_sum_up():
    """Every further codebook leaves less over; what training quantizes is what decoding sums."""
    latents_BUE = noise(4, 64, 6)
    quantizer = ResidualCodebooks(num_codes=16, code_dim=6, num_codebooks=3)
    books = quantizer.start(jax.random.key(0), latents_BUE.reshape(-1, 6), jnp.float32(256))
    assert books.embedding_CE.shape == (3, 16, 6) and books.count_C.shape == (3, 16)
    found = jax.jit(quantizer.quantize)(books.embedding_CE, latents_BUE, RNG)
    left = np.square(found.inputs_XE).mean(axis=(1, 2))
    assert left[0] > 1.5 * left[1] > 1.5 * 1.2 * left[2]
    codes_BKU = residual_vq.encode(books.embedding_CE, latents_BUE)
    np.testing.assert_array_equal(found.codes_X.reshape(3, 4, 64), codes_BKU.swapaxes(0, 1))
    np.testing.assert_allclose(found.chosen, residual_vq.decode(books.embedding_CE, codes_BKU), atol=1e-5)
    errors = [np.square(x - t[c]).mean() for x, t, c in zip(found.inputs_XE, books.embedding_CE, found.codes_X)]
    assert float(found.commitment) == pytest.approx(sum(errors), rel=1e-4)


def test_a_batch_goes_through_as_many_codebooks_as_it_drew():
    latents_BUE = noise(2, 10, 4)
    tables_KCE = noise(3, 8, 4, seed=1)
    quantizer = ResidualCodebooks(8, 4, 3, codebooks_per_batch=(1, 3))
    quantize = jax.jit(quantizer.quantize)
    codes_BKU = residual_vq.encode(tables_KCE, latents_BUE)
    expected = [residual_vq.decode(tables_KCE[:count], codes_BKU[:, :count]) for count in (1, 3)]
    seen = [0, 0]
    for i in range(30):
        found = quantize(tables_KCE, latents_BUE, jax.random.key(i))
        seen[int(np.argmin([np.abs(found.chosen - other).max() for other in expected]))] += 1
        assert min(np.abs(found.chosen - other).max() for other in expected) < 1e-5
        assert found.codes_X.shape == (3, 20), "all codebooks go on learning"
    assert min(seen) > 5


def test_dead_codes_of_every_codebook_come_back():
    latents_BUE = noise(8, 40, 4)
    quantizer = ResidualCodebooks(8, 4, 2)
    books = quantizer.start(jax.random.key(0), latents_BUE.reshape(-1, 4), jnp.float32(320))
    far_KCE = books.embedding_CE.at[:, 3].set(100.0)
    books = type(books)(far_KCE, far_KCE * 1e-3, books.count_C.at[:, 3].set(1e-3))
    found = quantizer.quantize(books.embedding_CE, latents_BUE, RNG)
    revived = quantizer.revive(books, found, jax.random.key(1), 0.05)
    assert np.abs(revived.embedding_CE[:, 3]).max() < 10
    after = quantizer.update(revived, quantizer.quantize(revived.embedding_CE, latents_BUE, RNG), 0.9)
    assert np.abs(after.embedding_CE[:, 3]).max() < 10
    assert 4 < float(quantizer.perplexity(found)) <= 7


def test_the_stft_discriminator_equals_torch():
    """The published layers without weight norm, spectra included, in torch with the same weights."""
    x = 0.3 * noise(2, 400)
    net = StftDiscriminator(CONFIG)
    params = jax.jit(net.init)(RNG, x)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * noise(*leaf.shape, seed=leaf.size), params)
    for (score, features), window in zip(net.apply({"params": params}, x), CONFIG.windows):
        hann = torch.hann_window(window)
        spectra = (
            torch.stft(torch.from_numpy(x), window, window // 4, window=hann, center=False, return_complex=True)
            / hann.pow(2).sum().sqrt()
        )
        hidden = torch.stack([spectra.real, spectra.imag], dim=1).transpose(2, 3)
        leaves = params[f"window_{window}"]

        def conv(name, hidden, stride=1, dilation=1, leaves=leaves):
            kernel = np.asarray(leaves[name]["kernel"]).transpose(3, 2, 0, 1)
            padding = ((kernel.shape[2] - 1) * dilation // 2, (kernel.shape[3] - 1) // 2)
            bias = torch.from_numpy(np.array(leaves[name]["bias"]))
            weight = torch.from_numpy(kernel.copy())
            return torch.nn.functional.conv2d(hidden, weight, bias, (1, stride), padding, (dilation, 1))

        expected = []
        layers = [("conv_in", 1, 1), ("conv_0", 2, 1), ("conv_1", 2, 2), ("conv_2", 2, 4), ("conv_out", 1, 1)]
        for name, stride, dilation in layers:
            hidden = torch.nn.functional.leaky_relu(conv(name, hidden, stride, dilation), 0.2)
            expected.append(hidden)
        expected.append(conv("score", hidden))
        assert len(features) == 5 and score.shape[-1] == 1 and expected[-1].std() > 0.05
        for ours, theirs in zip([*features, score], expected):
            np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=2e-5, rtol=1e-4)


def test_spectra_scale_keeps_the_power_of_noise():
    from aromni_jax.tokenizers.nets.stft_discriminator import _spectra

    spectra = np.asarray(_spectra(noise(4, 64_000), 256))
    assert np.square(spectra).sum(-1).mean() == pytest.approx(1.0, rel=0.05)
    assert spectra.shape == (4, 1 + (64_000 - 256) // 64, 129, 2) and spectral.hann_window(256).shape == (256,)
