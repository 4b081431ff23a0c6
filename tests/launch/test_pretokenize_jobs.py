"""Pre-tokenizing across machines and processes: the shipped Slurm array and Kubernetes Indexed Job, the launcher."""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml

from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.text import ByteText
from launch import cli
from launch.local_workers import LocalWorkers
from launch.pretokenize import ProgressBar
from tests.fixtures.source_tree import ROOT

NUM_RECORDS, PER_SHARD = 70, 2
SCRIPT, MANIFEST = ROOT / "launch" / "pretokenize.sbatch", ROOT / "launch" / "pretokenize_job.yaml"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with `manifest.jsonl`, `tokenizers` and `undisturbed`, the data set one process made of them."""
    folder = tmp_path_factory.mktemp("corpus")
    TokenizerBundle(ByteText()).save(folder / "tokenizers")
    line = {"task": "text", "messages": [{"role": "assistant", "parts": [{"text": "hello world"}]}]}
    (folder / "manifest.jsonl").write_text(
        "".join(json.dumps(line | {"key": f"k{i}"}) + "\n" for i in range(NUM_RECORDS))
    )
    assert cli.main(["pretokenize", *flags(folder), f"--output={folder / 'undisturbed'}"]) == 0
    return folder


def flags(corpus: pathlib.Path) -> list[str]:
    return [
        f"--config.source={corpus / 'manifest.jsonl'}", f"--config.tokenizers={corpus / 'tokenizers'}",
        f"--config.records_per_shard={PER_SHARD}",
    ]  # fmt: skip


def digests(directory: pathlib.Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_as(words: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    """What `words`, an `aromni` command line, does in `environment`; in this process, which has everything loaded."""
    assert words[0] == "aromni"
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return cli.main(words[1:])


def bash(arguments: list[str], environment: dict[str, str], folder: pathlib.Path) -> list[str]:
    """The command line that the sbatch script runs, taken down by an `aromni` that does nothing else."""
    fake = folder / "bin" / "aromni"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" aromni "$@" > {folder}/words\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:/usr/bin:/bin"
    subprocess.run(["bash", SCRIPT, *arguments], check=True, env=environment | {"PATH": path}, cwd=folder)
    return (folder / "words").read_text().splitlines()


@pytest.mark.parametrize("first_id", [0, 5])
def test_slurm_array(corpus, tmp_path, monkeypatch, first_id):
    count, output = 4, tmp_path / "data"
    # The tasks of an array run in any order; one is requeued and runs twice.
    for task in (2, 0, 3, 0, 1):
        slurm = {
            "SLURM_ARRAY_TASK_ID": str(first_id + task),
            "SLURM_ARRAY_TASK_COUNT": str(count),
            "SLURM_ARRAY_TASK_MIN": str(first_id),
            "SLURM_ARRAY_TASK_MAX": str(first_id + count - 1),
        }
        assert not (output / "dataset.json").exists()
        words = bash([*flags(corpus), f"--output={output}"], slurm, tmp_path)
        assert run_as(words, slurm, monkeypatch) == 0
    assert digests(output) == digests(corpus / "undisturbed")


def test_sbatch_script_asks_slurm_for_what_it_says():
    text = SCRIPT.read_text()
    directives = re.findall(r"^#SBATCH --([\w-]+)", text, re.M)
    assert {"array", "requeue", "open-mode", "output"} <= set(directives)
    pages = text.replace("\\\n#", " "), (ROOT / "README.md").read_text()
    shown = [line for page in pages for line in re.findall(r"sbatch --array=0-31 launch/pretokenize.sbatch (.*)", page)]
    assert len(shown) == 2
    for line in shown:
        _, rest = cli.build_parser("pretokenize").parse_known_args(line.split())
        assert rest and all(word.startswith("--config.") for word in rest)


def test_kubernetes_indexed_job(corpus, tmp_path, monkeypatch):
    job = yaml.safe_load(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what backoffLimitPerIndex and podFailurePolicy ask for
    (container,) = pod["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert int(environment["NUM_SHARDS"]) == job["spec"]["completions"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for name in ("SOURCE", "TOKENIZERS", "OUTPUT"):
        assert any(environment[name].startswith(mount) for mount in mounts)
    output = tmp_path / "data"
    environment |= {
        "SOURCE": str(corpus / "manifest.jsonl"),
        "TOKENIZERS": str(corpus / "tokenizers"),
        "OUTPUT": str(output),
    }
    words = [*container["command"], *container["args"]]
    expanded = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word) for word in words]
    assert not any("$" in word for word in expanded)
    expanded.append(f"--config.records_per_shard={PER_SHARD}")  # the default leaves nothing for most of the pods
    for index in reversed(range(job["spec"]["completions"])):
        assert not (output / "dataset.json").exists()
        pod_environment = environment | {"JOB_COMPLETION_INDEX": str(index)}
        assert run_as(expanded, pod_environment, monkeypatch) == 0
    assert digests(output) == digests(corpus / "undisturbed")


def test_machines_of_several_workers_share_the_shards(corpus, tmp_path, monkeypatch):
    """Two machines of two workers: the launcher gives its processes four different parts."""
    started = []

    class Pretend:
        def __init__(self, commands: Any, on_events: Any, say: Any) -> None:
            self.commands, self.on_events = commands, on_events

        def run(self) -> int:
            started.extend(self.commands)
            for command in self.commands:
                assert command[1:3] == ["-m", "launch.cli"]
                assert cli.main(command[3:]) == 0
            done = {"done": 1, "total": 1, "quarantined": 0}
            self.on_events([done, {"complete": (output / "dataset.json").exists()}])
            return 0

    output = tmp_path / "data"
    monkeypatch.setattr("launch.pretokenize.LocalWorkers", Pretend)
    for machine in (1, 0):
        places = ["--num_workers=2", f"--shard_index={machine}", "--num_shards=2", f"--output={output}"]
        assert cli.main(["pretokenize", *flags(corpus), *places]) == 0
    parts = [next(word for word in command if word.startswith("--shard_index")) for command in started]
    assert parts == ["--shard_index=2", "--shard_index=3", "--shard_index=0", "--shard_index=1"]
    assert all("--num_shards=4" in command for command in started)
    assert digests(output) == digests(corpus / "undisturbed")


def workers(*programs: str) -> tuple[int, list[Any], list[str]]:
    events: list[Any] = []
    said: list[str] = []
    commands = [[sys.executable, "-c", program] for program in programs]
    status = LocalWorkers(commands, lambda latest: events.append(list(latest)), said.append).run()
    return status, events, said


def test_local_workers_merge_events_and_say_a_line_once():
    program = 'import sys; print(\'{"done": %d}\', flush=True); print("a warning", file=sys.stderr)'
    status, events, said = workers(program % 1, program % 2)
    assert status == 0 and said == ["a warning"]
    assert events[-1] == [{"done": 1}, {"done": 2}] and None in events[0]


def test_local_workers_give_the_status_of_the_first_failure_and_let_the_others_end():
    late = "import time; time.sleep(1); print('{\"done\": 1}', flush=True); raise SystemExit(4)"
    status, events, said = workers("raise SystemExit(3)", late)
    assert status == 3 and events == [[None, {"done": 1}]]
    assert said == [
        "worker 0 of 2 failed with status 3; what it finished stays",
        "worker 1 of 2 failed with status 4; what it finished stays",
    ]
    assert workers("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")[0] == 137


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_local_workers_pass_signals_on(name, status):
    """A launcher in a process of its own, whose two workers each say that they are there and wait."""
    waiting = "import time; print('{}', flush=True); time.sleep(60)"
    program = f"""
