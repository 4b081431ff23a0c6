"""What was done to sound so that a codec takes it, told in few lines for many files."""

from __future__ import annotations


class Conversions:
    """Collects the lines of `prepare_sound`'s `report`, "name: what was done"; `show` prints one for each kind."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def __call__(self, line: str) -> None:
        """Takes one line."""
        name, _, done = line.rpartition(": ")
        self._names.setdefault(done, []).append(name)

    def show(self) -> None:
        """Prints each kind of conversion with its number of files and the first of them."""
        for done, names in self._names.items():
            others = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            print(f"{names[0]}{others}: {done}")
