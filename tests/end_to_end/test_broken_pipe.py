"""A run outlives whoever reads its output: `aromni train 2>&1 | head`, a terminal that is closed."""

from __future__ import annotations

import pytest
from runs import checkpoint_names, lines, start


@pytest.mark.slow
def test_a_run_whose_log_nobody_reads_any_more_trains_to_its_end_and_saves(tmp_path, cache):
    process = start(tmp_path / "run", cache, "--config.total_steps=12")
    assert process.stderr is not None and process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=600) == 0
    assert lines(tmp_path / "run")[-1]["step"] == 12
    assert "12" in checkpoint_names(tmp_path / "run")
