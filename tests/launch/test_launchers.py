"""Launch scripts: what they print with --dry-run is a command of ours, and what they fill in is a whole manifest."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import time
import types

import pytest
import yaml

from aromni_jax.config import TrainConfig, from_mapping
from aromni_jax.partitioning import mesh_sizes
from aromni_jax.train.watchdog import EXIT_HELD, EXIT_TRY_AGAIN, EXIT_UNEXPECTED
from launch import cli
from launch.flags import load_config
from tests.fixtures.source_tree import ROOT

TRAIN = [
    "train",
    "--config=configs/pretrain.py:7b",
    "--config.data.mixture={'a': {'path': \"x y\"}}",
    "--workdir=/w/$x",
]
STARTED = ["train", f"--exit_status_if_stopped={EXIT_TRY_AGAIN}", *TRAIN[1:]]
"""What launchers make of it: a run that is stopped before its end is one to start again."""
WHERE = {
    "launch/tpu_vm.sh": ["name", "zone", "--"],
    "launch/gke.sh": ["my-run", "--"],
    "launch/xpk.sh": ["my-run", "--"],
    "launch/slurm.sbatch": [],
}


RESTARTED = (EXIT_HELD, EXIT_UNEXPECTED, EXIT_TRY_AGAIN)
"""Exit statuses of ours after which a launcher starts the run again."""


def bash(*words: str, expected: int = 0, **variables: str) -> str:
    environment = {"PATH": os.environ["PATH"]} | variables
    done = subprocess.run(["bash", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr
    return done.stdout if expected == 0 else done.stderr


def parse(words: list[str]) -> list[str]:
    """Checks a command line of ours and returns its arguments."""
    read(words)
    return words[1:]


def read(words: list[str]):
    """The config of a command line of ours, None where it has none."""
    assert words[0] == "aromni"
    args, rest = cli.build_parser(words[1]).parse_known_args(words[2:])
    assert all(word.startswith("--config.") for word in rest)
    if not hasattr(args, "config"):
        return None
    args.config_overrides = rest
    return load_config(args)


def make_commands(folder, **bodies: str) -> str:
    """A PATH on which these shell scripts come first."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_slurm():
    words = shlex.split(bash("launch/slurm.sbatch", "--dry-run", *TRAIN))
    assert words[:2] == ["srun", "--kill-on-bad-exit=1"]
    assert parse(words[2:]) == STARTED
    assert shlex.split(bash("launch/slurm.sbatch", "--dry-run", "doctor"))[2:] == ["aromni", "doctor"]
    directives = re.findall(r"^#SBATCH --([\w-]+)", (ROOT / "launch" / "slurm.sbatch").read_text(), re.M)
    assert {"nodes", "ntasks-per-node", "signal", "requeue", "open-mode"} <= set(directives)


@pytest.mark.parametrize(
    ("status", "is_again"),
    [(0, False), (1, False), (2, False), *((status, True) for status in RESTARTED), (134, True)],
)
def test_slurm_queues_again_what_may_go_on(tmp_path, status, is_again):
    path = make_commands(tmp_path, srun=f"exit {status}", scontrol=f'echo "$@" > {tmp_path}/again')
    variables = {"PATH": path, "SLURM_JOB_ID": "7"}
    bash("launch/slurm.sbatch", *TRAIN, expected=status, **variables)
    assert (tmp_path / "again").exists() == is_again
    if is_again:
        assert (tmp_path / "again").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("command", "status"), [(TRAIN, EXIT_TRY_AGAIN), (["doctor"], 0)])
def test_slurm_queues_again_what_it_has_stopped(tmp_path, command, status):
    """`srun` is here a run that SIGTERM stops: it ends with what it was told for that case, or 0."""
    stopped = 'for word; do case "$word" in --exit_status_if_stopped=*) exit "${word#*=}";; esac; done'
    path = make_commands(tmp_path, srun=stopped, scontrol=f'echo "$@" > {tmp_path}/again')
    bash("launch/slurm.sbatch", *command, expected=status, PATH=path, SLURM_JOB_ID="7")
    assert (tmp_path / "again").exists() == (status > 0)


@pytest.mark.parametrize("is_interrupted", [True, False])
@pytest.mark.parametrize(("flags", "expected"), [([], 0), (["--exit_status_if_stopped=75"], 75)])
def test_only_a_run_stopped_before_its_end_has_the_status_for_that(
    tmp_path, monkeypatch, is_interrupted, flags, expected
):
    result = types.SimpleNamespace(is_interrupted=is_interrupted)
    monkeypatch.setattr("launch.train.run_training", lambda *_, **__: result)
    for name in ("keep_compiled_programs", "keep_freed_memory_on_cpu", "start_logging"):
        monkeypatch.setattr(f"launch.train.{name}", lambda *_: None)
    words = ["--config=configs/pretrain.py:debug", f"--workdir={tmp_path}", *flags]
    assert cli.run("train", words) == (expected if is_interrupted else 0)


