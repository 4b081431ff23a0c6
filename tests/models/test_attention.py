"""Every way to compute attention equals the plain one, values and gradients, packed rows and GQA included."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from aromni_jax import partitioning
from aromni_jax.config import MeshConfig
from aromni_jax.models import attention_kernels
from aromni_jax.models.attention import attention
from aromni_jax.models.layers import REMAT_POLICIES
from launch.plan import QUIET_COMPILER
from tests.fixtures.source_tree import ROOT
from tests.fixtures.tpu_compiler import needs_tpu_compiler


def packed_rows(num_rows, length, num_heads, num_kv_heads, head_dim, dtype=jnp.float32):
    """(queries, keys, values, what is asked of the output) and segments: up to four documents a row, then padding."""
    rng = np.random.default_rng(length + head_dim)
    shapes = [(num_rows, length, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    segments = np.sort(rng.integers(1, 5, (num_rows, length)), axis=1).astype(np.int32)
    segments[:, length - 7 :] = 0
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes], segments


def value_and_gradients(arrays, segments, implementation, mesh=None):
    def run(q, k, v, probe):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, segments, implementation=implementation), q, k, v)
        return out, *pull(probe)

    if mesh is not None:
        names = [("batch", "length", heads, None) for heads in ("heads", "kv_heads", "kv_heads", "heads")]
        arrays = [jax.device_put(x, NamedSharding(mesh, partitioning.spec(n))) for x, n in zip(arrays, names)]
        run = partitioning.on_mesh(run, mesh)
    return [np.asarray(x, np.float32) for x in jax.jit(run)(*arrays)]


def assert_close(have, want, tolerance=1e-5):
    for left, right in zip(have, want, strict=True):
        np.testing.assert_allclose(left, right, atol=tolerance, rtol=tolerance)


@pytest.fixture
def short_blocks(monkeypatch):
    """Splash in blocks of 128, so that short rows have blocks to skip."""
    monkeypatch.setattr(attention_kernels, "_SPLASH_BLOCK_LENGTH", 128)


@pytest.fixture
def keys_in_blocks(monkeypatch):
    """Blocked attention takes keys of rows of any length block by block."""
    monkeypatch.setattr(attention_kernels, "WHOLE_KEYS", 0)


@pytest.fixture(params=["all keys at once", "keys in blocks"])
def ways_of_keys(request):
    if request.param == "keys in blocks":
        request.getfixturevalue("keys_in_blocks")


@pytest.mark.parametrize("length, num_kv_heads", [(100, 4), (128, 2), (300, 4), (513, 1)])
def test_blocked_equals_reference(ways_of_keys, length, num_kv_heads):
    rows = packed_rows(2, length, 4, num_kv_heads, 8)
    assert_close(value_and_gradients(*rows, "blocked"), value_and_gradients(*rows, "reference"))


@pytest.mark.parametrize("lengths", [(900,), (128, 128, 644), (1, 300, 20, 400), (700, 190)])
def test_blocked_sees_all_of_each_document(ways_of_keys, lengths):
    """Documents of any length, on and off the borders of blocks, other ones in the other row; padding behind them."""
    arrays, _ = packed_rows(2, 900, 2, 2, 8)
    segments = np.zeros((2, 900), np.int32)
    ends = np.cumsum(lengths)
    for row, shift in ((0, 0), (1, 77)):
        for number, (start, stop) in enumerate(zip(ends - lengths, ends), 1):
            segments[row, start if number == 1 else start - shift : stop] = number
    assert_close(value_and_gradients(arrays, segments, "blocked"), value_and_gradients(arrays, segments, "reference"))


def test_blocked_never_reads_blocks_of_other_documents(keys_in_blocks):
    """What is not a number stays where it is: the second document has the values and gradients that it has alone."""
    arrays, _ = packed_rows(1, 1024, 2, 2, 8)
    border = attention_kernels.QUERIES_LENGTH
    segments = np.repeat([[1, 2]], border, axis=1).astype(np.int32)
    q, k, v, probe = arrays
    spoiled = [q, k.at[:, :border].set(jnp.nan), v.at[:, :border].set(jnp.nan), probe]
    alone = [x[:, border:] for x in arrays]
    have, want = (value_and_gradients(x, s, "blocked") for x, s in ((spoiled, segments), (alone, segments[:, border:])))
    assert np.isnan(have[0][:, :border]).all()
    assert_close([x[:, border:] for x in have], want)


def test_blocked_sees_a_document_in_two_places():
    arrays, _ = packed_rows(1, 1536, 2, 2, 8)
    segments = np.repeat([[1, 2, 3, 1, 1, 0]], 256, axis=1)
    assert_close(value_and_gradients(arrays, segments, "blocked"), value_and_gradients(arrays, segments, "reference"))


@pytest.mark.parametrize("length, num_kv_heads, head_dim", [(384, 2, 64), (256, 1, 96)])
def test_splash_equals_reference(short_blocks, length, num_kv_heads, head_dim):
    rows = packed_rows(2, length, 4, num_kv_heads, head_dim)
    assert_close(value_and_gradients(*rows, "splash"), value_and_gradients(*rows, "reference"))


@pytest.mark.parametrize("implementation", ["reference", "blocked", "splash"])
def test_bfloat16_stays_close_to_float32(implementation):
    """bfloat16 keeps 8 bits: within 2 % of the largest value, for output and gradients, whatever the way."""
    arrays, segments = packed_rows(1, 256, 4, 2, 128, jnp.bfloat16)
    have = value_and_gradients(arrays, segments, implementation)
    want = value_and_gradients([x.astype(jnp.float32) for x in arrays], segments, "reference")
    for left, right in zip(have, want, strict=True):
        assert np.abs(left - right).max() < 0.02 * np.abs(right).max()


@pytest.mark.parametrize(
    "implementation, mesh",
    [
        ("blocked", MeshConfig(2, 2, 1, 2)),
        ("blocked", MeshConfig(1, 2, 2, 2)),
        ("blocked", MeshConfig(1, 2, 4, 1)),
        ("splash", MeshConfig(2, 1, 2, 2)),
    ],
)
def test_rows_heads_and_length_may_be_split_over_devices(short_blocks, implementation, mesh):
    rows = packed_rows(4, 512, 4, 2, 64)
    have = value_and_gradients(*rows, implementation, partitioning.make_mesh(mesh))
    assert_close(have, value_and_gradients(*rows, "reference"))


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 1, 2), MeshConfig(1, 2, 4, 1)])
def test_rows_whose_keys_come_in_blocks_may_be_split_over_devices(keys_in_blocks, mesh):
    rows = packed_rows(4, 1024, 4, 2, 64)
    have = value_and_gradients(*rows, "blocked", partitioning.make_mesh(mesh))
    assert_close(have, value_and_gradients(*rows, "reference"))


@pytest.mark.parametrize("num_parts", [1, 2])
def test_cudnn_is_asked_for_the_same_pairs(monkeypatch, num_parts):
    """What is passed to jax's function, computed in XLA instead, is the reference: also for a part of the queries."""
    asked = []
    original = jax.nn.dot_product_attention

    def without_gpu(*args, implementation, **kwargs):
        asked.append(implementation)
        return original(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_gpu)
    mesh = partitioning.make_mesh(MeshConfig(1, 2, num_parts, 2), jax.devices()[: 4 * num_parts])
    rows = packed_rows(2, 256, 4, 2, 64)
    assert_close(value_and_gradients(*rows, "cudnn", mesh), value_and_gradients(*rows, "reference"))
    assert set(asked) == {"cudnn"}


