"""`transformers` generate on an export: the reference of greedy decoding, for its tokens and for its speed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers


class ChameleonGenerator:
    """Greedy answers of an export by transformers, with its key-value cache, on one device."""

    def __init__(self, directory: Path, device: str, dtype: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        # An export has no image encoder, and the decoder needs none: no page about what is missing.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.ChameleonForConditionalGeneration.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._model = model.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def answer(
        self, prompt_L: np.ndarray, num_tokens: int, forbidden: Sequence[int] = (), *, rows: int = 1
    ) -> np.ndarray:
        """Exactly `num_tokens` most likely tokens after the prompt, ids in `forbidden` left out.

        With several `rows` it answers that many of the same prompt at a time, and returns the first.
        """
        ids_BL = torch.from_numpy(np.tile(prompt_L.astype(np.int64), (rows, 1))).to(self._device)
        made_BT = self._model.generate(
            input_ids=ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            suppress_tokens=list(forbidden) or None,
        )
        answer_T: np.ndarray = made_BT[0, len(prompt_L) :].cpu().numpy()
        return answer_T
