"""Compiled programs are kept where the next start finds them, and nowhere if the user says so."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from launch import compile_cache
from launch.compile_cache import keep_compiled_programs
from tests.fixtures.source_tree import ROOT


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """No folder is given, the home is empty, and what the test sets is put back."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_one_process_uses_the_folder_of_the_user_and_several_the_workdir(unset, monkeypatch, tmp_path):
    keep_compiled_programs(tmp_path / "run")
    own = pathlib.Path(jax.config.jax_compilation_cache_dir)
    assert own.is_dir() and own.parent == tmp_path / "cache" / "aromni" / "xla"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    keep_compiled_programs(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "compiled" / own.name)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    keep_compiled_programs(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "compiled")


@pytest.mark.parametrize("given", ["", "/somewhere/else"])
def test_what_the_user_says_is_left_alone(unset, monkeypatch, tmp_path, given):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    keep_compiled_programs(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir is None and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_done_without(unset, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_programs(tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir is None and "compiled programs are not kept" in caplog.text


def test_another_kind_of_cpu_has_another_folder(monkeypatch):
    here = compile_cache._cpu()
    assert here == compile_cache._cpu()
    monkeypatch.setattr(compile_cache.platform, "machine", lambda: "another")
    assert here != compile_cache._cpu()


@pytest.mark.slow
def test_a_second_start_compiles_nothing_anew(tmp_path):
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    environment = kept | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    # The step of the smallest model compiles faster than jax finds worth keeping.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    programs, seconds = [], []
    for name in ("first", "second"):
        words = [
            "train",
            "--config=configs/pretrain.py:debug",
            "--config.total_steps=5",
            f"--workdir={tmp_path / name}",
        ]
        command = [sys.executable, "-m", "launch.cli", *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        programs.append({file.name for file in (tmp_path / "cache").rglob("*-cache")})
        seconds.append(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["compile_seconds"])
    assert any("traced" in name for name in programs[0]) and programs[0] == programs[1]
    assert seconds[1] < 0.7 * seconds[0]
