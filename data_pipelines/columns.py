"""Sources whose items are rows with named columns: which column is what is said in the config key `columns`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from aromni_jax.structs import Task
from data_pipelines.containers import content_hash
from data_pipelines.layouts import PICTURE_TASKS, SPEECH_TASKS
from data_pipelines.sources import Source


class ColumnSource(Source):
    """Rows of text, with a picture or an utterance where a column of these is named: `{"text": "caption"}`.

    `text` is needed; `image` or `speech` makes it a source of pictures or of speech. `key` names records, `group`
    decides the split (else the key, else the hash of the text).
    """

    TASKS: ClassVar[tuple[Task, ...]] = (*PICTURE_TASKS, *SPEECH_TASKS, Task.TEXT)
    COLUMNS: ClassVar[tuple[str, ...]] = ("text", "image", "speech", "key", "group")

    def _tasks_here(self) -> tuple[Task, ...]:
        return PICTURE_TASKS if "image" in self.columns else SPEECH_TASKS if "speech" in self.columns else (Task.TEXT,)

    def _check_text_is_named(self, where: object, names: Sequence[str]) -> None:
        """ValueError with the columns there are, where `columns` does not say which of them is the text."""
        if "text" not in self.columns:
            raise ValueError(
                f"{where} has the columns {', '.join(names)}; name that of the text in config key 'columns': "
                f"--config.columns=\"{{'text': '{names[0]}'}}\""
            )

    def _check_columns_exist(self, where: object, names: Sequence[str]) -> None:
        """ValueError with the columns there are, where `columns` names others."""
        if missing := [name for name in self.columns.values() if name not in names]:
            has = ", ".join(names)
            raise ValueError(f"{where} has no column {', '.join(missing)}; it has {has}: correct config key 'columns'")

    def _deciding(self) -> list[str]:
        """The columns that a scan reads: the text, then the key and the group where they are named."""
        return [role for role in ("text", "key", "group") if role in self.columns]

    def _side_of(self, values: Sequence[Any]) -> str | None:
        """The split of the row whose `_deciding` columns hold `values`: group, else key, else the text itself."""
        if values[-1] is None:
            return None
        return self._side(content_hash(str(values[0]).strip().encode()) if len(values) == 1 else str(values[-1]))