import os, signal, sys
from launch.local_workers import LocalWorkers
def at_work(events):
    if None not in events:
        os.kill(os.getpid(), signal.{name})
sys.exit(LocalWorkers([[sys.executable, "-c", {waiting!r}]] * 2, at_work, lambda line: None).run())
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=30).returncode == status


def test_workers_below_one_and_a_part_that_is_not_there(corpus, tmp_path, capsys):
    command = ["pretokenize", *flags(corpus), f"--output={tmp_path / 'data'}"]
    assert cli.main([*command, "--num_workers=0"]) == 1
    assert "--num_workers=0 must be at least 1" in capsys.readouterr().err
    assert cli.main([*command, "--shard_index=4", "--num_shards=4"]) == 1
    assert "must lie in 0..3" in capsys.readouterr().err


def test_verify_names_the_shard_that_was_damaged_since_and_it_is_made_again(corpus, tmp_path, capsys):
    output = tmp_path / "data"
    shutil.copytree(corpus / "undisturbed", output)
    shard = output / "shard_00003.array_record"
    content = bytearray(shard.read_bytes())
    content[300] ^= 1
    shard.write_bytes(content)
    command = ["pretokenize", *flags(corpus), f"--output={output}", "--verify"]
    assert cli.main(command) == 1
    assert "shard_00003.array_record is damaged" in (told := capsys.readouterr().err)
    assert "delete shard_00003.json and run `aromni pretokenize` again" in told
    (output / "shard_00003.json").unlink()
    assert cli.main(command) == 0
    assert digests(output) == digests(corpus / "undisturbed")


class Terminal(io.StringIO):
    """Text that believes it is on a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_bar_draws_over_itself_and_forgets_what_was_there_before():
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        bar = ProgressBar(stream)
        bar.update({"done": 900, "total": 1000, "seconds": 1.0, "quarantined": 0})  # shards of an earlier run
        for second in range(2, 12):
            done = 900 + 10 * (second - 1)
            bar.update({"done": done, "total": 1000, "seconds": float(second), "quarantined": 0})
        bar.update({"done": 1000, "total": 1000, "seconds": 12.0, "quarantined": 0})
        bar.close()
    drawn = terminal.getvalue()
    bar = ProgressBar(said := Terminal())
    bar.update({"done": 5, "total": 5, "seconds": 1.0, "quarantined": 0})
    bar.say("a warning")
    assert re.search(r"\x1b\[2Ka warning\n\[#{24}\] 5 of 5 records, 5 records/s.*$", said.getvalue())
    assert drawn.count("\r\x1b[2K[") == 11 and drawn.endswith("\n") and drawn.count("\n") == 1
    assert "[######################..] 910 of 1,000 records, 10 records/s, 9 s left, 0 bad" in drawn
    lines = pipe.getvalue().splitlines()
    assert (
        len(lines) == 3
        and "starting" in lines[0]
        and lines[-1].startswith("1,000 of 1,000 records")
        and "\r" not in pipe.getvalue()
    )
