"""Training of SEANet codecs: it learns, restarts change nothing, fewer codebooks decode, the result is whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import test_speech

from aromni_jax.interop.encodec_files import load_encodec, save_encodec
from aromni_jax.tokenizers import seanet_training, speech, training
from aromni_jax.tokenizers.balancing import BalanceRecipe
from aromni_jax.tokenizers.nets.stft_discriminator import StftDiscriminatorConfig
from aromni_jax.tokenizers.seanet_training import RECIPES, SEANET_SMALL, SeanetTraining, train_seanet_tokenizer
from aromni_jax.tokenizers.speech import SpeechTokenizer

TINY = dataclasses.replace(
    SEANET_SMALL,
    net=dataclasses.replace(SEANET_SMALL.net, sample_rate_hz=4000, filters=4, ratios=(4, 10), code_dim=8),
    num_codes=16,
    num_codebooks=3,
    codebooks_per_batch=(1, 3),
    crop_codes=16,
    discriminator=StftDiscriminatorConfig(channels=2, windows=(64,)),
    balance=dataclasses.replace(SEANET_SMALL.balance, learning_rate=1e-2, start_fraction=0.75),
    recipe=dataclasses.replace(
        SEANET_SMALL.recipe, total_steps=160, batch_size=4, learning_rate=1e-2, revive_every_steps=10, log_every_steps=4
    ),
)


class Stop(Exception):
    """Raised by a progress function to interrupt a training."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    log, workdir = [], tmp_path_factory.mktemp("seanet")
    return train_seanet_tokenizer(test_speech.sounds(), TINY, 0, workdir, log.append), log, workdir


def test_the_codec_learns(trained):
    tokenizer, log, _ = trained
    assert log[-1]["step"] == log[-1]["total_steps"] == 160
    assert np.mean([entry["mel"] for entry in log[-3:]]) < 0.6 * log[0]["mel"]
    assert np.mean([entry["waveform"] for entry in log[-3:]]) < 0.6 * log[0]["waveform"]
    assert log[-1]["perplexity"] > 3 and log[-1]["codes_used"] > 0.5
    waveforms = test_speech.sounds(4, seed=9)
    pairs = zip(tokenizer.decode(tokenizer.encode(waveforms)), waveforms)
    assert np.isfinite([speech.mel_distance(made[: len(truth)], truth, 4000) for made, truth in pairs]).all()


def test_the_discriminator_starts_late_and_learns(trained):
    _, log, _ = trained
    before, during = log[:30], log[30:]
    assert all("discriminator" not in entry for entry in before)
    assert all({"discriminator", "generator", "features", "score_real"} <= entry.keys() for entry in during)
    losses = [entry["discriminator"] for entry in during]
    assert np.mean(losses[-3:]) < min(losses[0], 2.0)
    assert during[-1]["score_real"] > during[-1]["score_made"]


