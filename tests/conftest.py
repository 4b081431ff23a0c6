"""Eight fake CPU devices, set before jax starts; programs that compile fast; signals as a terminal gives them."""

import os
import signal

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

# A shell starts background jobs with SIGINT ignored, which children inherit: tests that interrupt would wait forever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Most tests compile for far longer than they compute: only those marked `optimized` ask LLVM for fast programs.

    Processes that a test starts compile as they do for users.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", item.get_closest_marker("optimized") is None)


@pytest.fixture
def one_device_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a test have one device, as a user has; this one keeps its eight."""
    import jax

    jax.devices()  # Counted once, when jax first needs them.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
