"""From conversations to token shards, exactly once: any number of processes, in any order, again after a crash.

Shard k holds records [k * records_per_shard, (k + 1) * records_per_shard) of the source and depends on nothing else
than these, the tokenizers, the templates and the settings. A shard whose marker is there is done; any other is made
again from nothing. Who makes it does not matter, so process i of n takes shards i, i + n, i + 2n, ...
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.prompts import load_templates
from aromni_jax.vocab import JointVocab
from data_pipelines import records
from data_pipelines.conversation_encoder import ConversationEncoder
from data_pipelines.length_limits import CHOSEN_STAGES
from data_pipelines.pretokenize_config import PretokenizeConfig
from data_pipelines.records import read_marker, shard_name, write_atomically, write_shard
from data_pipelines.source_kinds import open_source
from data_pipelines.sources import RecordError

_STALE_SECONDS = 24 * 3600
QUARANTINE_FILE = "quarantine.jsonl"


Progress = Callable[[dict[str, Any]], None]


def pretokenize(
    config: PretokenizeConfig,
    output_dir: str | os.PathLike[str],
    *,
    shard_index: int = 0,
    num_shards: int = 1,
    bundle: TokenizerBundle | None = None,
    progress: Progress | None = None,
) -> bool:
    """Makes the shards of worker `shard_index` of `num_shards`; finalizes and returns True when all shards are there.

    `progress` is called after every batch of media with {"done", "total", "seconds", "quarantined"}, counted in records
    of this worker.

    Raises:
      ValueError: too many bad records, an output directory of another run, no source, a tokenizer that is not there.
    """
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"shard_index must be in 0..{num_shards - 1}, not {shard_index}")
    job = _Job(config, pathlib.Path(output_dir), bundle)
    mine = range(shard_index, job.num_units, num_shards)
    total = sum(len(job.unit(index)) for index in mine)
    job.run_units(mine, total, progress or (lambda event: None))
    if any(read_marker(job.directory, index) is None for index in range(job.num_units)):
        return False
    job.finalize()
    return True


class _Job:
    """Source, tokenizers and settings of one run, and the directory its shards go to."""

    def __init__(self, config: PretokenizeConfig, directory: pathlib.Path, bundle: TokenizerBundle | None) -> None:
        self.config = config
        self.directory = directory
        self.source = open_source(
            config.source,
            split=config.split,
            heldout_fraction=config.heldout_fraction,
            tasks=config.tasks,
            columns=config.columns,
        )
        self.bundle, self.vocab = _opened(config.tokenizers) if bundle is None else (bundle, bundle.vocab())
        templates = load_templates(config.templates)
        self.encoder = ConversationEncoder(config, self.bundle, self.vocab, templates)
        self.num_units = -(-len(self.source) // config.records_per_shard)
        # Where things lie and how many are encoded at once does not change a shard; everything else does. Tasks and
        # columns are in the fingerprint of the source.
        self.description: dict[str, Any] = {
            "source": {"name": self.source.path.name, "fingerprint": self.source.fingerprint},
            "templates": {"name": templates.name, "fingerprint": templates.fingerprint},
            "tokenizers": dict(sorted(self.bundle.fingerprints.items())),
            "settings": config.settings_of_shards,
            **self.encoder.description,
        }
        identity = {"format_version": records.FORMAT_VERSION, "vocab": self.vocab.fingerprint, **self.description}
        self.run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{self.directory} is a file; --output must name a directory for the data set")
        self.directory.mkdir(parents=True, exist_ok=True)
        # Pods that try one index again have the same host name and process number.
        self.suffix = f"{socket.gethostname()}-{secrets.token_hex(4)}-{os.getpid()}"
        self._sweep()

    def unit(self, index: int) -> range:
        """Record indices of shard `index`."""
        start = index * self.config.records_per_shard
        return range(start, min(start + self.config.records_per_shard, len(self.source)))

    def run_units(self, mine: Sequence[int], total: int, progress: Progress) -> None:
        # Of the whole source: what is allowed does not depend on the number of workers; `finalize` adds theirs up.
        allowed = int(self.config.max_bad_fraction * len(self.source))
        started, done, bad = time.monotonic(), 0, 0

        def report(share_of_shard: float, bad_in_shard: int) -> None:
            now = done + round(share_of_shard * len(self.unit(index)))
            seconds = time.monotonic() - started
            progress({"done": now, "total": total, "seconds": seconds, "quarantined": bad + bad_in_shard})

        for index in mine:
            marker = read_marker(self.directory, index)
            if marker is not None and marker.run != self.run:
                raise ValueError(
                    f"{self.directory} holds shards of another run ({marker.run}, this one is {self.run}): source, "
                    "tokenizers, templates or settings differ. Choose another output directory or empty this one"
                )
            if marker is None:
                quarantine = self._make_shard(index, allowed - bad, report)
                marker = read_marker(self.directory, index)
                assert marker is not None and sum(marker.quarantined.values()) == len(quarantine)
            bad += _num_bad(marker.quarantined)
            done += len(self.unit(index))
            progress({"done": done, "total": total, "seconds": time.monotonic() - started, "quarantined": bad})

    def _sweep(self) -> None:
        """Removes what killed processes left behind; files of a live process, or of another host today, stay."""
        host = socket.gethostname()
        for leftover in self.directory.glob(".tmp-*"):
            owner, _, process_id = (leftover.name.rsplit("-", 2) + ["", ""])[:3]
            local_and_dead = owner.endswith(f"-{host}") and process_id.isdigit() and not _is_alive(int(process_id))
            try:
                if not local_and_dead and time.time() - leftover.stat().st_mtime < _STALE_SECONDS:
                    continue
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink()
            except FileNotFoundError:  # its owner has just renamed it, or another worker swept it
                pass

    def _make_shard(self, index: int, allowed_bad: int, report: Callable[[float, int], None]) -> list[dict[str, Any]]:
        conversations, quarantine = [], []
        for record in self.unit(index):
            try:
                conversations.append((record, self.source[record]))
            except RecordError as error:
                quarantine.append(self._line(record, self.source.key_of(record), error))
        examples = []
        unread = len(quarantine)
        results = self.encoder.documents(
            [conversation for _, conversation in conversations],
            lambda share, without_media: report(share, unread + without_media),
        )
        for (record, conversation), result in zip(conversations, results, strict=True):
            examples += result.documents
            quarantine += [self._line(record, conversation.key, remark) for remark in result.remarks]
        quarantine.sort(key=lambda line: line["record"])
        reasons = Counter(line["stage"] for line in quarantine)
        # The quarantine file goes first: the marker that `write_shard` writes last vouches for both, and where too many
        # records are bad, all of them are found there.
        lines = "".join(json.dumps(line) + "\n" for line in quarantine)
        quarantine_path = self.directory / f"{shard_name(index)}.{QUARANTINE_FILE}"
        if lines:
            write_atomically(quarantine_path, lines, self.suffix)
        else:
            quarantine_path.unlink(missing_ok=True)
        num_bad = _num_bad(reasons)
        if num_bad > allowed_bad:
            report(1.0, num_bad)
            first = next(line for line in quarantine if line["stage"] not in CHOSEN_STAGES)
            raise ValueError(
                f"too many bad records: {num_bad} in {shard_name(index)}, more than max_bad_fraction "
                f"{self.config.max_bad_fraction} of all records; the first: {first['error']}; all are in "
                f"{quarantine_path}. Mend them, or raise `--config.max_bad_fraction`"
            )
        write_shard(
            self.directory,
            index,
            examples,
            vocab_size=self.vocab.size,
            run=self.run,
            quarantined=dict(reasons),
            suffix=self.suffix,
        )
        return quarantine

    def _line(self, record: int, key: str, error: RecordError) -> dict[str, Any]:
        where = self.source.where(record)
        return {"record": record, "where": where, "key": key, "stage": error.stage, "error": str(error)}

    def finalize(self) -> None:
        """Writes what makes the shards a data set; several processes may do so at once, with the same result."""
        total_bad = 0
        lines = []
        for index in range(self.num_units):
            marker = read_marker(self.directory, index)
            assert marker is not None
            total_bad += _num_bad(marker.quarantined)
            path = self.directory / f"{shard_name(index)}.{QUARANTINE_FILE}"
            if marker.quarantined:
                lines.append(path.read_text())
        if total_bad > self.config.max_bad_fraction * len(self.source):
            raise ValueError(
                f"{total_bad} of {len(self.source)} records are bad, more than max_bad_fraction "
                f"{self.config.max_bad_fraction}; see {self.directory}/shard_*.{QUARANTINE_FILE}. Mend them, or raise "
                "`--config.max_bad_fraction`"
            )
        write_atomically(self.directory / QUARANTINE_FILE, "".join(lines), self.suffix)
        if not (self.directory / records.TOKENIZERS_DIR).exists():
            temporary = self.directory / f".tmp-tokenizers-{self.suffix}"
            self.bundle.save(temporary, self.vocab)
            try:
                os.rename(temporary, self.directory / records.TOKENIZERS_DIR)
            except OSError:  # another process was first; both wrote the same files
                shutil.rmtree(temporary)
        records.finalize(
            self.directory,
            self.num_units,
            run=self.run,
            vocab=self.vocab,
            description=self.description | {"device_kind": self._device_kind(), "unclaimed": self.source.unclaimed},
            suffix=self.suffix,
        )

    def _device_kind(self) -> str:
        """What encoded the media: a later start that finds every shard finished does not know better."""
        try:
            written = records.unsealed((self.directory / records.DATASET_FILE).read_bytes())
            if written["run"] == self.run:
                return str(written["device_kind"])
        except (OSError, ValueError, KeyError):
            pass  # not there yet, or to be written anew
        return jax.devices()[0].device_kind


def _opened(tokenizers: str) -> tuple[TokenizerBundle, JointVocab]:
    """A saved bundle with its vocabulary, or tokenizers made one by one and a vocabulary for them.

    A saved layout may be another than the one its tokenizers would be given today.
    """
    if tokenizers == "shipped" and not os.path.exists(tokenizers):
        raise ValueError(
            "config key 'tokenizers': what is shipped are codecs of pictures and speech, and a data set needs a text "
            "tokenizer beside them; put them into one directory with aromni tokenizer import --kind=image "
            "--input=shipped --tokenizer=DIR/image (speech alike) and aromni tokenizer train --kind=text "
            "--tokenizer=DIR/text"
        )
    saved_vocab = pathlib.Path(tokenizers) / records.VOCAB_FILE
    if saved_vocab.exists():
        return TokenizerBundle.load(tokenizers), JointVocab.from_json(saved_vocab.read_text())
    bundle = TokenizerBundle.from_parts(tokenizers)
    return bundle, bundle.vocab()


def unclaimed_text(unclaimed: dict[str, int]) -> str:
    """What is said of `Source.unclaimed`."""
    count = sum(unclaimed.values())
    return (
        f"{count:,} record{'s' * (count > 1)} of split {', '.join(map(repr, unclaimed))} "
        f"{'are' if count > 1 else 'is'} in no data set of split train or heldout; "
        "correct the name, or read them with --config.split=NAME"
    )


def _num_bad(quarantined: dict[str, int] | Counter[str]) -> int:
    """Records that could not be used; those left out or cut for their length were so by choice."""
    return sum(count for stage, count in quarantined.items() if stage not in CHOSEN_STAGES)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
