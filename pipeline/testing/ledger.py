"""The truth outside the engine: what handlers did, in files that only grow, written with one call each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.result_store.rows import Fence


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run of a handler began, or ended well."""

    #: start | end
    kind: str
    execution_id: str
    task_id: str
    epoch: int
    #: the worker's incarnation
    worker_id: int
    pid: int
    #: seconds of the machine's monotonic clock, which all its processes share
    at: float


class Ledger:
    """A folder with the runs, one line each, and one file for each effect."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs, self._effects = folder / "runs", folder / "effects"

    def write(self, kind: str, fence: Fence) -> None:
        """Record a start or an end of an attempt, now."""
        entry = Entry(
            kind=kind, execution_id=fence.execution_id, task_id=fence.task_id, epoch=fence.epoch,
            worker_id=fence.worker_id, pid=os.getpid(), at=time.monotonic(),
        )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        line = os.open(self._runs, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(line, (json.dumps(asdict(entry)) + "\n").encode())
        finally:
            os.close(line)

    def effect(self, key: str) -> bool:
        """What an idempotent handler does to the world: true the first time for each key."""
        self._effects.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self._effects / key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        return True

    def effects(self) -> set[str]:
        """The keys of all effects."""
        with suppress(FileNotFoundError):
            return {path.name for path in self._effects.iterdir()}
        return set()

    def entries(self, offset: int = 0) -> Iterator[Entry]:
        """All entries from a place in the file on, in the order in which they were written."""
        with suppress(FileNotFoundError), self._runs.open("rb") as lines:
            lines.seek(offset)
            for line in lines:
                yield Entry(**json.loads(line))

    def size(self) -> int:
        """The place where the next entry begins."""
        return self._runs.stat().st_size if self._runs.exists() else 0
