"""Cut-offs against a sorting reference, frequencies against probabilities, and rows that do not see each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.inference.sampling import nucleus_mask, repetition_penalised, row_keys, sample

sample_jitted = jax.jit(sample)


def sorted_reference(probs: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The textbook way: sort, cut after `top_k`, and after the first token that brings the mass to `top_p`."""
    order = np.argsort(-probs, kind="stable")
    mass = np.cumsum(probs[order].astype(np.float64))
    kept_p = len(probs) if top_p >= 1 else int(np.searchsorted(mass, top_p * mass[-1])) + 1
    kept = min(top_k or len(probs), kept_p)
    mask = np.zeros(len(probs), bool)
    mask[order[:kept]] = True
    return mask


def test_nucleus_equals_sorting():
    rng = np.random.default_rng(0)
    probs = np.array(jax.nn.softmax(rng.normal(size=(200, 97)) * 3), np.float32)
    top_k = rng.integers(0, 40, 200).astype(np.int32)
    top_p = rng.choice([1.0, 0.96, 0.5, 0.1, 1e-6], 200).astype(np.float32)
    mask = np.asarray(nucleus_mask(jnp.asarray(probs), jnp.asarray(top_k), jnp.asarray(top_p)))
    for row in range(200):
        np.testing.assert_array_equal(mask[row], sorted_reference(probs[row], int(top_k[row]), float(top_p[row])))


def test_frequencies_follow_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rows = 20_000
    drawn = sample_jitted(
        jnp.tile(logits, (rows, 1)),
        jnp.ones((rows, 4), bool),
        row_keys(0, list(range(rows))),
        temperature_B=jnp.ones(rows),
        top_k_B=jnp.zeros(rows, jnp.int32),
        top_p_B=jnp.full(rows, 0.9),
        min_p_B=jnp.zeros(rows),
    )
    share = np.bincount(np.asarray(drawn), minlength=4) / rows
    np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.015)


def test_rows_keep_their_own_settings_and_keys():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(64, 50)).astype(np.float32)
    allowed = rng.random((64, 50)) < 0.5
    allowed[:, 0] = True
    settings = dict(
        temperature_B=jnp.asarray(rng.choice([0.0, 1.0, 2.0], 64), jnp.float32),
        top_k_B=jnp.asarray(rng.integers(0, 9, 64), jnp.int32),
        top_p_B=jnp.asarray(rng.uniform(0.2, 1, 64), jnp.float32),
        min_p_B=jnp.asarray(rng.choice([0.0, 0.1, 1.0], 64), jnp.float32),
    )
    keys = row_keys(3, list(range(64)))
    whole = sample_jitted(logits, allowed, keys, **settings)
    assert allowed[np.arange(64), whole].all()
    for row in range(0, 64, 7):
        part = slice(row, row + 1)
        alone = sample_jitted(logits[part], allowed[part], keys[part], **{k: v[part] for k, v in settings.items()})
        assert int(alone[0]) == int(whole[row])
    greedy = np.asarray(settings["temperature_B"] == 0)
    best = np.where(allowed, logits, -np.inf).argmax(1)
    np.testing.assert_array_equal(np.asarray(whole)[greedy], best[greedy])


def test_repetition_penalty_lowers_seen_tokens_only():
    logits = jnp.array([[2.0, -2.0, 1.0]])
    seen = jnp.array([[True, True, False]])
    np.testing.assert_allclose(repetition_penalised(logits, seen, jnp.array([2.0])), [[1.0, -4.0, 1.0]])


def drawn_ids(logits, rows=4_000, **settings):
    """The ids that `rows` draws with one setting give."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    given = {f"{name}_B": jnp.full(rows, value) for name, value in defaults.items()}
    logits_BV = jnp.tile(jnp.asarray(logits, jnp.float32), (rows, 1))
    drawn = sample_jitted(logits_BV, jnp.ones_like(logits_BV, bool), row_keys(0, list(range(rows))), **given)
    return set(np.asarray(drawn).tolist())


def test_min_p_is_a_share_of_the_likeliest_token():
    """Temperature first: at 2 the shares 1, 0.6, 0.3 and 0.1 become 1, 0.77, 0.55 and 0.32."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert drawn_ids(logits) == {0, 1, 2, 3}
    assert drawn_ids(logits, min_p=0.2) == {0, 1, 2}
    assert drawn_ids(logits, min_p=0.5) == {0, 1}
    assert drawn_ids(logits, min_p=1.0) == {0}
    assert drawn_ids(logits, min_p=0.5, temperature=2.0) == {0, 1, 2}
    assert drawn_ids(logits, min_p=0.2, top_k=2) == {0, 1}
    assert drawn_ids([1.0, 1.0, 0.0], min_p=1.0) == {0, 1}  # ties stay together


def test_no_temperature_is_too_low():
    for temperature in (1e-45, 1e-30, 1e-3):
        assert drawn_ids([-1e9, 3.0, 2.9, -jnp.inf], rows=50, temperature=temperature) == {1}
