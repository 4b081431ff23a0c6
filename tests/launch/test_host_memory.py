"""Freed memory stays with the process: the same large buffers are not mapped and cleared again and again."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from tests.fixtures.source_tree import ROOT

PROGRAM = """
import json, resource
import jax
from launch.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
keep_freed_memory()
faults()
print(json.dumps([plain, faults()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_large_buffers_are_used_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    plain, kept = json.loads(done.stdout)
    assert plain > 10 * 2**26 / 4096 / 2
    assert kept < plain / 10
