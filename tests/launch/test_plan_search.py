"""What `aromni plan --search` tries and prints, what the cache of plans forgives, and which flags go together."""

from __future__ import annotations

import os

import pytest

from launch import cli, plan_search

BASE = {
    "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1},
    "gradient_accumulation_steps": 2,
    "model": "debug",
    "global_batch_size": 3,
    "optimizer": {"name": "adamw", "offload": False, "master_weights": False},
}
MODEL = {"num_heads": 4, "num_kv_heads": 4, "dtype": "bfloat16", "param_dtype": "float32"}


def fake_plan(calls, state=0, capacity=96, link=0.0):
    """Memory and time that grow with rows; policies that keep more need more and are faster. `state` bytes a chip are
    halved by offloading, and again by bfloat16 weights; `link` seconds are divided by the data ways."""

    def plan(config, topology, num_slices):
        calls.append(config)
        mesh, rows = config["mesh"], config["global_batch_size"] // 8
        if mesh["tensor"] > 1:
            raise ValueError("this mesh does not suit")
        place = plan_search.REMATS.index(config["model"]["remat"])
        halvings = config["optimizer"]["offload"] + (config["model"]["param_dtype"] == "bfloat16")
        arguments = state * mesh["data"] >> halvings
        peak = arguments + 8 * rows * (len(plan_search.REMATS) - place)
        seconds = {"compute": 8.0 * rows * (1 + place), "memory": 0.0, "interconnect": link / mesh["data"]}
        return {
            "fits": peak <= capacity,
            "hbm_capacity_bytes": capacity,
            "hbm_bytes": {"peak": peak, "arguments": arguments, "temporaries": peak - arguments},
            "global_batch_size": config["global_batch_size"],
            "sequence_length": 1,
            "roofline_seconds": seconds,
            "step_seconds_roofline": max(seconds.values()),
        }

    return plan


def searched(config=BASE, num_slices=1, **plan):
    calls, lines = [], []
    points = plan_search.search(config, MODEL, "v5e:2x4", num_slices, 8, fake_plan(calls, **plan), lines.append)
    return plan_search.frontier(points), calls, lines


def test_search_doubles_rows_until_they_do_not_fit_and_keeps_what_nothing_beats():
    best, calls, lines = searched()
    assert sum("left out" in line for line in lines) == len(plan_search.REMATS)
    assert {call["global_batch_size"] % 8 for call in calls} == {0}
    assert {call["gradient_accumulation_steps"] for call in calls} == {1} and BASE["model"] == "debug"
    # One row needs 32 of 96 at most, two rows 64; four rows fit from the second policy on, eight in the last alone.
    assert [(point["rows_per_chip"], point["step_seconds_roofline"]) for point in best] == [
        (8, 64 * 4.0),
        (4, 32 * 2.0),
        (2, 16 * 1.0),
    ]
    # Nothing is gained by keeping elsewhere a state that takes no memory.
    assert not any(call["optimizer"]["offload"] for call in calls)


def test_search_moves_the_state_where_nothing_fits_with_it():
    """A state of 200 leaves no room of 96, halved neither; a quarter leaves 46, for five rows of the last policy."""
    best, calls, lines = searched(state=200)
    assert [plan_search.describe_choice(point) for point in best] == [
        "4 rows a chip, offload, data 1, fsdp 8, context 1, tensor 1, optimizer.offload, bfloat16 weights",
        "2 rows a chip, full, data 1, fsdp 8, context 1, tensor 1, optimizer.offload, bfloat16 weights",
        "1 rows a chip, dots, data 1, fsdp 8, context 1, tensor 1, optimizer.offload, bfloat16 weights",
    ]
    assert all(call["optimizer"]["master_weights"] for call in calls if call["model"]["param_dtype"] == "bfloat16")
    assert any(line.startswith(plan_search.describe_choice(best[0]) + ": ") for line in lines)


def test_adafactor_stays_on_the_chips():
    _, calls, _ = searched(BASE | {"optimizer": BASE["optimizer"] | {"name": "adafactor"}}, state=200)
    assert calls and not any(call["optimizer"]["offload"] for call in calls)


def test_search_splits_data_where_the_links_bound_a_step():
    """Alone, one row of `dots` takes 40 s on the links and 8 s of computing; with four data ways 10 s."""
    best, calls, _ = searched(link=40.0, state=4)
    fastest = best[-1]
    assert (fastest["rows_per_chip"], fastest["remat"], fastest["mesh"]["data"]) == (2, "dots", 4)
    assert fastest["mesh"]["fsdp"] == 2 and fastest["step_seconds_roofline"] == 16
    split = [call for call in calls if call["mesh"]["data"] == 4]
    assert 0 < len(split) < len(calls) / 3


