"""EXECUTE, beside a worker: its processes keep their leases for as long as they live.

A process renews its lease by a thread, and a handler can hold that up: code that keeps Python's lock, as much of what is
written in C does, stops all threads. Seen from outside, such a process lives; one that was stopped or is gone does not.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass

import psutil

from pipeline.errors import DatabaseUnavailable
from pipeline.result_store.store import ResultStore

log = logging.getLogger(__name__)

_NOT_ALIVE = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """Renews the leases of one worker's processes from outside."""

    store: ResultStore
    #: of the worker, as Celery knows it
    name: str
    #: of its main process
    pid: int
    #: seconds
    lease: float

    def run_once(self) -> int:
        """Renew what lives; returns how many leases that were.

        Raises:
            DatabaseUnavailable: the store cannot be reached.
        """
        alive = self._alive()
        return self.store.renew_workers(self.name, alive, self.lease) if alive else 0

    def run(self, stop: threading.Event) -> None:
        """Renew three times in each lease until `stop` is set."""
        while not stop.wait(self.lease / 3):
            try:
                self.run_once()
            except DatabaseUnavailable as exc:
                log.warning("leases are not renewed: %s", exc)

    def _alive(self) -> list[int]:
        found: list[int] = []
        with suppress(psutil.NoSuchProcess):  # it went while we looked
            main = psutil.Process(self.pid)
            found.extend(p.pid for p in (main, *main.children()) if p.status() not in _NOT_ALIVE)
        return found
