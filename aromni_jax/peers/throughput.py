"""The published shapes of the peers at random weights, as plain functions of batches, for measuring speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from aromni_jax.peers.encodec import random_encodec
from aromni_jax.peers.vqgan import Shape, TorchVQGAN, randomize
from aromni_jax.peers.wavtokenizer import WavTokenizerTorch
from aromni_jax.tokenizers.nets.wavtokenizer import SMALL_600_24KHZ_4096

Functions = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]


def prepare(family: str, directory: Path, num_threads: int, num_codebooks: int) -> Functions:
    """(encode, decode) of batches of equally long items; writes the weights to `directory` as they are published.

    Pictures are uint8 [B, 512, 512, 3] with codes [B, 1024]; sound is float32 [B, T] with codes [B, K, U].
    """
    make = {"chameleon": _chameleon, "encodec": _encodec, "wavtokenizer": _wavtokenizer}[family]
    encode, decode = make(directory, num_codebooks)
    torch.set_num_threads(num_threads)

    def without_gradients(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        return torch.inference_mode()(function)

    return without_gradients(encode), without_gradients(decode)


def _chameleon(directory: Path, num_codebooks: int) -> Functions:
    net = TorchVQGAN(Shape(512, 128, (1, 1, 2, 2, 4), 2, 256, 256, 8192)).eval()
    randomize(net, seed=1)
    torch.save({"state_dict": net.state_dict()}, directory / "weights.ckpt")
    encoder = transformers.ChameleonVQVAE(transformers.ChameleonVQVAEConfig()).eval()
    encoder.load_state_dict(net.state_dict(), strict=False)

    def encode(pixels_BHWC: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
        codes: np.ndarray = encoder.encode(pixels, return_dict=True).image_tokens.reshape(len(pixels), -1).numpy()
        return codes

    def decode(codes_BP: np.ndarray) -> np.ndarray:
        pixels = net.decode(torch.from_numpy(codes_BP.astype(np.int64)))
        shown: np.ndarray = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return shown

    return encode, decode


def _encodec(directory: Path, num_codebooks: int) -> Functions:
    model = random_encodec()
    model.save_pretrained(directory)
    bandwidth = num_codebooks * model.config.frame_rate * model.config.codebook_nbits / 1000

    def encode(waveform_BT: np.ndarray) -> np.ndarray:
        codes: np.ndarray = (
            model.encode(torch.from_numpy(waveform_BT[:, None]), bandwidth=bandwidth).audio_codes[0].numpy()
        )
        return codes

    def decode(codes_BKU: np.ndarray) -> np.ndarray:
        codes = torch.from_numpy(codes_BKU.astype(np.int64))[None]
        waveform_BT: np.ndarray = model.decode(codes, [None]).audio_values[:, 0].numpy()
        return waveform_BT

    return encode, decode


def _wavtokenizer(directory: Path, num_codebooks: int) -> Functions:
    model = WavTokenizerTorch(SMALL_600_24KHZ_4096, 4096)
    model.save(directory / "weights.ckpt")
    return lambda waveform_BT: model.encode_batch(waveform_BT)[:, None], lambda codes: model.decode_batch(codes[:, 0])
