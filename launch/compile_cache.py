"""Where compiled programs are kept, so that the next start of a run reads them instead of compiling again."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import platform

log = logging.getLogger(__name__)


def keep_compiled_programs(workdir: pathlib.Path) -> None:
    """Gives jax a folder for compiled programs, unless the user did (`JAX_COMPILATION_CACHE_DIR`; empty: keep none).

    A process on its own uses `~/.cache/aromni/xla` (`$XDG_CACHE_HOME`), for all runs of a user. Of several, jax lets
    only process 0 write, so the others must read what it wrote: they use `compiled/` in `workdir`, which all share.
    Call it when the processes have joined and before anything is compiled.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = workdir / "compiled" if jax.process_count() > 1 else pathlib.Path(home) / "aromni" / "xla"
    if jax.default_backend() == "cpu":
        # Code for one CPU may use instructions that another does not have, and homes are shared between machines.
        folder /= _cpu()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled programs are not kept: %s: %s", folder, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _cpu() -> str:
    """A name for the kind of CPU: two that have the same name have the same instructions."""
    facts = {platform.machine(), platform.processor()}
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        keys = ("model name", "flags", "Features", "CPU part")
        facts |= {line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith(keys)}
    return "cpu-" + hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:16]
