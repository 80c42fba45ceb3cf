"""Postgres and Redis of one's own, with their data under one folder: for a first try, a desk, and the tests.

Whoever uses the servers holds a shared lock on `services.lock`, which the kernel gives back when a process dies. The
last holder to leave stops the servers; what a killed holder left running is adopted by the next. `services.json` keeps
the ports, so that addresses stay the same from one start to the next.

Both listen on 127.0.0.1 without a password: every user of the machine can reach them. For more, run real servers and
set PIPELINE_DATABASE_URL and PIPELINE_BROKER_URL.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pipeline.errors import ServiceUnavailable
from pipeline.servers import HOST, Postgres, Redis, Server


@dataclass(frozen=True, kw_only=True)
class Services:
    """Where the servers are; empty for one that was not asked for."""

    database_url: str
    broker_url: str


class EmbeddedServices:
    """One holder of the servers under `home`; as a context manager it gives their `Services`."""

    def __init__(self, home: Path, *, postgres: bool = True, redis: bool = True) -> None:
        self._home = home.absolute()
        self._wanted = {"postgres": postgres, "redis": redis}
        self._lock: int | None = None
        self._holder = 0

    def start(self) -> Services:
        """Hold the servers: those that run are used, those that do not are started. May be called again.

        Raises:
            ServiceUnavailable: a server cannot be started; the message quotes its log.
        """
        try:
            with self._turn():
                if self._lock is None or self._holder != os.getpid():
                    self._lock = os.open(self._home / "services.lock", os.O_RDONLY | os.O_CREAT, 0o644)
                    self._holder = os.getpid()
                    fcntl.flock(self._lock, fcntl.LOCK_SH)
                try:
                    ports = self._ensure()
                except BaseException:
                    self._leave()
                    raise
        except OSError as exc:
            raise ServiceUnavailable(f"embedded services under {self._home}: {exc}") from exc
        return Services(
            database_url=f"postgresql://postgres@{HOST}:{ports['postgres']}/pipeline" if "postgres" in ports else "",
            broker_url=f"redis://{HOST}:{ports['redis']}/0" if "redis" in ports else "",
        )

    def stop(self) -> None:
        """Let go of the servers, and stop them where nobody else holds them. May be called again."""
        if self._lock is not None:
            with self._turn():
                self._leave()

    def __enter__(self) -> Services:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _servers(self) -> tuple[Server, ...]:
        return Postgres(self._home), Redis(self._home)

    def _ensure(self) -> dict[str, int]:
        record = self._home / "services.json"
        try:
            known = {name: int(port) for name, port in json.loads(record.read_text()).items()}
        except (FileNotFoundError, ValueError, AttributeError, TypeError):
            known = {}
        ports = {s.name: s.ensure(known.get(s.name)) for s in self._servers() if self._wanted[s.name]}
        if not ports.items() <= known.items():
            fresh = record.with_suffix(".new")
            fresh.write_text(json.dumps(known | ports) + "\n")
            fresh.replace(record)
        return ports

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process at a time starts or stops servers."""
        self._home.mkdir(parents=True, exist_ok=True)
        turn = os.open(self._home / "services.turn", os.O_RDONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
            yield
        finally:
            # closing would not do: a fork of this moment shares the lock
            fcntl.flock(turn, fcntl.LOCK_UN)
            os.close(turn)

    def _leave(self) -> None:
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            # a fork shares its parent's lock, and must not take the servers from under it
            if self._holder == os.getpid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for server in self._servers():
                    server.stop()
        except BlockingIOError:
            pass  # others hold the servers
        finally:
            os.close(lock)
