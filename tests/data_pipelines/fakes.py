"""Small stand-ins for trained tokenizers and corpora: deterministic, fast, and true to the interfaces."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image as PilImage

from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.text import ByteText
from data_pipelines.espeak import write_wav
from data_pipelines.pretokenize import PretokenizeConfig, pretokenize


class FakeImageTokenizer:
    """Mean brightness of the 16 blocks of a 16x16 picture, in 64 steps."""

    num_codes, tokens_per_image, image_size, fingerprint = 64, 16, 16, "fake-image"

    def prepare(self, picture: PilImage.Image) -> np.ndarray:
        return np.asarray(picture.convert("RGB").resize((16, 16)))

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        blocks = pixels_BHWC.astype(np.float32).mean(-1).reshape(-1, 4, 4, 4, 4).mean((2, 4)).reshape(-1, 16)
        return (blocks // 4).astype(np.int32)

    def decode(self, codes_BP: np.ndarray) -> np.ndarray:
        grey = np.asarray(codes_BP).reshape(-1, 4, 4).repeat(4, 1).repeat(4, 2) * 4
        return np.repeat(grey[..., None], 3, -1).astype(np.uint8)

    def save(self, directory: Any) -> None:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)


class FakeSpeechTokenizer:
    """Loudness of every hop of 400 samples at 16 kHz, in 32 steps."""

    num_codes, num_codebooks, sample_rate_hz, codes_per_second, fingerprint = 32, 1, 16_000, 40, "fake-speech"

    def prepare(self, waveform: np.ndarray, rate_hz: int) -> np.ndarray:
        return waveform.astype(np.float32)

    def encode(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        hops = [waveform[: len(waveform) // 400 * 400].reshape(-1, 400) for waveform in waveforms]
        return [np.minimum(np.abs(hop).mean(1) * 64, 31).astype(np.int32)[None] for hop in hops]

    def decode(self, codes: list[np.ndarray]) -> list[np.ndarray]:
        return [np.repeat(code_KU[0] / 64, 400).astype(np.float32) for code_KU in codes]

    def save(self, directory: Any) -> None:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)


def fake_bundle() -> TokenizerBundle:
    return TokenizerBundle(ByteText(), FakeImageTokenizer(), FakeSpeechTokenizer())  # type: ignore[arg-type]


def write_corpus(root: pathlib.Path, num: int = 40, seed: int = 0) -> pathlib.Path:
    """A manifest of `num` conversations of five tasks over pictures and utterances of varied length."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(num):
        picture, sound = f"picture_{i}.png", f"sound_{i}.wav"
        PilImage.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / picture)
        write_wav(root / sound, rng.uniform(-0.9, 0.9, int(rng.integers(2000, 16_000))).astype(np.float32))
        words = " ".join(["red", "blue", "circle", "star"][int(w)] for w in rng.integers(0, 4, rng.integers(1, 6)))
        turns = {
            "text_to_image": ([{"text": words}], [{"image": picture}]),
            "caption": ([{"image": picture}], [{"text": words}]),
            "speech_to_text": ([{"speech": sound}], [{"text": words}]),
            "text_to_speech": ([{"text": words}], [{"speech": sound}]),
            "text": (None, [{"text": words}]),
        }
        task = list(turns)[i % len(turns)]
        user, answer = turns[task]
        messages = ([{"role": "user", "parts": user}] if user else []) + [{"role": "assistant", "parts": answer}]
        facts = {"label": words, "holdout": "scan" if i % 3 == 0 else ""}
        lines.append({"key": f"{task}/{i}", "task": task, "split": "train", "messages": messages, "facts": facts})
    manifest = root / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def config_for(manifest: pathlib.Path, **changes: Any) -> PretokenizeConfig:
    fields: dict[str, Any] = dict(source=str(manifest), split="train", tokenizers="", templates="quickstart")
    return PretokenizeConfig(**(fields | dict(records_per_shard=16) | changes))


def make_dataset(root: pathlib.Path, num: int = 40, seed: int = 0, name: str = "data", **changes: Any) -> pathlib.Path:
    """Writes a corpus under `root` and pre-tokenizes it to `root/<name>`."""
    manifest = write_corpus(root / f"corpus-{name}", num, seed)
    assert pretokenize(config_for(manifest, **changes), root / name, bundle=fake_bundle())
    return root / name
