"""What a command ends with tells a launcher whether to start it again."""

from __future__ import annotations

import errno

import pytest

from aromni_jax.train.watchdog import TryAgain
from launch import cli


@pytest.mark.parametrize(
    "error, status, says",
    [
        (ValueError("no such key"), 1, "error: no such key"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), 1, "File exists: 'out'"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/data"), 1, "Read-only file system: '/data'"),
        (TryAgain("a checkpoint could not be written"), 75, "error: a checkpoint could not be written"),
        (OSError(errno.EIO, "Input/output error"), 70, "this should not happen: OSError"),
        (AssertionError("a bug"), 70, "this should not happen: AssertionError: a bug"),
    ],
)
def test_errors_have_a_status_and_a_line(monkeypatch, capsys, error, status, says):
    def fail(args):
        raise error

    monkeypatch.setattr("launch.doctor.main", fail)
    assert cli.run("doctor", []) == status
    said = capsys.readouterr().err
    assert says in said and ("Traceback" in said) == (status == 70)
