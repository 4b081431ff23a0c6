"""cuDNN's attention: what it is told of documents, and, where an NVIDIA GPU is, that it equals the plain way.

On a machine with a GPU: JAX_PLATFORMS=cuda python -m pytest tests/models/test_cudnn.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aromni_jax.models import attention_kernels
from aromni_jax.models.attention import attention
from aromni_jax.models.attention_kernels import MAX_DOCUMENTS, document_lists
from aromni_jax.models.layers import REMAT_POLICIES

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU, or JAX_PLATFORMS leaves it out")


def row_of(lengths, row_length):
    """Segment ids of documents of these lengths, one after the other, then padding."""
    row = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:row_length]
    return np.pad(row, (0, row_length - len(row))).astype(np.int32)


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=3))
@settings(deadline=None, max_examples=50)
def test_lists_say_where_each_document_stands(rows):
    length, room = 24, 7
    segments = np.stack([row_of(lengths, length) for lengths in rows])
    starts, lengths, number = document_lists(jnp.asarray(segments), room)
    wanted = []
    for row in segments:
        edges = [0, *np.flatnonzero(np.diff(row)) + 1, length]
        wanted.append([(start, stop - start) for start, stop in zip(edges, edges[1:])])
    assert number == max(len(documents) for documents in wanted)
    for row, documents in enumerate(wanted):
        padded = documents + [(-1, -1)] * (room - len(documents))
        assert list(zip(starts[row].tolist(), lengths[row].tolist())) == padded


@pytest.mark.parametrize("policy", ["dots", "attention"])
def test_the_backward_pass_does_not_attend_again(policy, monkeypatch):
    """As jax traces it for a GPU: forward and backward once for each of the three ways to tell cuDNN of documents."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(attention_kernels, "_takes_lists", lambda: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_900)
    monkeypatch.setattr(cudnn, "check_is_flash_attention", lambda *args, **kwargs: None)

    def layer(x, w):
        q = jnp.tanh(x @ w).reshape(2, 256, 4, 64)
        return (attention(q, 2 * q, 3 * q, jnp.ones((2, 256), jnp.int32), implementation="cudnn").reshape(x.shape)) @ w

    kept = jax.checkpoint(layer, policy=REMAT_POLICIES[policy])
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 256, 256), (256, 256))]
    traced = str(jax.make_jaxpr(jax.grad(lambda *args: kept(*args).astype(jnp.float32).sum(), (0, 1)))(*arrays))
    assert traced.count("dot_product_attention_fwd_wrapper[") == 3
    assert traced.count("dot_product_attention_bwd_wrapper[") == 3


@needs_gpu
@pytest.mark.parametrize("num_documents", ["alone", 1, 5, MAX_DOCUMENTS - 1, MAX_DOCUMENTS, 40])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_cudnn_equals_the_plain_way_on_a_gpu(num_documents, num_kv_heads):
    """bfloat16 against float32: output and gradients within 1 % of their norm, padding included."""
    num_rows, length, num_heads, head_dim = 3, 512, 4, 128
    rng = np.random.default_rng(0)
    if num_documents == "alone":
        segments = np.ones((num_rows, length), np.int32)
    else:
        segments = np.stack([row_of(rng.multinomial(480, [1 / n] * n), length) for n in (num_documents, 2, 1)])
    shapes = [(num_rows, length, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]

    def value_and_gradients(implementation, dtype):
        def run(q, k, v, probe):
            out, pull = jax.vjp(lambda *qkv: attention(*qkv, segments, implementation=implementation), q, k, v)
            return out, *pull(probe)

        with jax.default_matmul_precision("highest"):
            return [np.asarray(x, np.float32) for x in jax.jit(run)(*(x.astype(dtype) for x in arrays))]

    have, want = value_and_gradients("cudnn", jnp.bfloat16), value_and_gradients("reference", jnp.float32)
    for left, right in zip(have, want, strict=True):
        assert np.linalg.norm(left - right) < 0.01 * np.linalg.norm(right)