@pytest.mark.parametrize("links, peak, kept", [(0.5, 14, True), (0.99, 14, False), (0.5, 21, False)])
def test_of_two_that_are_as_fast_links_are_weighed_against_memory(links, peak, kept):
    first, other = (
        {
            "fits": True,
            "rows_per_chip": 1,
            "global_batch_size": 8,
            "sequence_length": 1,
            "step_seconds_roofline": 4.0,
            "roofline_seconds": {"interconnect": seconds},
            "hbm_bytes": {"peak": need},
        }
        for seconds, need in ((1.0, 10), (links, peak))
    )
    assert plan_search.frontier([first, other]) == plan_search.frontier([other, first]) == [other if kept else first]


def test_search_spares_the_links_where_that_costs_nothing():
    best, _, _ = searched(link=4.0)
    assert {point["mesh"]["data"] for point in best} == {4}


@pytest.mark.parametrize("data, tried", [(1, {2, 8}), (4, {2, 4, 8}), (-1, {2, 8})])
def test_data_is_split_at_least_over_the_slices(data, tried):
    _, calls, _ = searched(BASE | {"mesh": BASE["mesh"] | {"data": data}}, num_slices=2)
    assert {call["mesh"]["data"] for call in calls} == tried


def test_a_context_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"mesh.context = 3 does not divide the devices of each slice, 8 over 1"):
        searched(BASE | {"mesh": BASE["mesh"] | {"context": 3}})


def counted(calls):
    def plan(config, topology, num_slices):
        calls.append(topology)
        return {"devices": 8}

    return plan


def test_a_plan_asked_again_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    for topology in ("v5e:2x4", "v5e:2x4", "v5e:4x4"):
        assert plan_search.cached("compiled", counted(calls))({"seed": 0}, topology, 1) == {"devices": 8}
    assert calls == ["v5e:2x4", "v5e:4x4"]
    plan_search.cached("compiled", counted(calls))({"seed": 1}, "v5e:2x4", 1)
    plan_search.cached("assigned", counted(calls))({"seed": 0}, "v5e:2x4", 1)
    assert len(calls) == 4


@pytest.mark.parametrize("variable", ["LIBTPU_INIT_ARGS", "XLA_FLAGS"])
def test_other_flags_of_the_compiler_are_another_plan(tmp_path, monkeypatch, variable):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    for flags in ("--xla_a=1", "--xla_a=2", "--xla_a=1"):
        monkeypatch.setenv(variable, flags)
        plan_search.cached("compiled", counted(calls))({}, "v5e:2x4", 1)
    assert len(calls) == 2


@pytest.mark.parametrize("left", [b'{"devices": ', b"", b"\0\0\0\0", b"\xff"])
def test_a_damaged_plan_is_made_again(tmp_path, monkeypatch, left):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    plan = plan_search.cached("compiled", counted(calls))
    plan({}, "v5e:2x4", 1)
    (entry,) = (tmp_path / "aromni" / "plan").iterdir()
    entry.write_bytes(left)
    assert [plan({}, "v5e:2x4", 1) for _ in range(2)] == [{"devices": 8}] * 2
    assert len(calls) == 2


def test_a_plan_is_not_lost_where_it_cannot_be_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    plan = plan_search.cached("compiled", counted([]))
    assert [plan({}, topology, 1) for topology in ("v5e:2x4", "v5e:4x4")] == [{"devices": 8}] * 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plans are not kept for the next time: ") and "XDG_CACHE_HOME" in line


@pytest.mark.parametrize(
    "words, answer",
    [
        (["--json=nowhere/plan.json"], "there is no directory 'nowhere'; make it, or give another file"),
        (["--json=."], "is a directory; give a file in it"),
        (["--search", "--compile"], "give one of them"),
        (["--search", "--executable=step.bin"], "give one of them"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_the_work(tmp_path, monkeypatch, capsys, words, answer):
    def work(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(plan_search, "assigned_memory_plan", work)
    monkeypatch.setattr("launch.plan.plan_config", work)
    monkeypatch.setattr("launch.plan._search", work)
    monkeypatch.chdir(tmp_path)
    assert cli.run("plan", ["--config=configs/pretrain.py:debug", "--topology=v5e:2x4", *words]) == 1
    assert answer in capsys.readouterr().err


def test_a_folder_of_others_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_search, "assigned_memory_plan", None)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # Root may write everywhere.
    words = ["--config=configs/pretrain.py:debug", "--topology=v5e:2x4", f"--json={tmp_path}/plan.json"]
    assert cli.run("plan", words) == 1
    assert "cannot be written; give a file in a directory of yours" in capsys.readouterr().err
