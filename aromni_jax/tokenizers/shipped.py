"""The picture and the speech tokenizer that come with the package: trained by this code on the embedded corpus.

`weights/card.json` says how each was made, what it measured on held-out data, and the SHA-256 of its files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from aromni_jax.tokenizers import storage

_WEIGHTS = Path(__file__).parent / "weights"
KINDS = ("image", "speech")


def shipped_card(kind: str) -> dict[str, Any]:
    """What the card says of one tokenizer: command, corpus, licence, measured numbers, files and their SHA-256."""
    return storage.read_json(_WEIGHTS / "card.json")[kind]


def shipped_directory(kind: str) -> Path:
    """Where the tokenizer lies, to be loaded like any saved one.

    Raises:
      ValueError: `kind` has none, or a file is not the one on the card: named, with the remedy.
    """
    if kind not in KINDS:
        raise ValueError(f"no {kind} tokenizer comes with the package; {' and '.join(KINDS)} do")
    for name, expected in shipped_card(kind)["sha256"].items():
        path = _WEIGHTS / kind / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ValueError(f"{path} is missing or not the file that was shipped; install the package again")
    return _WEIGHTS / kind
