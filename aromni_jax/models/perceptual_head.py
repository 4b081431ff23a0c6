"""The projection W of perceptual alignment: hidden states to the width of the image codebook."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from aromni_jax.models.config import ModelConfig
from aromni_jax.partitioning import logical


class PerceptualHead(nn.Module):
    """W h, [..., D] -> [..., E] (paper equation 3); trained, decayed and checkpointed with its decoder."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        init = logical(nn.initializers.lecun_normal(), "embed", "code")
        self.kernel = self.param("kernel", init, (c.d_model, c.perceptual_dim), jnp.dtype(c.param_dtype))

    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        return jnp.einsum("BLD,DE->BLE", hidden_BLD, self.kernel.astype(hidden_BLD.dtype))
