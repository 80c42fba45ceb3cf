"""RECOVER, in the long run: executions that ended long ago are forgotten, with their artifacts, in small batches.

Artifacts go before the rows that name them: a crash between the two leaves rows that the next look finds again, never files
that nothing names. Before either, the execution is closed for good, so that nobody opens it again meanwhile. The bulk of the
rows lies in partitions by the day on which executions were created, and leaves with a whole partition once all of its
executions are forgotten: to delete row by row would cost as much as to write them.
"""

from __future__ import annotations

import gzip
import logging
import threading
from contextlib import suppress
from dataclasses import dataclass

import fsspec
from pydantic_core import to_jsonable_python

from pipeline.errors import DatabaseUnavailable
from pipeline.observe import read_execution, to_json
from pipeline.result_store.store import ResultStore

log = logging.getLogger(__name__)

#: executions that are looked for at a time
_BATCH = 50
#: seconds after which the row of a worker that is gone is deleted
_WORKERS = 7 * 86_400.0
#: partitions that the time of keeping is cut into: each one more costs every task a little
_PARTS = 3
#: days of a partition at most: so long it stays where the time of keeping becomes shorter
_LONGEST = 92
#: seconds until the first look: a worker that lives for less than an hour looks too
_FIRST = 60.0


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Forgets what ended more than `keep` seconds ago.

    `archive` is an fsspec URL that gets each execution as gzipped JSON first; None: nothing is kept.
    """

    store: ResultStore
    artifacts_root: str
    keep: float
    archive: str | None = None

    def run(self, stop: threading.Event, every: float = 3_600.0) -> None:
        """Look after a minute, and then every `every` seconds, until `stop` is set."""
        pause = min(_FIRST, every)
        while not stop.wait(pause):
            pause = every
            try:
                if forgotten := self.run_once():
                    log.info("%d executions forgotten", forgotten)
            except Exception as exc:
                log.warning("old executions are kept for now: %s", exc, exc_info=not isinstance(exc, DatabaseUnavailable | OSError))

    def run_once(self, limit: int = 1_000) -> int:
        """Forget up to `limit` executions, the oldest first, and make and drop partitions; returns how many were forgotten.

        Raises:
            DatabaseUnavailable: the store cannot be reached.
            OSError: an artifact cannot be deleted, or the archive cannot be written; its execution is kept.
        """
        self.store.forget_workers(_WORKERS)
        self.store.make_partitions(min(max(1, round(self.keep / 86_400 / _PARTS)), _LONGEST))
        forgotten = 0
        while forgotten < limit and (batch := self.store.finished_before(self.keep, min(_BATCH, limit - forgotten))):
            before = forgotten
            for execution_id in batch:  # each to its end, so that what stops the look leaves none by half
                self._keep_copy(execution_id)
                if self.store.close_for_good(execution_id):
                    self._delete_artifacts(execution_id)
                    forgotten += self.store.forget_executions([execution_id])
            if forgotten == before:  # each of them was opened again meanwhile
                break
        if dropped := self.store.drop_partitions():
            log.info("%d partitions dropped", dropped)
        return forgotten

    def _keep_copy(self, execution_id: str) -> None:
        if self.archive is None:
            return
        execution = read_execution(self.store, execution_id).to_dict()
        attempts = {name: self.store.get_attempts(execution_id, name) for name in execution["tasks"]}
        execution["attempts"] = {name: to_jsonable_python([vars(a) for a in found]) for name, found in attempts.items()}
        filesystem, folder = fsspec.core.url_to_fs(self.archive)
        filesystem.makedirs(folder, exist_ok=True)
        target = f"{folder.rstrip('/')}/{execution_id}.json.gz"
        filesystem.pipe_file(target + ".writing", gzip.compress(to_json(execution).encode()))
        filesystem.mv(target + ".writing", target)

    def _delete_artifacts(self, execution_id: str) -> None:
        filesystem, root = fsspec.core.url_to_fs(self.artifacts_root)
        with suppress(FileNotFoundError):
            filesystem.rm(f"{root.rstrip('/')}/{execution_id}", recursive=True)
