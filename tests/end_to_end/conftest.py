"""One compilation cache for all runs of a session: they compile the same few steps."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of the cache, for runs in processes of their own."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return pathlib.Path(given) if given else tmp_path_factory.mktemp("xla_cache")


@pytest.fixture(scope="session")
def compile_once(cache: pathlib.Path) -> Iterator[None]:
    """The same for runs inside the test process."""
    options = {"jax_compilation_cache_dir": str(cache), "jax_persistent_cache_min_compile_time_secs": 0.5}
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
