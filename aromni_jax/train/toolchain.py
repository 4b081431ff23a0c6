"""What a compiled program depends on besides a run's config: versions, the library's source, the kind of CPU.

Loads without jax.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib
import platform

PACKAGES = ("jax", "jaxlib", "libtpu")


def versions() -> dict[str, str]:
    """Installed version of each of `PACKAGES`, or "absent"."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def source_hash() -> str:
    """SHA-256 over the library, which is all of the source that the compiled step depends on."""
    import aromni_jax

    root = pathlib.Path(aromni_jax.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def cpu_name() -> str:
    """A name for the kind of CPU: two that have the same name have the same instructions."""
    facts = {platform.machine(), platform.processor()}
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        keys = ("model name", "flags", "Features", "CPU part")
        facts |= {line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith(keys)}
    return "cpu-" + hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:16]
