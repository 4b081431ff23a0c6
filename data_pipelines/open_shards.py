"""Shards open for reading: one reader each for all threads, and not more than the process may have open."""

from __future__ import annotations

import collections
import resource
import threading
from typing import Any, NamedTuple

from array_record.python import array_record_module

READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"

_SHARE_OF_FILES = 0.5
"""Of the files that a process may have open, how many may be shards: the rest is for everything else."""


class Shard(NamedTuple):
    """An ArrayRecord file; `content` tells it from another of the same name, made before or after."""

    path: str
    content: str
    num_records: int


class OpenShards:
    """Records of any number of shards. A reader costs a file and 13 bytes a record, so that those not used for longest
    are closed where there are too many; threads read from one at once."""

    def __init__(self) -> None:
        self._readers: collections.OrderedDict[Shard, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: Shard, offset: int) -> bytes:
        """Record `offset` of a shard.

        Raises:
          ValueError: the file is damaged.
          OSError: it cannot be opened now.
        """
        with self._lock:
            reader = self._readers.get(shard)
            if reader is not None:
                self._readers.move_to_end(shard)
        if reader is None:
            reader = self._keep(shard, _opened(shard))
        try:
            # `read(i, i + 1)` is constant time; ArrayRecord's own `__getitem__` protocol is linear in the file.
            (data,) = reader.read(offset, offset + 1)
        except (RuntimeError, IndexError) as error:
            raise ValueError(str(error)) from error
        return data

    def _keep(self, shard: Shard, reader: Any) -> Any:
        most = max(1, int(_SHARE_OF_FILES * resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
        with self._lock:
            reader = self._readers.setdefault(shard, reader)
            while len(self._readers) > most:
                self._readers.popitem(last=False)
        return reader


def _opened(shard: Shard) -> Any:
    reader = array_record_module.ArrayRecordReader(shard.path, READER_OPTIONS)
    if (found := reader.num_records()) != shard.num_records:
        # ArrayRecord says nothing where it cannot open a file: it has no records then.
        with open(shard.path, "rb"):
            raise ValueError(f"its end is damaged: {found} of {shard.num_records} records can be found")
    return reader
