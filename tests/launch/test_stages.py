"""Stages run once, go on after an interruption, and refuse another job's directory."""

from __future__ import annotations

import io
import json

import pytest

from launch.stages import Stage, format_seconds, run_stages


def job(log: list[str], *, size: int = 1, fail_at: str = "") -> list[Stage]:
    """Three stages that write down that they ran; `fail_at` is interrupted half way."""

    def work(name: str):
        def run(report):
            for step in range(4):
                report(step / 4, f"step {step}")
                if name == fail_at and step == 2:
                    raise KeyboardInterrupt
            log.append(name)
            return {"made by": name}

        return run

    return [
        Stage("first", 1.0, {"size": size}, work("first")),
        Stage("second", 2.0, {}, work("second")),
        Stage("page", 1.0, {}, work("page"), replaceable=True),
    ]


def test_every_stage_runs_once(tmp_path):
    log: list[str] = []
    markers = run_stages(job(log), tmp_path, stream=io.StringIO())
    assert log == ["first", "second", "page"]
    assert markers["second"]["facts"] == {"made by": "second"} and markers["second"]["seconds"] >= 0
    again = run_stages(job(log), tmp_path, stream=io.StringIO())
    assert log == ["first", "second", "page"] and again == markers


def test_interrupted_job_goes_on_where_it_stopped(tmp_path):
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_stages(job(log, fail_at="second"), tmp_path, stream=io.StringIO())
    assert log == ["first"]
    markers = run_stages(job(log), tmp_path, stream=io.StringIO())
    assert log == ["first", "second", "page"]
    # The seconds of both starts count.
    assert set(markers) == {"first", "second", "page"} and not list((tmp_path / "stages").glob("*.seconds"))


def test_half_written_marker_is_no_marker(tmp_path):
    log: list[str] = []
    run_stages(job(log), tmp_path, stream=io.StringIO())
    (tmp_path / "stages" / "page.json").unlink()
    (tmp_path / "stages" / ".page.json.1.tmp").write_text('{"finger')
    run_stages(job(log), tmp_path, stream=io.StringIO())
    assert log == ["first", "second", "page", "page"]


def test_other_settings_are_refused_by_name(tmp_path):
    run_stages(job([]), tmp_path, stream=io.StringIO())
    with pytest.raises(ValueError, match="size: 1 then, 2 now.*another --workdir"):
        run_stages(job([], size=2), tmp_path, stream=io.StringIO())


def test_replaceable_stage_runs_again_when_its_inputs_change(tmp_path):
    log: list[str] = []
    run_stages(job(log), tmp_path, stream=io.StringIO())
    stages = job(log)
    stages[2] = Stage("page", 1.0, {"colour": "blue"}, stages[2].run, replaceable=True)
    markers = run_stages(stages, tmp_path, stream=io.StringIO())
    assert log[-2:] == ["page", "page"]
    assert json.loads((tmp_path / "stages" / "page.json").read_text()) == markers["page"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_says_stage_share_and_time_left(tmp_path, monkeypatch):
    clock = iter(float(second) for second in range(1000))
    monkeypatch.setattr("launch.stages.time.monotonic", lambda: next(clock))
    stream = Terminal()
    run_stages(job([]), tmp_path, stream=stream)
    said = stream.getvalue()
    assert "stage 2 of 3: second 50%" in said and "| all 50%" in said and " left | step 2" in said
    assert "first: done in" in said


def test_format_seconds():
    assert [format_seconds(s) for s in (0.2, 59.6, 185, 7800)] == ["0 s", "1 min 00 s", "3 min 05 s", "2 h 10 min"]
