"""The decoder: token ids to hidden states, one stack of layers, one vocabulary for text, pictures and speech."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from aromni_jax.arrays import IntArray
from aromni_jax.models.config import ModelConfig
from aromni_jax.models.embedding_lookup import embedding_lookup
from aromni_jax.models.kv_cache import KVCache
from aromni_jax.models.layers import REMAT_POLICIES, DecoderLayer, RMSNorm
from aromni_jax.models.perceptual_head import PerceptualHead
from aromni_jax.models.rope import rotation
from aromni_jax.partitioning import constrain, logical


class Decoder(nn.Module):
    """Pure functions over one parameter tree (names: `params["layers"]["attention"]["q"]` is [n, D, N, H], ...).

    `decoder.init(key, ids, ids, ids)["params"]` is boxed with logical axis names; `partitioning.unbox` removes them.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        table = (c.vocab_size, c.d_model)
        # Swin-Norm adds vectors of rms 1 to the stream, so tokens enter at that size; pre-norm reads any size.
        stddev = 1.0 if c.norm_position == "swin" else 0.02
        self.embedding = self.param(
            "embedding", logical(nn.initializers.normal(stddev), "vocab", "embed"), table, dtype
        )
        self.unembedding = self.param(
            "unembedding", logical(nn.initializers.normal(0.02), "vocab", "embed"), table, dtype
        )
        layer = DecoderLayer
        if c.remat != "none":
            layer = nn.remat(layer, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=1 if c.scan_layers else c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layer"},
        )(c)
        self.final_norm = RMSNorm(c)
        if c.perceptual_dim:
            self.perceptual_head = PerceptualHead(c)

    def __call__(
        self,
        tokens_BL: IntArray,
        positions_BL: IntArray,
        segment_ids_BL: IntArray,
        cache: KVCache | None = None,
        swin_share: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Hidden states [B, L, D] after the final norm, in the compute type; with a cache, also the filled cache.

        Without a cache, rows are packed: attention stays inside segments, `positions_BL` count inside them. With one,
        rows are left-aligned single documents: a token at position p reads everything cached up to p (prefill L > 1,
        decode L = 1), and tokens of segment 0 (padding) are not stored. `swin_share` is how far a Swin-Norm model that
        began as a pre-norm one has come (`DecoderLayer`); None is all the way.
        """
        c = self.config
        x_BLD = embedding_lookup(self.embedding, tokens_BL, c.dtype)
        x_BLD = constrain(x_BLD, "batch", "length", None)
        turn = rotation(positions_BL, c.head_dim, c.rope_theta)
        (x_BLD, filled), _ = self.layers(
            (x_BLD, cache), jnp.arange(c.num_layers), turn, positions_BL, segment_ids_BL, swin_share
        )
        hidden_BLD = self.final_norm(x_BLD)
        if self.is_initializing() and c.perceptual_dim:
            self.perceptual_head(hidden_BLD)
        if filled is None:
            return hidden_BLD
        return hidden_BLD, filled.advance(positions_BL, segment_ids_BL)

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """float32 logits [B, L, V] of hidden states: for inference; training goes through `losses`, in chunks."""
        table_VD = self.unembedding.astype(hidden_BLD.dtype)
        return jnp.einsum("BLD,VD->BLV", hidden_BLD, table_VD, preferred_element_type=jnp.float32)

    def project(self, hidden_BLD: jax.Array) -> jax.Array:
        """[B, L, E] of the perceptual head; ValueError for a model without one."""
        if not self.config.perceptual_dim:
            raise ValueError("this model has no perceptual head (perceptual_dim = 0)")
        return self.perceptual_head(hidden_BLD)
