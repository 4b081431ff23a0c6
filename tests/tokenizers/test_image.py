"""The image tokenizer: shapes, input rules, independence of batching, training that resumes, files that are checked."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.tokenizers import image, training
from aromni_jax.tokenizers.image import ImageTokenizer, ImageTokenizerConfig, train_image_tokenizer
from aromni_jax.tokenizers.nets import quantize, vqgan

TINY = ImageTokenizerConfig(
    net=vqgan.VQGANConfig(
        image_size=16,
        patch_size=2,
        channels=8,
        multipliers=(1, 1),
        num_res_blocks=0,
        latent_channels=8,
        code_dim=8,
        groups=4,
    ),
    num_codes=32,
    l1_weight=1.0,
    l2_weight=1.0,
    gradient_weight=0.5,
    recipe=dataclasses.replace(image.QUICKSTART.recipe, total_steps=60, batch_size=4, log_every_steps=5),
)


def pictures(count: int = 24, seed: int = 0) -> np.ndarray:
    """Two flat halves of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (count, 2, 3), np.uint8)
    return np.repeat(np.repeat(colours[:, :, None], 8, axis=1), 16, axis=2).reshape(count, 16, 16, 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    log = []
    tokenizer = train_image_tokenizer(pictures(), TINY, 0, tmp_path_factory.mktemp("work"), log.append)
    return tokenizer, log


def test_training_learns_and_reports(trained):
    tokenizer, log = trained
    assert [entry["step"] for entry in log][-1] == 60 and log[-1]["total_steps"] == 60
    assert log[-1]["psnr"] > log[0]["psnr"] + 2
    assert log[-1]["perplexity"] > 3
    codes_BP = tokenizer.encode(pictures())
    assert codes_BP.shape == (24, tokenizer.tokens_per_image) == (24, 16)
    decoded = tokenizer.decode(codes_BP)
    assert decoded.dtype == np.uint8 and decoded.shape == pictures().shape


def test_codes_and_pixels_do_not_depend_on_neighbours(trained):
    tokenizer, _ = trained
    many = np.random.default_rng(1).integers(0, 256, (37, 16, 16, 3), np.uint8)
    codes = tokenizer.encode(many)
    pixels = tokenizer.decode(codes)
    for i in (0, 5, 15, 16, 36):
        np.testing.assert_array_equal(tokenizer.encode(many[i : i + 1])[0], codes[i])
        np.testing.assert_array_equal(tokenizer.decode(codes[i : i + 1])[0], pixels[i])
    order = np.random.default_rng(2).permutation(37)
    np.testing.assert_array_equal(tokenizer.encode(many[order]), codes[order])
    assert tokenizer.encode(many[:0]).shape == (0, 16) and tokenizer.decode(codes[:0]).shape == (0, 16, 16, 3)


def test_interrupted_training_ends_with_the_same_tokenizer(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SAVE_EVERY_SECONDS", 0.0)

    class Stop(Exception):
        pass

    def stop_at(step):
        def progress(entry):
            if entry["step"] == step:
                raise Stop

        return progress

    for step in (5, 40):  # before and after the k-means start
        with pytest.raises(Stop):
            train_image_tokenizer(pictures(), TINY, 0, tmp_path, stop_at(step))
    resumed = train_image_tokenizer(pictures(), TINY, 0, tmp_path)
    assert resumed.fingerprint == trained[0].fingerprint


def test_workdir_of_another_training_is_refused(tmp_path):
    short = dataclasses.replace(TINY, recipe=dataclasses.replace(TINY.recipe, total_steps=4))
    train_image_tokenizer(pictures(), short, 0, tmp_path)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        train_image_tokenizer(pictures(), short, 1, tmp_path)
    with pytest.raises(ValueError, match="pictures"):
        train_image_tokenizer(pictures(seed=5), short, 0, tmp_path)


def test_save_and_load(trained, tmp_path):
    tokenizer, _ = trained
    tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode(pictures()), tokenizer.encode(pictures()))

    path = tmp_path / "params.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="params.safetensors is damaged"):
        ImageTokenizer.load(tmp_path)
    path.write_bytes(content)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_codes": 32', '"num_codes": 64'))
    with pytest.raises(ValueError, match="num_codes: 32 there, 64 here"):
        ImageTokenizer.load(tmp_path)


def test_bad_arguments(trained):
    tokenizer, _ = trained
    with pytest.raises(ValueError, match="use prepare"):
        tokenizer.encode(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"0\.\.31"):
        tokenizer.decode(np.full((1, 16), 32))
    with pytest.raises(ValueError, match="expected .batch, 16."):
        tokenizer.decode(np.zeros((1, 15), np.int32))


def test_published_shape_has_the_published_size():
    config = vqgan.VQGANConfig(512, 1, 128, (1, 1, 2, 2, 4), 2, 256, 256, 32)
    pixels = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
    shapes = jax.eval_shape(vqgan.VQGAN(config).init, jax.random.key(0), pixels)["params"]

    def millions(tree):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree)) / 1e6

    assert config.grid_size == 32
    # The published counts: encoder 27.2, decoder 39.3, and with the two 1x1 convolutions and the codebook 68.7.
    assert round(millions(shapes["encoder"]) - millions(shapes["encoder"]["quant_conv"]), 1) == 27.2
    assert round(millions(shapes["decoder"]) - millions(shapes["decoder"]["post_quant_conv"]), 1) == 39.3
    assert round(millions(shapes) + 8192 * 256 / 1e6, 1) == 68.7


def test_patches_come_back():
    x = jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32).reshape(2, 8, 8, 3)
    np.testing.assert_array_equal(vqgan.depth_to_space(vqgan.space_to_depth(x, 4), 4), x)


def test_kmeans_finds_clusters_and_revival_uses_every_code():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 4)).astype(np.float32) * 5
    samples = jnp.asarray((centres[rng.integers(0, 8, 400)] + 0.05 * rng.normal(size=(400, 4))).astype(np.float32))
    codebook = quantize.kmeans_codebook(jax.random.key(0), samples, jnp.float32(400), 32)
    codes = quantize.nearest_codes(codebook.embedding_CE, samples)
    assert float(jnp.abs(codebook.embedding_CE[codes] - samples).max()) < 0.5
    dead = dataclasses.replace(codebook, count_C=jnp.zeros(32).at[0].set(400.0))
    revived = quantize.revive(dead, samples, jax.random.key(1), below=0.1)
    updated = quantize.update(revived, samples, quantize.nearest_codes(revived.embedding_CE, samples), decay=0.9)
    # A revived code stays where it was put: the next update moves it, and does not undo it.
    distance = jnp.linalg.norm(updated.embedding_CE[1:, None] - samples[None], axis=-1).min(axis=1)
    assert float(distance.max()) < 1.0


def test_nearest_code_is_the_nearest():
    rng = np.random.default_rng(0)
    table_CE, latents_XE = rng.normal(size=(20, 6)).astype(np.float32), rng.normal(size=(50, 6)).astype(np.float32)
    expected = np.linalg.norm(latents_XE[:, None] - table_CE[None], axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(quantize.nearest_codes(table_CE, latents_XE), expected)
    assert float(quantize.perplexity(jnp.arange(20), 20)) == pytest.approx(20, rel=1e-4)
    assert float(quantize.perplexity(jnp.zeros(20, jnp.int32), 20)) == pytest.approx(1, rel=1e-4)