def traced(kind, length=256, head_dim=64, dtype=jnp.bfloat16, rows=2, implementation="auto", policy="full"):
    """The gradient of a rematerialised layer as a jaxpr, for two devices of this kind that are not here."""
    platform = {"TPU": "tpu", "NVI": "gpu", "cpu": "cpu"}[kind[:3]]
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((1, 2, 1, 1), partitioning.MESH_AXES, (AxisType.Auto,) * 4, abstract_device=device)
    arrays, segments = packed_rows(rows, length, 2, 2, head_dim, dtype)

    def loss(q, k, v, probe):
        layer = jax.checkpoint(
            lambda *qkv: attention(*qkv, segments, implementation=implementation), policy=REMAT_POLICIES[policy]
        )
        return (layer(q, k, v) * probe).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays))


def test_the_kernel_follows_the_devices_of_the_mesh():
    assert "pallas_call" in traced("TPU v5 lite")
    for others in (
        traced("cpu"),
        traced("TPU v5 lite", length=200),
        traced("TPU v5 lite", head_dim=16),
        traced("TPU v5 lite", rows=1),
        traced("NVIDIA H100 80GB HBM3", dtype=jnp.float32),
    ):
        assert "pallas_call" not in others
    with pytest.raises(RuntimeError, match="cuDNN"):
        traced("NVIDIA H100 80GB HBM3")


def test_remat_that_keeps_attention_does_not_compute_it_again():
    full, attended = (
        traced("cpu", implementation="blocked", policy=policy).count(" exp ") for policy in ("full", "attention")
    )
    assert attended < full


_COMPILE = """
import jax, jax.numpy as jnp
from aromni_jax import partitioning
from aromni_jax.config import MeshConfig
from aromni_jax.models.attention import attention
from aromni_jax.models.layers import REMAT_POLICIES
from aromni_jax.train.estimate import describe_topology

def gradient_under(policy):
    def gradient(q, k, v, segment_ids):
        def layer(x, _):
            return attention(x, k, v, segment_ids), None

        def loss(q):
            layers = jax.checkpoint(layer, policy=REMAT_POLICIES[policy], prevent_cse=False)
            return jax.lax.scan(layers, q, None, length=2)[0].astype(jnp.float32).sum()

        return jax.grad(loss)(q)

    return gradient

# A layer runs the kernel forward, again if nothing was kept, and in the backward pass once or twice: jax decides.
calls = {}
for sizes, head_dim, policy in [
    ((1, -1, 1, 1), 64, "attention"), ((1, 2, 2, 2), 96, "full"), ((1, 4, 1, 2), 128, "full")
]:
    mesh = partitioning.make_mesh(MeshConfig(*sizes), describe_topology("v5e:2x4"))

    def array(dtype, shape, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, partitioning.spec(names)))

    q = array(jnp.bfloat16, (8, 1024, 4, head_dim), "batch", "length", "heads", None)
    k = array(jnp.bfloat16, (8, 1024, 2, head_dim), "batch", "length", "kv_heads", None)
    segment_ids = array(jnp.int32, (8, 1024), "batch", "length")
    lowered = jax.jit(partitioning.on_mesh(gradient_under(policy), mesh)).lower(q, k, k, segment_ids)
    calls[head_dim] = lowered.as_text().count("tpu_custom_call")
    lowered.compile()
    print("compiled", head_dim)
assert calls[64] >= 2 and calls[96] == calls[128] == calls[64] + 1, calls
"""


@needs_tpu_compiler
@pytest.mark.slow
def test_splash_compiles_for_tpu_in_a_scan_with_remat():
    environment = os.environ | QUIET_COMPILER
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["compiled", "64", "compiled", "96", "compiled", "128"]
