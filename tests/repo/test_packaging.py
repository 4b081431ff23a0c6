"""The wheel holds everything the packages hold, and works away from the checkout."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import aromni_jax
from tests.fixtures.source_tree import PACKAGES, ROOT


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def package_files(root):
    return {
        path.relative_to(root).as_posix()
        for package in PACKAGES
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def can_build_here():
    """Whether the setuptools at hand is what pyproject asks for; otherwise pip fetches it."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"][0]
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= int(wanted.rpartition("=")[2])
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A copy of the packages built into a wheel and unpacked; the checkout gets no build leftovers."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    isolation = ["--no-build-isolation"] if can_build_here() else []
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_every_file_of_the_packages(installed):
    assert package_files(ROOT) - package_files(installed) == set()


def test_wheel_has_the_version_of_the_package(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert f"\nVersion: {aromni_jax.__version__}\n" in metadata.read_text()


def test_installed_command_works_away_from_the_checkout(installed, tmp_path):
    program = """
import sys
import aromni_jax, launch.cli, launch.flags
from aromni_jax.tokenizers.prompts import SHIPPED, load_templates
assert aromni_jax.__file__.startswith(sys.argv[1]), aromni_jax.__file__
from aromni_jax.tokenizers.shipped import KINDS, shipped_directory
assert all(shipped_directory(kind).is_dir() for kind in KINDS)
assert [load_templates(name).name for name in SHIPPED] == list(SHIPPED)
launch.flags.read_config("configs/pretrain.py:debug")
sys.exit(launch.cli.main(["--help"]))
"""
    environment = {"PYTHONPATH": str(installed), "PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    listed = run(sys.executable, "-c", program, installed, cwd=tmp_path, env=environment)
    assert "aromni COMMAND --help" in listed
