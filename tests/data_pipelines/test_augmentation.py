"""Noise and rooms: ratios, decay and level measured on the sound; and who hears them: the model, never its answers."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from scipy.signal import welch

from data_pipelines import augmentation
from data_pipelines.augmentation import Augmentation, AugmentationConfig, Treatment
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from tests.fixtures.data_fakes import config_for, fake_bundle, write_corpus, write_wav

RATE_HZ = 16_000


def speech(seconds: float = 2.0, loudness: float = 0.2, seed: int = 0) -> np.ndarray:
    """Bursts of a voiced sound with pauses of digital silence between: active half of the time."""
    time_T = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    voice_T = sum(np.sin(2 * np.pi * 140 * n * time_T + n * seed) / n for n in range(1, 12))
    return (loudness * voice_T * (time_T % 0.5 < 0.25)).astype(np.float32)


def treatment(**changes: Any) -> Treatment:
    return Treatment(**{"noise": "", "snr_db": 0.0, "room": "", "rt60_seconds": 0.4, "seed": 7, **changes})


def wav(path: pathlib.Path, samples: np.ndarray) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_wav(path, samples.astype(np.float32))
    return path


@pytest.mark.parametrize("noise", ["white", "pink", "brown", "street/car.wav", "short.wav"])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 7.3, 30.0])
def test_the_ratio_is_what_was_asked_to_a_tenth_of_a_decibel(tmp_path: pathlib.Path, noise: str, snr_db: float) -> None:
    rng = np.random.default_rng(1)
    wav(tmp_path / "street" / "car.wav", 0.1 * rng.standard_normal(5 * RATE_HZ).cumsum() / 100)
    wav(tmp_path / "short.wav", rng.uniform(-0.5, 0.5, RATE_HZ // 3))
    folder = str(tmp_path) if noise.endswith(".wav") else ""
    config = AugmentationConfig(noise_fraction=1.0, noise=folder)
    clean_T = speech(loudness=0.1)
    treated = Augmentation(config, seed=0).apply(clean_T, RATE_HZ, treatment(noise=noise, snr_db=snr_db), 0)
    assert treated.waveform_T.dtype == np.float32 and treated.waveform_T.shape == clean_T.shape
    lowered = 10 ** (-treated.lowered_db / 20)
    noise_T = treated.waveform_T.astype(np.float64) - lowered * clean_T
    is_active = np.repeat(np.square(clean_T.reshape(-1, 320)).mean(1) > 0, 320)
    found_db = 10 * np.log10(np.mean(np.square(lowered * clean_T[is_active])) / np.mean(np.square(noise_T)))
    assert found_db == pytest.approx(snr_db, abs=0.1)


def test_pauses_do_not_count_as_speech() -> None:
    dense, sparse = speech(1.0), np.concatenate([speech(1.0), np.zeros(9 * RATE_HZ, np.float32)])
    assert augmentation.active_power(sparse, RATE_HZ) == pytest.approx(augmentation.active_power(dense, RATE_HZ))
    assert augmentation.active_power(dense, RATE_HZ) == pytest.approx(2 * np.mean(np.square(dense)), rel=0.05)
    assert augmentation.active_power(np.zeros(500), RATE_HZ) == 0


def test_peaks_lower_the_whole_and_are_never_clipped() -> None:
    loud_T = speech(loudness=0.5)
    treated = Augmentation(AugmentationConfig(), 0).apply(loud_T, RATE_HZ, treatment(noise="white", snr_db=-10.0), 0)
    assert np.abs(treated.waveform_T).max() <= 1 and treated.lowered_db > 3
    assert (np.abs(treated.waveform_T) > 0.999).sum() <= 2  # one peak at the top, not a plateau
    quiet = Augmentation(AugmentationConfig(), 0).apply(0.01 * loud_T, RATE_HZ, treatment(noise="pink"), 0)
    assert quiet.lowered_db == 0


def test_silence_stays_silent_and_is_said() -> None:
    both = treatment(noise="white", room="generated")
    treated = Augmentation(AugmentationConfig(), 0).apply(np.zeros(4000, np.float32), RATE_HZ, both, 0)
    assert treated.is_silent and not treated.waveform_T.any()


@pytest.mark.parametrize(("colour", "slope_db"), [("white", 0.0), ("pink", -3.01), ("brown", -6.02)])
def test_noise_has_its_colour(colour: str, slope_db: float) -> None:
    noise_T = augmentation.coloured_noise(
        20 * RATE_HZ, RATE_HZ, augmentation.NOISE_COLOURS[colour], np.random.default_rng(0)
    )
    frequencies, power = welch(noise_T, RATE_HZ, nperseg=4096)
    band = (frequencies > 100) & (frequencies < 6000)
    slope = np.polyfit(np.log2(frequencies[band]), 10 * np.log10(power[band]), 1)[0]
    assert slope == pytest.approx(slope_db, abs=0.3)  # decibels an octave
    assert power[frequencies < 20].sum() < 0.1 * power.sum()


@pytest.mark.parametrize("rt60_seconds", [0.2, 0.5, 1.2])
def test_a_generated_room_falls_by_60_db_in_its_time(rt60_seconds: float) -> None:
    response_T = augmentation.generated_response(rt60_seconds, RATE_HZ, np.random.default_rng(3))
    decay_db = 10 * np.log10(np.cumsum(np.square(response_T[1:])[::-1])[::-1] / np.sum(np.square(response_T[1:])))
    fifth, thirtyfifth = (int(np.argmax(decay_db < level)) for level in (-5, -35))  # as T30 is measured
    assert 2 * (thirtyfifth - fifth) / RATE_HZ == pytest.approx(rt60_seconds, rel=0.05)
    direct_db = 10 * np.log10(response_T[0] ** 2 / np.sum(np.square(response_T[1:])))
    assert direct_db == pytest.approx(3.0, abs=0.01)


def test_a_room_keeps_length_time_and_level(tmp_path: pathlib.Path) -> None:
    clean_T = speech()
    response_T = np.zeros(4000)
    response_T[[500, 900, 2000]] = 0.8, -0.3, 0.1  # the direct sound comes late, as in recordings
    wav(tmp_path / "hall.wav", response_T)
    config = AugmentationConfig(room_fraction=1.0, room=str(tmp_path))
    treated = Augmentation(config, 0).apply(clean_T, RATE_HZ, treatment(room="hall.wav"), 0)
    wet_T = treated.waveform_T.astype(np.float64) * 10 ** (treated.lowered_db / 20)
    assert len(wet_T) == len(clean_T)
    assert np.sum(np.square(wet_T)) == pytest.approx(np.sum(np.square(clean_T.astype(np.float64))), rel=1e-5)
    gain = wet_T[:400] @ clean_T[:400] / (clean_T[:400] @ clean_T[:400])
    np.testing.assert_allclose(wet_T[:400], gain * clean_T[:400], atol=1e-3)  # before the first echo arrives


def test_draws_depend_on_seed_and_key_alone_and_reach_their_shares() -> None:
    config = AugmentationConfig(noise_fraction=0.3, room_fraction=0.5, snr_db=(5.0, 10.0), rt60_seconds=(0.3, 0.4))
    keys = [f"record {i}" for i in range(2000)]
    drawn = [Augmentation(config, 1).draw(key) for key in keys]
    again = Augmentation(config, 1)
    assert [again.draw(key) for key in reversed(keys)] == drawn[::-1]
    assert [Augmentation(config, 2).draw(key) for key in keys] != drawn
    some = [one for one in drawn if one]
    assert np.mean([bool(one.noise) for one in some]) * len(some) / 2000 == pytest.approx(0.3, abs=0.04)
    assert np.mean([bool(one.room) for one in some]) * len(some) / 2000 == pytest.approx(0.5, abs=0.04)
    assert all(5 <= one.snr_db <= 10 and 0.3 <= one.rt60_seconds <= 0.4 for one in some)
    assert {one.noise for one in some} == {"", "white", "pink", "brown"}
    # Another setting leaves the draws of a record as they were.
    more = [Augmentation(AugmentationConfig(noise_fraction=0.3), 1).draw(key) for key in keys]
    assert [one.noise if one else "" for one in more] == [one.noise if one else "" for one in drawn]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_fraction": 1.5}, "augmentation.noise_fraction': must be in 0..1"),
        ({"noise": "folder"}, "used by no record; set augmentation.noise_fraction"),
        ({"snr_db": (20.0, 0.0)}, r"augmentation.snr_db': must be \(low, high\)"),
        ({"snr_db": (5.0,)}, "augmentation.snr_db"),
        ({"rt60_seconds": (0.0, 1.0)}, "augmentation.rt60_seconds': .*0.01 <= low"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**arguments)


def test_files_that_cannot_be_used_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no folder with sound files"):
        Augmentation(AugmentationConfig(noise_fraction=1.0, noise=str(tmp_path)), 0)
    wav(tmp_path / "noise" / "silent.wav", np.zeros(3000))
    (tmp_path / "noise" / "broken.wav").write_bytes(b"RIFF....")
    wav(tmp_path / "room" / "silent.wav", np.zeros(3000))
    config = AugmentationConfig(1.0, str(tmp_path / "noise"), room_fraction=1.0, room=str(tmp_path / "room"))
    augmenter = Augmentation(config, 0)
    for found, message in (
        ({"noise": "silent.wav"}, "noise .*silent.wav is silent.*take it out of the folder"),
        ({"noise": "broken.wav"}, "noise .*broken.wav cannot be used"),
        ({"room": "silent.wav"}, "room .*silent.wav is silent"),
    ):
        with pytest.raises(ValueError, match=message):
            augmenter.apply(speech(), RATE_HZ, treatment(**found), 0)


def corpus(root: pathlib.Path) -> pathlib.Path:
    """The usual tasks, and chats whose user and assistant speak with the same file."""
    manifest = write_corpus(root, 30)
    lines = []
    for i in range(6):
        user = {"role": "user", "parts": [{"speech": f"sound_{i}.wav"}, {"speech": f"sound_{i}.wav"}]}
        answer = {"role": "assistant", "parts": [{"text": "yes"}, {"speech": f"sound_{i}.wav"}]}
        chat = {"key": f"chat/{i}", "task": "chat", "split": "train", "messages": [user, answer], "facts": {}}
        lines.append(json.dumps(chat) + "\n")
    manifest.write_text(manifest.read_text() + "".join(lines))
    return manifest


def stored(directory: pathlib.Path) -> dict[str, Any]:
    return {example.key: example for example in TokenDataset(directory)}


def test_only_what_is_heard_is_treated_and_the_record_says_so(tmp_path: pathlib.Path) -> None:
    manifest, bundle = corpus(tmp_path / "corpus"), fake_bundle()
    wav(tmp_path / "rooms" / "small.wav", np.r_[1.0, np.zeros(400), 0.6, np.zeros(400), -0.5])
    heavy = AugmentationConfig(
        noise_fraction=1.0, snr_db=(-3.0, 0.0), room_fraction=0.5, room=str(tmp_path / "rooms"), copies="beside"
    )
    assert pretokenize(config_for(manifest), tmp_path / "clean", bundle=bundle)
    assert pretokenize(config_for(manifest, augmentation=heavy), tmp_path / "beside", bundle=bundle)
    clean, beside = stored(tmp_path / "clean"), stored(tmp_path / "beside")
    copies = {key: example for key, example in beside.items() if key.endswith("#augmented")}
    heard = [key for key in clean if key.startswith(("speech_to_text", "chat"))]
    assert sorted(copies) == sorted(f"{key}#augmented" for key in heard)
    for key, example in clean.items():
        np.testing.assert_array_equal(beside[key].tokens_L, example.tokens_L)
        assert beside[key].facts == example.facts
    for key in heard:
        before, after = clean[key].example, copies[f"{key}#augmented"].example
        assert before.spans == after.spans  # a room and noise change no length
        changed = before.tokens_L != after.tokens_L
        assert changed.any() and not changed[before.roles_L != 0].any()  # prompts only
        made = copies[f"{key}#augmented"].facts["pretokenize"]
        assert -3 <= made["noise"]["snr_db"] <= 0 and made["noise"]["from"] in augmentation.NOISE_COLOURS
        assert made.get("room", {"from": "small.wav"}) == {"from": "small.wav"}
        assert all(set(one) <= {"utterance", "lowered_db", "is_silent"} for one in made.get("utterances", ()))
    assert any("room" in example.facts["pretokenize"] for example in copies.values())
    first, second = (copies["chat/0#augmented"].example.spans[i] for i in (1, 2))
    ids = copies["chat/0#augmented"].tokens_L
    same_file = [ids[span.start : span.start + span.length] for span in (first, second)]
    assert (same_file[0] != same_file[1]).any()  # noise begins elsewhere in each utterance

    replacing = AugmentationConfig(**{**heavy.__dict__, "copies": "replace"})
    assert pretokenize(config_for(manifest, augmentation=replacing), tmp_path / "replaced", bundle=bundle)
    replaced = stored(tmp_path / "replaced")
    assert sorted(replaced) == sorted(clean)
    for key in heard:
        np.testing.assert_array_equal(replaced[key].tokens_L, copies[f"{key}#augmented"].tokens_L)


def test_shards_are_the_same_whoever_makes_them_wherever_the_noise_lies(tmp_path: pathlib.Path) -> None:
    manifest, bundle = corpus(tmp_path / "corpus"), fake_bundle()
    noise_T = np.random.default_rng(5).uniform(-0.4, 0.4, 3 * RATE_HZ)
    for folder in ("here", "there"):
        wav(tmp_path / folder / "kitchen.wav", noise_T)

    def config(folder: str, **changes: Any) -> Any:
        noisy = AugmentationConfig(noise_fraction=0.7, noise=str(tmp_path / folder), room_fraction=0.3)
        return config_for(manifest, augmentation=noisy, records_per_shard=7, **changes)

    assert pretokenize(config("here"), tmp_path / "one", bundle=bundle)
    for index in (2, 0, 1):
        worker = config("there", media_batch_size=2)
        pretokenize(worker, tmp_path / "three", shard_index=index, num_shards=3, bundle=bundle)
    one, three = (json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("one", "three"))
    assert one == three and one["augmentation"]["noise"]["files"] == 1
    wav(tmp_path / "here" / "kitchen.wav", 0.5 * noise_T)
    with pytest.raises(ValueError, match="another run"):
        pretokenize(config("here"), tmp_path / "one", bundle=bundle)
    assert pretokenize(config("there", seed=1), tmp_path / "other seed", bundle=bundle)
    assert json.loads((tmp_path / "other seed" / "dataset.json").read_text())["fingerprint"] != one["fingerprint"]
