"""The authors' stack as a train step: Hugging Face's Chameleon in torch with AdamW, for measuring speed.

It is given what makes it fast and changes no result: the fused optimizer, no mask (rows are padded on the right),
labels of padding ignored; on a GPU bfloat16 matrix products, flash attention and `torch.compile`, of each layer and of
the loss. Of the whole model at once it would be slower: transformers makes a mask of every causal attention that it
traces (`masking_utils`, with torch before 2.14), and with a mask torch has no flash attention.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

_IGNORED = -100


class ChameleonTrainer:
    """Trains the model of an export; `optimizer` are the fields of `OptimizerConfig`, of which the rate is constant."""

    def __init__(self, directory: Path, optimizer: Mapping[str, Any], device: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        # An export has no image encoder, and the decoder needs none: no page about what is missing.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._device, self._clip_norm = device, optimizer["clip_norm"]
        self._dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = transformers.ChameleonForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._model = model.to(device).train()
        self._ways = {True: self._way(is_one_shape=True), False: self._way(is_one_shape=False)}
        self._parameters = [
            parameter for name, parameter in self._model.named_parameters() if not name.startswith("model.vqmodel.")
        ]
        self._optimizer = torch.optim.AdamW(
            self._groups(optimizer["weight_decay"]),
            lr=optimizer["learning_rate"],
            betas=(optimizer["b1"], optimizer["b2"]),
            eps=optimizer["eps"],
            fused=True,
        )

    def _way(self, *, is_one_shape: bool) -> tuple[torch.nn.ModuleList, torch.nn.Module, Callable[..., torch.Tensor]]:
        """(layers, last norm, loss), on a GPU compiled: for one shape, or once for all of those that padding makes."""
        layers, norm = self._model.model.layers, self._model.model.norm
        if self._device == "cpu":
            return layers, norm, self._summed_loss
        compiled = functools.partial(torch.compile, dynamic=not is_one_shape)
        return torch.nn.ModuleList(map(compiled, layers)), compiled(norm), compiled(self._summed_loss)

    def _summed_loss(self, hidden_BLD: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        logits_TV = self._model.lm_head(hidden_BLD).float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(
            logits_TV, targets_BL.flatten(), ignore_index=_IGNORED, reduction="sum"
        )

    def _groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """As in `optim`: matrices shrink, the embedding and what norms have does not."""
        shrinks = {
            id(parameter)
            for name, parameter in self._model.named_parameters()
            if parameter.ndim == 2 and "norm" not in name and "embed_tokens" not in name
        }
        return [
            {"params": [p for p in self._parameters if id(p) in shrinks], "weight_decay": weight_decay},
            {"params": [p for p in self._parameters if id(p) not in shrinks], "weight_decay": 0.0},
        ]

    def step(self, micro_batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
        """One update from all micro-batches of (inputs, targets), integers [B, L]; returns the mean loss before it."""
        micro_batches = list(micro_batches)
        is_one_shape = len({inputs.shape for inputs, _ in micro_batches}) == 1
        decoder = self._model.model
        decoder.layers, decoder.norm, summed_loss = self._ways[is_one_shape]
        weight = sum(int((targets_BL != _IGNORED).sum()) for _, targets_BL in micro_batches)
        total = torch.zeros((), device=self._device)
        for inputs_BL, targets_BL in micro_batches:
            inputs, targets = (torch.from_numpy(x.astype(np.int64)).to(self._device) for x in (inputs_BL, targets_BL))
            with torch.autocast(self._device, self._dtype) if self._device != "cpu" else contextlib.nullcontext():
                loss = summed_loss(decoder(input_ids=inputs, use_cache=False).last_hidden_state, targets)
            (loss / weight).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(total) / weight

    def squares(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two square matrices of random numbers, whose product is as large as the first."""
        x, w = (torch.randn((width, width), dtype=self._dtype, device=self._device) for _ in range(2))
        return x, w * width**-0.5

    def products(self, squares: tuple[torch.Tensor, torch.Tensor], count: int) -> None:
        """`count` products of square matrices, one after the other."""
        x, w = squares
        for _ in range(count):
            x = x @ w
        float(x[0, 0])