def test_slurm_gives_up_after_so_many_tries(tmp_path):
    path = make_commands(tmp_path, srun="exit 70", scontrol=f"touch {tmp_path}/again")
    variables = {"PATH": path, "SLURM_JOB_ID": "7", "TRIES": "3"}
    said = bash("launch/slurm.sbatch", *TRAIN, expected=70, SLURM_RESTART_COUNT="2", **variables)
    assert "status 70 (try 3 of 3): not queued again" in said and not (tmp_path / "again").exists()
    said = bash("launch/slurm.sbatch", *TRAIN, expected=70, SLURM_RESTART_COUNT="1", **variables)
    assert "status 70 (try 2 of 3): queued again" in said and (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("statuses", "expected"), [("0", (0, 1)), ("1", (1, 1)), ("75 137 0", (0, 3)), ("75 75 75", (75, 3))]
)
def test_tpu_vm_runs_the_command_on_every_host_until_it_is_done(tmp_path, statuses, expected):
    remote = on_every_host(*TRAIN, TRIES="3")
    # An `aromni` that writes down its arguments and ends with the next status of the list.
    (tmp_path / "statuses").write_text(statuses.replace(" ", "\n") + "\n")
    path = make_commands(
        tmp_path,
        aromni=f'printf "%s\\n" "$@" > {tmp_path}/words; echo x >> {tmp_path}/runs; echo said\n'
        f"status=$(head -1 {tmp_path}/statuses); sed -i 1d {tmp_path}/statuses; exit $status",
        sleep="",
    )
    bash("-c", remote, expected=expected[0], PATH=path, HOME=str(tmp_path))
    assert (tmp_path / "aromni.log").read_text().count("said") == expected[1]
    assert (tmp_path / "runs").read_text().count("x") == expected[1]
    assert parse(["aromni", *(tmp_path / "words").read_text().splitlines()]) == STARTED


def on_every_host(*arguments: str, **variables: str) -> str:
    """What `launch/tpu_vm.sh` hands to the shell of every host."""
    words = shlex.split(bash("launch/tpu_vm.sh", "--dry-run", *WHERE["launch/tpu_vm.sh"], *arguments, **variables))
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "name"]
    assert words[6:8] == ["--zone=zone", "--worker=all"]
    (remote,) = [word.removeprefix("--command=") for word in words[8:]]
    return remote


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_on_a_tpu_vm_outlives_the_connection_and_stops_when_told(tmp_path):
    """Its `aromni` runs until it is told to stop, and has then a status that is started again."""
    path = make_commands(
        tmp_path,
        aromni="trap 'echo saved; exit 75' TERM; echo started; while true; do echo step; sleep 0.05; done",
    )
    environment = {"PATH": path, "HOME": str(tmp_path)}
    # Under nohup a shell would pass on that it hears no SIGHUP.
    command = ["env", "--default-signal=HUP", "bash", "-c", on_every_host(*TRAIN)]
    log, kill = tmp_path / "aromni.log", ["-c", "kill $(cat ~/aromni.pid)"]
    log.write_text("of an earlier run\n")
    connection = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert connection.stdout.readline() == "started\n"
        # What sshd does when it has lost the other end.
        os.killpg(connection.pid, signal.SIGHUP)
        connection.communicate(timeout=60)
        seen = log.read_text().count("step")
        wait_for(lambda: log.read_text().count("step") > seen + 3)
        assert "already" in bash("-c", command[-1], expected=1, **environment)
    finally:
        pid = int((tmp_path / "aromni.pid").read_text())
        bash(*kill, **environment)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    lines = log.read_text().splitlines()
    assert lines[0] == "of an earlier run" and lines[-1] == "saved" and lines.count("started") == 1


def with_slices(number: int) -> list[str]:
    keys = [f"--config.mesh.num_slices={number}", f"--config.mesh.data={number}"]
    return [*STARTED[:2], *keys, *STARTED[2:]]


def test_gke_jobset():
    places = {
        "IMAGE": "registry/aromni:1",
        "CLAIM": "disk",
        "TOPOLOGY": "4x4",
        "HOSTS": "4",
        "SLICES": "2",
        "CHIPS": "4",
    }
    text = bash("launch/gke.sh", "--dry-run", *WHERE["launch/gke.sh"], *TRAIN, **places)
    assert "{{" not in text
    jobset = yaml.safe_load(text)
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "my-run")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy asks for
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"] and rule["onExitCodes"]["values"] == [1, 2]
    assert container["image"] == "registry/aromni:1"
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk"
    assert parse([*container["command"], *container["args"]]) == with_slices(2)


