"""Where compiled programs are kept, so that the next start of a run reads them instead of compiling again."""

from __future__ import annotations

import logging
import os
import pathlib

from aromni_jax.train import toolchain

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
        folder /= toolchain.cpu_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled programs are not kept: %s: %s", folder, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
