"""One codec trained in a process of its own, so that two train at the same time on a core each.

The parent writes one JSON line to standard input and keeps it open: when it closes, the parent is gone and so is this
process. Progress goes to standard output, one JSON object per line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from launch.host_memory import keep_freed_memory


@dataclasses.dataclass(frozen=True)
class CodecJob:
    """What to train: `kind` is image or speech, on the training split of `manifest`; `core` pins the process."""

    kind: str
    manifest: str
    steps: int
    seed: int
    workdir: str
    output: str
    core: int | None


def run_codec_jobs(jobs: Sequence[CodecJob], report: Callable[[str, dict[str, Any]], None]) -> None:
    """Runs all jobs at the same time; `report` is called with (kind, metrics) as they come, from several threads.

    Raises:
      RuntimeError: a worker failed, with the end of what it said; the other one is stopped.
    """
    workers = []
    try:
        for job in jobs:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.codec_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
            said: list[str] = []
            readers = [
                threading.Thread(target=_follow, args=(process.stdout, job.kind, report), daemon=True),
                threading.Thread(target=_collect, args=(process.stderr, said), daemon=True),
            ]
            for reader in readers:
                reader.start()
            workers.append((job, process, readers, said))
        waiting = list(workers)
        while waiting:
            for worker in list(waiting):
                job, process, readers, said = worker
                try:
                    code = process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
                for reader in readers:
                    reader.join(timeout=5)
                if code:
                    tail = "".join(said[-5:]).strip() or f"exit status {code}"
                    raise RuntimeError(f"training the {job.kind} tokenizer failed: {tail}")
                waiting.remove(worker)
    finally:
        for _, process, _, _ in workers:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _follow(stream: Any, kind: str, report: Callable[[str, dict[str, Any]], None]) -> None:
    for line in stream:
        if line.startswith("{"):
            report(kind, json.loads(line))


def _collect(stream: Any, said: list[str]) -> None:
    said.extend(stream)


def _exit_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def train_codec(job: CodecJob, progress: Callable[[dict[str, Any]], None]) -> None:
    """Trains one codec and moves it to `job.output` when it is whole; goes on where an interrupted call stopped."""
    import numpy as np

    from aromni_jax.tokenizers import image, speech
    from data_pipelines.sources import ManifestSource

    source = ManifestSource(job.manifest, split="train")
    if job.kind == "image":
        picture_config = image.QUICKSTART
        recipe = dataclasses.replace(picture_config.recipe, total_steps=job.steps)
        picture_config = dataclasses.replace(picture_config, recipe=recipe)
        size = picture_config.net.image_size
        pixels = np.stack([image.prepare_image(path, size) for path in source.media_paths("image")])
        tokenizer: Any = image.train_image_tokenizer(pixels, picture_config, job.seed, job.workdir, progress)
    else:
        sound_config = speech.QUICKSTART
        recipe = dataclasses.replace(sound_config.recipe, total_steps=job.steps)
        sound_config = dataclasses.replace(sound_config, recipe=recipe)
        rate_hz = sound_config.net.sample_rate_hz
        waveforms = [speech.prepare_sound(path, None, rate_hz) for path in source.media_paths("speech")]
        tokenizer = speech.train_speech_tokenizer(waveforms, sound_config, job.seed, job.workdir, progress)
    partial = pathlib.Path(f"{job.output}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    os.replace(partial, job.output)


def main() -> int:
    """The worker process."""
    job = CodecJob(**json.loads(sys.stdin.readline()))
    if job.core is not None and hasattr(os, "sched_setaffinity"):
        # Before jax starts: its thread pools are as wide as the processors this process may use.
        os.sched_setaffinity(0, {job.core})
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    keep_freed_memory()
    try:
        train_codec(job, lambda metrics: print(json.dumps(metrics), flush=True))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    # Reading standard input to its end must not keep the process alive: leave without waiting for that thread.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