def test_xpk():
    places = {"IMAGE": "registry/aromni:1", "CLUSTER": "mine", "TPU_TYPE": "v6e-256", "SLICES": "2", "ZONE": "z"}
    words = shlex.split(bash("launch/xpk.sh", "--dry-run", *WHERE["launch/xpk.sh"], *TRAIN, **places))
    assert words[:3] == ["xpk", "workload", "create"]
    options = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert (
        options["workload"] == "my-run" and options["cluster"] == "mine" and options["docker-image"] == places["IMAGE"]
    )
    assert (options["tpu-type"], options["num-slices"], options["zone"]) == ("v6e-256", "2", "z")
    assert options["restart-on-exit-codes"] == ",".join(map(str, sorted(RESTARTED))) and int(options["max-restarts"])
    assert "project" not in options
    # XPK hands the command to bash.
    assert parse(bash("-c", f"printf '%s\n' {options['command']}").splitlines()) == with_slices(2)


@pytest.mark.parametrize("script", WHERE)
def test_a_launcher_without_a_command_says_how_it_is_used(script):
    assert f"{script} [--dry-run]" in bash(script, "--dry-run", *WHERE[script], expected=2)


def test_the_image_copies_what_is_there_and_installs_extras_that_exist():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        assert all((ROOT / name).exists() for name in line.split()[:-1])
    setup = (ROOT / "setup.py").read_text()
    for extra in ("tpu", "gpu", "data", "cloud"):
        assert f'"{extra}": ' in setup and extra in text
    assert 'ENTRYPOINT ["aromni"]' in text


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("mend it"), 1), (RuntimeError("RESOURCE_EXHAUSTED"), EXIT_UNEXPECTED)]
)
def test_only_errors_that_a_user_can_mend_have_the_status_that_is_not_restarted(monkeypatch, capsys, error, status):
    def fail(args):
        raise error

    monkeypatch.setattr("launch.train.main", fail)
    assert cli.run("train", TRAIN[1:]) == status
    assert capsys.readouterr().err.splitlines()[-1].startswith("aromni train: error: ")


@pytest.mark.parametrize("script", ["launch/gke.sh", "launch/xpk.sh"])
def test_keys_of_slices_given_by_hand_count(script):
    given = ["--config.mesh.num_slices=4", "--config.mesh.data=8"]
    config = planned(script, [*WHERE[script], *TRAIN, *given], SLICES="4")[0]
    assert (config.mesh.num_slices, config.mesh.data) == (4, 8)
    assert planned(script, [*WHERE[script], "doctor"], SLICES="4")[0] is None


def test_commands_of_several_processes_can_be_pasted():
    for line in bash("launch/multiprocess.sh", "--dry-run", "2", "--", *TRAIN).splitlines():
        words = shlex.split(line)
        assert words[:5] == ["JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=1", "python", "-m", "launch.cli"]
        assert words[5:-3] == TRAIN


def planned(script: str, words: list[str], options: str = "", **variables: str):
    """The config of what a launcher would start, and on how many devices."""
    text = bash(script, "--dry-run", *words, **variables)
    if script == "launch/gke.sh":
        (replicated,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
        job = replicated["template"]["spec"]
        pod = job["template"]["spec"]
        (container,) = pod["containers"]
        devices = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert devices == math.prod(int(side) for side in topology.split("x"))
        return read([*container["command"], *container["args"]]), devices * replicated["replicas"]
    line = shlex.split(text)
    if script == "launch/xpk.sh":
        flags = dict(word.removeprefix("--").split("=", 1) for word in line[3:])
        command = bash("-c", f"printf '%s\n' {flags['command']}").splitlines()
        return read(command), int(flags["tpu-type"].removeprefix("v5litepod-")) * int(flags["num-slices"])
    if script == "launch/tpu_vm.sh":
        return read(["aromni", *words[3:]]), int(words[0].removeprefix("my-v5e-"))
    nodes, gpus = re.fullmatch(r"--nodes=(\d+) --gpus-per-node=(\d+) ", options).groups()
    return read(line[2:]), int(nodes) * int(gpus)


@pytest.mark.parametrize("page", ["README.md", *WHERE])
def test_lines_shown_are_taken_by_the_scripts_and_divide_over_the_pod_they_name(page):
    text = (ROOT / page).read_text().replace("\\\n#", "")
    found = 0
    for line in text.splitlines():
        shown = re.search(
            r"^#?((?: *\w+=\S+)*) *(?:bash|sbatch) ((?:--\S+ )*)(launch/(?:\w+\.sh|slurm\.sbatch)) (.*)", line
        )
        if not shown or shown[3] not in WHERE or "..." in line:
            continue
        variables = dict(word.split("=", 1) for word in shown[1].split())
        words = [word for word in shlex.split(shown[4], comments=True) if word != "--dry-run"]
        found += 1
        for slices in ("1", "2") if shown[3] in ("launch/gke.sh", "launch/xpk.sh") else ("1",):
            config, devices = planned(shown[3], words, shown[2], **variables, SLICES=slices)
            if config is None:
                continue
            train = from_mapping(TrainConfig, config)
            data, fsdp, *_ = mesh_sizes(train.mesh, devices)
            assert devices >= 128 and train.global_batch_size % (data * fsdp * train.gradient_accumulation_steps) == 0
            assert data % train.mesh.num_slices == 0 and train.mesh.num_slices == int(slices)
    assert found
