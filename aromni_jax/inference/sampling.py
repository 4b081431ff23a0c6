"""Choosing one token per row: greedy or sampled; temperature, top-k, top-p, min-p and repetition penalty per row.

Every row has its own random key and its own settings, and no operation mixes rows, so what a row says does not depend
on its neighbours. Logits may be anything, NaN and infinities included: an allowed token always comes out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import BoolArray, FloatArray, IntArray

LARGEST_LOGIT = 1e9
"""Logits are clipped to +- this; NaN counts as the lowest."""
LOWEST_TEMPERATURE = 1e-6
"""Lower ones are taken for this: close to greedy, and its reciprocal is still a number."""


def row_keys(seed: int, row_ids: list[int]) -> jax.Array:
    """One key per row: a function of the seed and the row's own number, not of its place in a batch."""
    base = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(base, row))(np.asarray(row_ids, np.uint32))


def repetition_penalised(logits_BV: FloatArray, repeated_BV: BoolArray, penalty_B: FloatArray) -> FloatArray:
    """Divides positive and multiplies negative logits of what would be repeated (arXiv 1909.05858, section 4.1)."""
    penalty_B1 = penalty_B[:, None]
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(repeated_BV, penalised_BV, logits_BV)


def nucleus_mask(probs_BV: FloatArray, top_k_B: IntArray, top_p_B: FloatArray) -> BoolArray:
    """Bool [B, V]: the `top_k` most likely tokens that are also in the smallest set of mass `top_p`; ties are kept.

    Instead of sorting the vocabulary, the cut-off probability is found by bisection over float bit patterns, which
    are ordered like the non-negative floats they stand for: 31 halvings give the exact cut-off. top_k 0 keeps all.
    """
    bits_BV = jax.lax.bitcast_convert_type(probs_BV.astype(jnp.float32), jnp.int32)
    # Summation may leave the whole mass below 1 by rounding; top_p 1 must still keep every token.
    wanted_mass_B = jnp.where(top_p_B >= 1.0, jnp.inf, top_p_B * probs_BV.sum(-1))
    wanted_count_B = jnp.where(top_k_B <= 0, probs_BV.shape[-1] + 1, top_k_B)

    def halve(step: jax.Array, cuts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Sets bit 30 - step of each cut-off if the tokens at or above it still hold what is wanted."""
        by_mass_B, by_count_B = cuts
        bit = jnp.left_shift(jnp.int32(1), 30 - step)
        mass_B = jnp.where(bits_BV >= (by_mass_B | bit)[:, None], probs_BV, 0.0).sum(-1)
        count_B = (bits_BV >= (by_count_B | bit)[:, None]).sum(-1)
        return (
            jnp.where(mass_B >= wanted_mass_B, by_mass_B | bit, by_mass_B),
            jnp.where(count_B >= wanted_count_B, by_count_B | bit, by_count_B),
        )

    zero_B = jnp.zeros(probs_BV.shape[:-1], jnp.int32)
    by_mass_B, by_count_B = jax.lax.fori_loop(0, 31, halve, (zero_B, zero_B))
    return bits_BV >= jnp.maximum(by_mass_B, by_count_B)[:, None]


def sample(
    logits_BV: FloatArray,
    allowed_BV: BoolArray,
    keys_B: jax.Array,
    *,
    temperature_B: FloatArray,
    top_k_B: IntArray,
    top_p_B: FloatArray,
    min_p_B: FloatArray,
) -> IntArray:
    """One allowed token per row; rows of temperature 0 take the most likely one.

    `allowed_BV` must allow something in every row (the grammar guarantees it). A token may be drawn when it is among
    the `top_k_B` likeliest, in the likeliest set of mass `top_p_B`, and at least `min_p_B` times as likely as the
    likeliest.
    """
    logits_BV = jnp.nan_to_num(
        logits_BV.astype(jnp.float32), nan=-LARGEST_LOGIT, posinf=LARGEST_LOGIT, neginf=-LARGEST_LOGIT
    )
    logits_BV = jnp.where(allowed_BV, jnp.clip(logits_BV, -LARGEST_LOGIT, LARGEST_LOGIT), -jnp.inf)
    greedy_B = jnp.argmax(logits_BV, axis=-1)

    def draw(_: None) -> jax.Array:
        # The largest logit is 0 first: no temperature, however low, divides it to infinity.
        heat_B = jnp.where(temperature_B > 0, jnp.maximum(temperature_B, LOWEST_TEMPERATURE), 1.0)
        scaled_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / heat_B[:, None]
        probs_BV = jax.nn.softmax(scaled_BV, axis=-1)
        # Only top-k and top-p need the search, which reads the whole vocabulary 31 times; min-p is one comparison.
        kept_BV = jax.lax.cond(
            jnp.any((temperature_B > 0) & ((top_k_B > 0) | (top_p_B < 1))),
            lambda: nucleus_mask(probs_BV, top_k_B, top_p_B),
            lambda: jnp.ones_like(allowed_BV),
        )
        kept_BV &= probs_BV >= min_p_B[:, None] * probs_BV.max(-1, keepdims=True)
        scaled_BV = jnp.where(kept_BV, scaled_BV, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys_B, scaled_BV)

    # Batches of greedy rows (recognition, captions, speech) skip the work of sampling altogether.
    drawn_B = jax.lax.cond(jnp.any(temperature_B > 0), draw, lambda _: greedy_B, None)
    return jnp.where(temperature_B > 0, drawn_B, greedy_B).astype(jnp.int32)
