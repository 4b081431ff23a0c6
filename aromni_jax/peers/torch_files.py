"""How long `torch.save` and `torch.load` take for given arrays: what `aromni bench checkpoint` compares with."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch


def save_seconds(arrays: list[np.ndarray], path: Path) -> float:
    """Seconds of `torch.save` of copies of `arrays` until the file is on disk; bfloat16 goes as 16-bit integers."""
    tensors = [torch.from_numpy(np.array(x.view(np.int16) if x.dtype.name == "bfloat16" else x)) for x in arrays]
    begun = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begun


def load_seconds(path: Path) -> float:
    """Seconds of `torch.load` of such a file."""
    begun = time.perf_counter()
    torch.load(path, weights_only=True)
    return time.perf_counter() - begun
