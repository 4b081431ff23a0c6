"""Pre-tokenizing killed again and again, with another number of processes each time: the bytes are those of one run."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.text import ByteText
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from launch.cli import main
from tests.fixtures.data_fakes import config_for, fake_bundle, write_corpus
from tests.fixtures.killable_worker import Phase, killable_worker
from tests.fixtures.source_tree import ROOT

pytestmark = pytest.mark.slow
SECONDS = 0.03
"""What a batch of pictures, and each file before it is renamed, takes in a killable worker."""


def digests(directory: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, hidden ones included."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finished_shards(directory: pathlib.Path) -> set[str]:
    return {path.name for path in directory.glob("shard_*.json")}


def test_kills_at_random_moments_of_every_phase(tmp_path: pathlib.Path) -> None:
    records, per_shard = 280, 4
    config = config_for(write_corpus(tmp_path / "corpus", records), records_per_shard=per_shard, media_batch_size=1)
    assert pretokenize(config, tmp_path / "undisturbed", bundle=fake_bundle())
    output = tmp_path / "killed"
    rng = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fixtures.killable_worker"])
    killed_in: Counter[Phase] = Counter()
    half_written = 0
    shards_between = []

    def round_of(num_workers: int, at_work_in: set[Phase], longest: float) -> None:
        """Starts workers and kills each at a random moment after it is in one of the phases `at_work_in`."""
        nonlocal half_written
        workers = []
        for index in range(num_workers):
            phase = context.Value("i", Phase.STARTING, lock=False)
            arguments = (config, output, index, num_workers, SECONDS, phase)
            worker = context.Process(target=killable_worker, args=arguments)
            worker.start()
            workers.append((worker, phase))
        for worker, phase in rng.sample(workers, num_workers):
            while worker.is_alive() and phase.value not in at_work_in:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, longest))
            where = Phase(phase.value)
            worker.kill()
            worker.join()
            if worker.exitcode == -signal.SIGKILL and where not in (Phase.STARTING, Phase.OVER):
                killed_in[where] += 1
                half_written += any(output.glob(f".tmp-*-{worker.pid}"))
        shards_between.append(len(finished_shards(output)))

    at_work = {Phase.ENCODING, Phase.WRITING}
    for num_workers in (1, 2, 3, 2, 4, 1, 2, 3, 2, 4):
        round_of(num_workers, at_work, longest=0.3)
    assert sum(killed_in.values()) >= 20
    assert killed_in[Phase.ENCODING] >= 3 and killed_in[Phase.WRITING] >= 3 and half_written >= 3
    # Work was done between the kills, and most of it was still to do after the last: none of them came too late.
    assert sorted(shards_between) == shards_between and 0 < shards_between[-1] < records // per_shard
    kept = {name: (output / name).stat().st_mtime_ns for name in finished_shards(output)}
    for num_workers in (4, 2, 3):
        round_of(num_workers, {Phase.FINALIZING}, longest=4 * SECONDS)
    assert killed_in[Phase.FINALIZING] >= 2
    assert pretokenize(config, output, bundle=fake_bundle())
    assert digests(output) == digests(tmp_path / "undisturbed")  # no temporary is left either
    assert all((output / name).stat().st_mtime_ns == changed for name, changed in kept.items())
    assert len(TokenDataset(output, verify=True)) == records


def test_workers_that_finish_at_the_same_moment(tmp_path: pathlib.Path) -> None:
    """Four workers find every shard finished at once, and each of them completes the data set."""
    config = config_for(write_corpus(tmp_path / "corpus", 12), records_per_shard=4)
    assert pretokenize(config, tmp_path / "undisturbed", bundle=fake_bundle())
    output = tmp_path / "raced"
    output.mkdir()
    for shard in (tmp_path / "undisturbed").glob("shard_*"):
        shutil.copy(shard, output)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fixtures.killable_worker"])
    phases = [context.Value("i", Phase.STARTING, lock=False) for _ in range(4)]
    workers = [
        context.Process(target=killable_worker, args=(config, output, index, 4, 0.2, phase))
        for index, phase in enumerate(phases)
    ]
    for worker in workers:
        worker.start()
    together = 0
    while any(worker.is_alive() for worker in workers):
        together = max(together, sum(phase.value == Phase.FINALIZING for phase in phases))
        time.sleep(0.002)
    assert [worker.exitcode for worker in workers] == [0] * 4 and together >= 2
    assert digests(output) == digests(tmp_path / "undisturbed")


def test_kills_of_the_command(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture) -> None:
    TokenizerBundle(ByteText()).save(tmp_path / "tokenizers")
    rng = random.Random(1)
    lines = []
    for i in range(1600):
        text = " ".join(rng.choices(["red", "blue", "circle", "star"], k=rng.randint(20, 200)))
        messages = [{"role": "assistant", "parts": [{"text": text}]}]
        lines.append(json.dumps({"key": f"k{i}", "task": "text", "messages": messages}) + "\n")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(lines))
    arguments = [
        "pretokenize", f"--config.source={manifest}", f"--config.tokenizers={tmp_path / 'tokenizers'}",
        "--config.records_per_shard=20",
    ]  # fmt: skip
    assert main([*arguments, f"--output={tmp_path / 'undisturbed'}"]) == 0
    output = tmp_path / "killed"

    def started(num_workers: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "launch.cli", *arguments, f"--num_workers={num_workers}"]
        return subprocess.Popen([*command, f"--output={output}"], cwd=ROOT)

    def writing_process(among: subprocess.Popen[bytes]) -> int:
        """The process id in the name of a temporary file: that process has a shard half written."""
        deadline = time.monotonic() + 120
        while among.poll() is None and time.monotonic() < deadline:
            for name in os.listdir(output) if output.exists() else ():
                found = re.fullmatch(r"\.tmp-shard_\d+.*-(\d+)", name)
                if found and pathlib.Path(f"/proc/{found[1]}").exists():
                    return int(found[1])
            time.sleep(0.001)
        pytest.fail("the command ended before it was seen at work")

    alone = started(1)
    assert writing_process(alone) == alone.pid
    time.sleep(rng.uniform(0, 0.3))
    assert alone.poll() is None
    alone.kill()
    alone.wait()
    assert len(finished_shards(output)) < 80 and not (output / "dataset.json").exists()

    two = started(2)
    os.kill(writing_process(two), signal.SIGKILL)
    assert two.wait() == 128 + signal.SIGKILL
    told = capfd.readouterr().err
    assert "of 2 was ended by signal 9; what it finished stays" in told and "goes on where this one stopped" in told
    assert len(finished_shards(output)) < 80 and not (output / "dataset.json").exists()

    again = started(2)
    writing_process(again)
    again.send_signal(signal.SIGTERM)
    assert again.wait() == 128 + signal.SIGTERM
    left_half = any(output.glob(".tmp-*"))

    assert main([*arguments, f"--output={output}", "--verify"]) == 0
    assert "all 80 shards have the SHA-256 they were written with" in capfd.readouterr().out
    assert digests(output) == digests(tmp_path / "undisturbed"), f"temporaries were there before: {left_half}"
