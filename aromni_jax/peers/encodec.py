"""EnCodec as transformers has it, at random weights with which every tensor matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers


def random_encodec(seed: int = 0, **changes: Any) -> transformers.EncodecModel:
    """A model with codebooks and biases that matter: at birth both are zero, and every code would be 0."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = transformers.EncodecModel(transformers.EncodecConfig(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "original0" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
            elif "bias" in name:
                parameter.normal_(std=0.1)
        residual = model.encoder(torch.from_numpy(sound(24_000)[None, None]))
        for layer in model.quantizer.layers:
            mean, std = residual.mean((0, 2)), residual.std((0, 2))
            layer.codebook.embed.normal_().mul_(std).add_(mean)
            residual = residual - layer.decode(layer.encode(residual))
    return model


def sound(num_samples: int, seed: int = 0) -> np.ndarray:
    """A chord that swells, in noise."""
    rng = np.random.default_rng(seed)
    times = np.arange(num_samples) / 24_000
    tones = sum(np.sin(2 * np.pi * f * times + p) for f, p in zip(rng.uniform(90, 3000, 6), rng.uniform(0, 6, 6)))
    return (0.1 * tones * (0.3 + np.sin(3 * times) ** 2) + 0.02 * rng.normal(size=num_samples)).astype(np.float32)
