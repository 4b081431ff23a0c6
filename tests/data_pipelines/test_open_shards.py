"""Shards that are open: fewer than the process may have, and none called damaged because it could not be opened."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from data_pipelines.records import TokenDataset
from tests.fixtures.data_fakes import make_dataset
from tests.fixtures.source_tree import ROOT

READ_ALL_FROM_THREADS = """
import concurrent.futures, os, resource, sys
from data_pipelines.records import TokenDataset
tokens = TokenDataset(sys.argv[1])
before = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    keys = list(pool.map(lambda index: tokens[index % len(tokens)].key, range(3 * len(tokens))))
assert keys == 3 * [stored.key for stored in tokens], "records of another place"
print(len(tokens.markers), len(os.listdir("/proc/self/fd")) - before)
"""


def test_more_shards_than_files_may_be_open(tmp_path: pathlib.Path) -> None:
    """60 shards, 8 threads, 64 files: every record is read, from at most 32 open shards."""
    data = make_dataset(tmp_path, 120, records_per_shard=2)
    words = [sys.executable, "-c", READ_ALL_FROM_THREADS, str(data)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    shards, more_open = map(int, done.stdout.split())
    assert shards == 60 and more_open <= 32


def test_a_shard_that_is_away_for_a_moment_is_not_damaged(tmp_path: pathlib.Path) -> None:
    data = make_dataset(tmp_path, 40)
    tokens, shard = TokenDataset(data), data / "shard_00001.array_record"
    shard.rename(shard.with_suffix(".away"))
    with pytest.raises(FileNotFoundError, match="shard_00001"):
        tokens[17]
    shard.with_suffix(".away").rename(shard)
    assert tokens[17].key.endswith("/17")


def test_a_shard_without_its_end_is_damaged(tmp_path: pathlib.Path) -> None:
    data = make_dataset(tmp_path, 40)
    tokens, shard = TokenDataset(data), data / "shard_00001.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-65_536] + bytes(65_536))
    with pytest.raises(ValueError, match="shard_00001 record 1 does not read: its end is damaged: 0 of 16 records"):
        tokens[17]
