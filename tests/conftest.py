"""Eight fake CPU devices for every test, programs that compile fast, and signals as a terminal gives them."""

import os
import signal

import jax
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
_FAST_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"

# Most tests compile for far longer than they compute; those that do not are marked `computes`. Only here: processes
# that a test starts compile as they do for users.
_for_children = os.environ.get("XLA_FLAGS", "")
if _DEVICES not in _for_children:
    _for_children = f"{_for_children} {_DEVICES}".strip()
os.environ["XLA_FLAGS"] = f"{_for_children} {_FAST_TO_COMPILE}"
jax.devices()  # The flags are read once, now.
os.environ["XLA_FLAGS"] = _for_children

# A shell starts background jobs with SIGINT ignored, which children inherit: tests that interrupt would wait forever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Programs of tests marked `computes`, and of the fixtures that they are the first to ask for, are optimized."""
    jax.config.update("jax_disable_most_optimizations", item.get_closest_marker("computes") is None)


@pytest.fixture
def one_device_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a test have one device, as a user has; this one keeps its eight."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
