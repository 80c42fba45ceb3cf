"""The workers that are broken and replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psutil

from pipeline.errors import ServiceUnavailable
from pipeline.testing.arena import Arena

#: seconds that a worker may take to start
_START = 60.0


@dataclass(kw_only=True)
class Worker:
    """One place in the fleet, with the process that fills it now."""

    name: str
    process: subprocess.Popen[bytes]
    #: main processes of before, whose orphans may live on
    before: list[int] = field(default_factory=list)

    @property
    def children(self) -> list[psutil.Process]:
        """Its pool children."""
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children()
            return [c for c in found if os.getpgid(c.pid) == self.process.pid]
        return []

    @property
    def recovery(self) -> psutil.Process | None:
        """The process that runs recovery beside it."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                if "scheduler" in child.cmdline():
                    return child
        return None


class Fleet:
    """Workers as processes; a context manager that ends them all."""

    def __init__(self, arena: Arena, *, workers: int, concurrency: int) -> None:
        self.arena, self.concurrency = arena, concurrency
        self._size = workers
        self.workers: list[Worker] = []
        self.restarts = 0

    def __enter__(self) -> Self:
        try:
            for number in range(self._size):
                name = f"worker-{number}"
                self.workers.append(Worker(name=name, process=self._spawn(name)))
            self.await_start()
        except BaseException:
            self.close()
            raise
        return self

    def await_start(self) -> None:
        """Wait until every worker could run a task.

        Raises:
            ServiceUnavailable: one does not start; the error quotes its log.
        """
        store, until = self.arena.engine.installation.store, time.monotonic() + _START
        while store.live_workers(after=0) < self._size * self.concurrency:
            if time.monotonic() > until or any(w.process.poll() is not None for w in self.workers):
                raise ServiceUnavailable(f"the workers do not start:\n{self.last_lines()}")
            time.sleep(0.05)

    def tend(self) -> None:
        """Replace the workers whose main process is dead, as a supervisor does."""
        for worker in self.workers:
            if worker.process.poll() is not None:
                worker.before.append(worker.process.pid)
                worker.process = self._spawn(worker.name)
                self.restarts += 1

    def bury(self) -> None:
        """End the orphans of workers that are dead."""
        for worker in self.workers:
            for session in worker.before:
                _kill_session(session)
            worker.before.clear()

    def last_lines(self) -> str:
        """The end of every log."""
        logs = (self.arena.home / f"{worker.name}.log" for worker in self.workers)
        return "\n".join(f"--- {log.name}\n{log.read_text('utf-8', 'replace')[-3000:]}" for log in logs if log.exists())

    def close(self) -> None:
        """SIGTERM to all, and SIGKILL to those that do not end soon."""
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGCONT)
            worker.process.terminate()
        for worker in self.workers:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(15)
            _kill_session(worker.process.pid)
            worker.process.wait()
        self.bury()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self, name: str) -> subprocess.Popen[bytes]:
        with (self.arena.home / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline", "worker", "--name", name, "--concurrency", str(self.concurrency)],
                env=self.arena.worker_environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


def _kill_session(session: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)