def test_interrupted_training_ends_with_the_same_tokenizer(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SAVE_EVERY_SECONDS", 0.0)

    def stop(entry):
        if entry["step"] == 132:
            raise Stop

    with pytest.raises(Stop):
        train_seanet_tokenizer(test_speech.sounds(), TINY, 0, tmp_path, stop)
    log = []
    resumed = train_seanet_tokenizer(test_speech.sounds(), TINY, 0, tmp_path, log.append)
    assert resumed.fingerprint == trained[0].fingerprint
    assert log == trained[1][-len(log) :] and 5 < len(log) < 9
    with pytest.raises(ValueError, match="other settings or data .*seed"):
        train_seanet_tokenizer(test_speech.sounds(), TINY, 1, tmp_path)


def test_fewer_codebooks_decode(trained):
    tokenizer, sounds = trained[0], test_speech.sounds(1, seed=5)
    (codes_KU,), (whole_T,) = tokenizer.encode(sounds), tokenizer.decode(tokenizer.encode(sounds))
    first = tokenizer.with_codebooks(1)
    np.testing.assert_array_equal(first.encode(sounds)[0], codes_KU[:1])
    (coarse_T,) = first.decode([codes_KU[:1]])
    assert coarse_T.shape == whole_T.shape and np.isfinite(coarse_T).all() and np.any(coarse_T != whole_T)


def test_the_result_is_saved_streamed_and_exported(trained, tmp_path):
    tokenizer = trained[0]
    tokenizer.save(tmp_path / "ours")
    assert SpeechTokenizer.load(tmp_path / "ours").fingerprint == tokenizer.fingerprint
    save_encodec(tokenizer, tmp_path / "encodec")
    assert load_encodec(tmp_path / "encodec").fingerprint == tokenizer.fingerprint
    (waveform_T,) = test_speech.sounds(1, seed=5)
    (codes_KU,) = tokenizer.encode([waveform_T])
    assert codes_KU.shape == (3, -(-len(waveform_T) // 40))
    np.testing.assert_array_equal(speech._through(tokenizer.stream_encoder(), waveform_T, 170), codes_KU)
    whole_T = tokenizer.decode([codes_KU])[0]
    assert np.abs(whole_T).max() > 1e-3
    np.testing.assert_allclose(speech._through(tokenizer.stream_decoder(), codes_KU, 5), whole_T, atol=1e-5, rtol=0)


def test_the_recipe_beside_the_result_is_the_one_it_was_made_by(trained):
    from aromni_jax.config import from_mapping
    from aromni_jax.tokenizers.storage import read_json

    assert from_mapping(SeanetTraining, read_json(trained[2] / "recipe.json")) == TINY


def test_the_mel_loss_is_nought_for_equals_and_takes_the_windows_that_fit():
    rng = np.random.default_rng(0)
    x = (0.1 * rng.normal(size=(2, 640))).astype(np.float32)
    loss = seanet_training.mel_loss(4000, 640)
    assert float(loss(x, x)) == pytest.approx(1e-3, rel=1e-3), "the root's guard alone"
    assert loss.keywords["windows"] == [32, 64, 128, 256, 512]
    # Half as loud is log 2 away whatever the level, and a distance of magnitudes that grows with the level.
    quiet, loud = float(loss(0.5 * x, x)), float(loss(5 * x, 10 * x))
    assert loud > quiet and quiet - (loud - quiet) / 9 == pytest.approx(np.log(2), rel=1e-3)
    with pytest.raises(ValueError, match="shorter than the smallest window, 32"):
        seanet_training.mel_loss(4000, 31)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(codebooks_per_batch=(1, 4)), r"codebooks_per_batch holds 4; allowed are 1\.\.3"),
        (dict(num_codebooks=0), "must be at least 1"),
        (dict(crop_codes=1), "raise crop_codes or leave that window out"),
        (dict(num_codes=513), "more than the 512 latents"),
        (dict(recipe=dataclasses.replace(TINY.recipe, codebook_update="gradient")), "learn by 'ema' only"),
    ],
)
def test_bad_configs_say_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_bad_parts_of_configs_say_what_is_allowed():
    with pytest.raises(ValueError, match=r"start_fraction 2 must lie in \[0, 1\]"):
        BalanceRecipe(learning_rate=1e-3, start_fraction=2)
    with pytest.raises(ValueError, match="that of waveform or mel above"):
        BalanceRecipe(learning_rate=1e-3, waveform_weight=0, mel_weight=0)
    with pytest.raises(ValueError, match="multiples of 4"):
        StftDiscriminatorConfig(channels=2, windows=(66,))
    with pytest.raises(ValueError, match="two numbers"):
        dataclasses.replace(TINY.recipe, adam_betas=(0.9,))
    with pytest.raises(ValueError, match="no utterances"):
        train_seanet_tokenizer([], TINY, 0, "nowhere")


def test_named_recipes():
    assert RECIPES["encodec"].net.hop == 320 and RECIPES["encodec"].crop_samples == 24_000
    assert RECIPES["seanet-small"].net.causal and RECIPES["seanet-small"].net.start_codes == 1
