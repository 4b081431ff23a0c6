"""Launch scripts: what they print with --dry-run is a command of ours, and what they fill in is a whole manifest."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest
import yaml

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
    assert words[0] == "aromni"
    args, rest = cli.build_parser(words[1]).parse_known_args(words[2:])
    assert all(word.startswith("--config.") for word in rest)
    if hasattr(args, "config"):
        args.config_overrides = rest
        load_config(args)
    return words[1:]


def test_slurm():
    words = shlex.split(bash("launch/slurm.sbatch", "--dry-run", *TRAIN))
    assert words[:2] == ["srun", "--kill-on-bad-exit=1"]
    assert parse(words[2:]) == TRAIN
    directives = re.findall(r"^#SBATCH --([\w-]+)", (ROOT / "launch" / "slurm.sbatch").read_text(), re.M)
    assert {"nodes", "ntasks-per-node", "signal", "requeue", "open-mode"} <= set(directives)


@pytest.mark.parametrize(
    ("status", "is_again"),
    [(0, False), (1, False), (2, False), *((status, True) for status in RESTARTED), (134, True)],
)
def test_slurm_queues_again_what_may_go_on(tmp_path, status, is_again):
    for name, body in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/again')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    bash("launch/slurm.sbatch", *TRAIN, expected=status, **variables)
    assert (tmp_path / "again").exists() == is_again
    if is_again:
        assert (tmp_path / "again").read_text() == "requeue 7\n"


def test_slurm_gives_up_after_so_many_tries(tmp_path):
    for name, body in (("srun", "exit 70"), ("scontrol", f"touch {tmp_path}/again")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "TRIES": "3"}
    said = bash("launch/slurm.sbatch", *TRAIN, expected=70, SLURM_RESTART_COUNT="2", **variables)
    assert "status 70 (try 3 of 3): not queued again" in said and not (tmp_path / "again").exists()
    said = bash("launch/slurm.sbatch", *TRAIN, expected=70, SLURM_RESTART_COUNT="1", **variables)
    assert "status 70 (try 2 of 3): queued again" in said and (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("statuses", "expected"), [("0", (0, 1)), ("1", (1, 1)), ("75 137 0", (0, 3)), ("75 75 75", (75, 3))]
)
def test_tpu_vm_runs_the_command_on_every_host_until_it_is_done(tmp_path, statuses, expected):
    words = shlex.split(bash("launch/tpu_vm.sh", "--dry-run", *WHERE["launch/tpu_vm.sh"], *TRAIN, TRIES="3"))
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "name"]
    assert words[6:8] == ["--zone=zone", "--worker=all"]
    (remote,) = [word.removeprefix("--command=") for word in words[8:]]
    # An `aromni` that writes down its arguments and ends with the next status of the list.
    (tmp_path / "statuses").write_text(statuses.replace(" ", "\n") + "\n")
    (tmp_path / "aromni").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/words; echo x >> {tmp_path}/runs\n'
        f"status=$(head -1 {tmp_path}/statuses); sed -i 1d {tmp_path}/statuses; exit $status\n"
    )
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("aromni", "sleep"):
        (tmp_path / name).chmod(0o755)
    bash("-c", remote, expected=expected[0], PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (tmp_path / "runs").read_text().count("x") == expected[1]
    assert parse(["aromni", *(tmp_path / "words").read_text().splitlines()]) == TRAIN


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
    assert parse([*container["command"], *container["args"]]) == TRAIN


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
    assert parse(bash("-c", f"printf '%s\n' {options['command']}").splitlines()) == TRAIN


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


@pytest.mark.parametrize("page", ["README.md", *WHERE])
def test_lines_shown_are_taken_by_the_scripts(page):
    text = (ROOT / page).read_text().replace("\\\n#", "")
    found = []
    for line in text.splitlines():
        shown = re.search(
            r"(?:bash|sbatch --nodes=16) (launch/(?:tpu_vm\.sh|gke\.sh|xpk\.sh|slurm\.sbatch)) (.*)", line
        )
        if shown and "..." not in line and "usage" not in line:
            found.append((shown[1], shlex.split(shown[2], comments=True)))
    assert found
    for script, words in found:
        words = [word for word in words if word != "--dry-run"]
        bash(script, "--dry-run", *words)
        parse(["aromni", *words[len(WHERE[script]) :]])
