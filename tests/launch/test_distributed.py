"""Which processes belong together, as Slurm, MPI, GKE and the metadata server of a TPU VM say it."""

from __future__ import annotations

import argparse
import http.server
import os
import subprocess
import sys
import threading
import time

import jax
import pytest

from launch import distributed
from tests.fixtures.free_port import free_port
from tests.fixtures.source_tree import ROOT

ALONE = argparse.Namespace(coordinator_address=None, num_processes=None, process_id=None, heartbeat_timeout_seconds=100)
CLUSTERS = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_LOCAL_DEVICE_IDS", "GCE_METADATA_IP")

JOIN = """
import argparse, os, sys
import jax
os.environ.pop("TPU_SKIP_MDS_QUERY", None) if "GCE_METADATA_IP" in os.environ else None
from launch import distributed
distributed.connect(argparse.Namespace(
    coordinator_address=None, num_processes=None, process_id=None, heartbeat_timeout_seconds=100
))
jax.config.update("jax_platforms", "cpu")
print(jax.process_index(), jax.process_count(), jax.config.read("jax_cuda_visible_devices"))
"""


def environment(**variables: str) -> dict[str, str]:
    """No cluster but what `variables` say."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((*CLUSTERS, "XLA_FLAGS", "JAX_PLATFORMS"))
    }
    return kept | {"PYTHONPATH": str(ROOT)} | variables


def joined(*environments: dict[str, str]) -> list[str]:
    """What processes that look for each other at the same time find: number, how many, GPUs they may use."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN], env=one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for one in environments
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert not any(process.returncode for process in started), ended
    return [out.strip() for out, _ in ended]


class Metadata:
    """Google's metadata server as one host of a TPU VM sees it; `asked` are the keys that were wanted."""

    def __init__(self, statuses: tuple[int, ...] = (), **attributes: str):
        attributes = {name.replace("_", "-"): value for name, value in attributes.items()}
        self.asked: list[str] = []
        first = list(statuses)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                key = handler.path.removeprefix("/computeMetadata/v1/instance/attributes/")
                self.asked.append(key)
                assert handler.headers["Metadata-Flavor"] == "Google"
                handler.send_response(first.pop(0) if first else 200 if key in attributes else 404)
                handler.end_headers()
                handler.wfile.write(attributes.get(key, "").encode())

            def log_message(handler, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


@pytest.fixture
def machine(monkeypatch):
    """Sets the environment; with a `Metadata`, jax thinks it sees TPU chips."""
    platforms = jax.config.jax_platforms

    def be(metadata: Metadata | None = None, **variables: str) -> None:
        for name in list(os.environ):
            if name.startswith(CLUSTERS):
                monkeypatch.delenv(name)
        if metadata:
            monkeypatch.setenv("GCE_METADATA_IP", metadata.address)
            jax.config.update("jax_platforms", "tpu,cpu")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(time, "sleep", lambda _: None)
    yield be
    jax.config.update("jax_platforms", platforms)


@pytest.mark.parametrize(
    ("attributes", "found"),
    [
        ({"worker_network_endpoints": "10.0.0.1,10.0.0.2", "tpu_env": "ZONE: 'x'\n"}, "a TPU VM"),
        ({"worker_network_endpoints": "a:0:10.0.0.1", "tpu_env": "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'\n"}, "a TPU VM"),
        ({"worker_network_endpoints": "10.0.0.1", "tpu_env": "MEGASCALE_NUM_SLICES: '1'\n"}, None),
        ({}, None),
    ],
)
def test_a_tpu_vm_asks_how_many_hosts_it_has(machine, attributes, found):
    machine(Metadata(**attributes))
    assert distributed.cluster_environment() == found


def test_only_machines_with_chips_of_their_own_ask(machine):
    metadata = Metadata(worker_network_endpoints="10.0.0.1,10.0.0.2")
    for variables in ({"TPU_SKIP_MDS_QUERY": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}):
        machine(metadata, **variables)
        assert distributed.cluster_environment() is None
    machine(metadata)
    jax.config.update("jax_platforms", "cpu")
    assert distributed.cluster_environment() is None
    assert metadata.asked == []


def test_a_laptop_does_not_ask():
    """As jax finds it, without chips."""
    metadata = Metadata(worker_network_endpoints="10.0.0.1,10.0.0.2")
    program = "from launch import distributed; print(distributed.cluster_environment())"
    for platforms in ({}, {"JAX_PLATFORMS": "tpu,cpu"}):
        variables = environment(GCE_METADATA_IP=metadata.address, **platforms)
        assert subprocess.check_output([sys.executable, "-c", program], env=variables, text=True) == "None\n"
    assert metadata.asked == []


def test_a_metadata_server_that_stumbles_is_asked_again_and_one_that_is_silent_is_named(machine):
    machine(Metadata((503, 503), worker_network_endpoints="10.0.0.1,10.0.0.2"))
    assert distributed.cluster_environment() == "a TPU VM"
    silent = Metadata((503,) * 100)
    machine(silent)
    with pytest.raises(ValueError, match=f"{silent.address}.*TPU_SKIP_MDS_QUERY=1"):
        distributed.cluster_environment()


def test_hosts_of_a_tpu_vm_find_each_other():
    """With jax's own search, which asks the same server."""
    pytest.importorskip("requests")
    port, hosts = free_port(), []
    for number in "01":
        metadata = Metadata(
            agent_worker_number=number, worker_network_endpoints="127.0.0.1,127.0.0.1", tpu_env="ZONE: 'x'\n"
        )
        hosts.append(
            # JAX_FORCE_TPU_INIT is jax's word for chips that it does not see.
            environment(GCE_METADATA_IP=metadata.address, JAX_FORCE_TPU_INIT="1", JAX_COORDINATOR_PORT=port)
        )
    assert joined(*hosts) == ["0 2 all", "1 2 all"]


@pytest.mark.parametrize(("tasks", "gpus"), [("1(x2)", ["all", "all"]), ("2", ["0", "1"])])
def test_a_task_of_slurm_takes_the_gpus_that_no_other_task_of_its_node_takes(tasks, gpus):
    common = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    common |= {"JAX_COORDINATOR_PORT": free_port(), "JAX_PLATFORMS": "cpu", "SLURM_STEP_TASKS_PER_NODE": tasks}
    local = (0, 0) if tasks == "1(x2)" else (0, 1)
    found = joined(
        *(environment(**common, SLURM_PROCID=str(i), SLURM_LOCALID=str(local[i])) for i in range(2)),
    )
    assert found == [f"{i} 2 {gpus[i]}" for i in range(2)]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x15),2"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NTASKS_PER_NODE": "1"}, None),
        ({"SLURM_NTASKS_PER_NODE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "SLURM_TASKS_PER_NODE": "8(x2)"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "3"}, None),
    ],
)
def test_devices_of_the_only_task_of_a_node_also_where_flags_name_the_processes(
    machine, monkeypatch, variables, wanted
):
    machine(**variables)
    given: list[object] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: given.append(options["local_device_ids"]))
    flags = {"coordinator_address": "127.0.0.1:1", "num_processes": 2, "process_id": 0}
    distributed.connect(argparse.Namespace(**vars(ALONE) | flags))
    machine(**variables, OMPI_COMM_WORLD_SIZE="2")
    distributed.connect(ALONE)
    assert given == [wanted, wanted]
