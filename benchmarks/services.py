"""Postgres and Redis from wheels, for one run of the benchmarks: in a temporary folder, gone afterwards."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
import redis

from benchmarks.driver import Place
from pipeline.embedded import EmbeddedServices


class Ground:
    """The servers, and places on them; a context manager."""

    def __init__(self, graphs: Path | None = None, *, keep: bool = False) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="bench-"))
        self._graphs = graphs if graphs is not None and graphs.is_dir() else None
        self._keep = keep
        self._services = EmbeddedServices(self.home)
        self._made = 0
        self._redis: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.home.chmod(0o755)  # where we are root, the servers run as somebody else
        urls = self._services.start()
        self._database_url, self._redis_url = urls.database_url, urls.broker_url
        return self

    def place(self, name: str) -> Place:
        """A fresh database, an empty Redis database and a folder."""
        self._made += 1
        number = self._redis.setdefault(name, 1 + len(self._redis) % 15)
        redis_url = f"{self._redis_url.rpartition('/')[0]}/{number}"
        client = redis.Redis.from_url(redis_url)
        client.flushdb()
        client.close()
        database = f"{name}_{self._made}"
        with psycopg.connect(self._database_url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"'.encode())
        folder = self.home / database
        folder.mkdir()
        return Place(
            name=name, database_url=f"{self._database_url.rpartition('/')[0]}/{database}", redis_url=redis_url,
            folder=str(folder), graphs=str(self._graphs or ""),
        )  # fmt: skip

    def server_versions(self) -> dict[str, str]:
        """What runs here."""
        with psycopg.connect(self._database_url) as connection:
            row = connection.execute("SHOW server_version").fetchone()
        client = redis.Redis.from_url(self._redis_url, decode_responses=True)
        info = client.info("server")
        client.close()
        return {"postgres": str(row[0]) if row else "", info.get("server_name", "redis"): str(
            info.get("valkey_version") or info["redis_version"])}  # fmt: skip

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._services.stop()
        if not self._keep:
            shutil.rmtree(self.home, ignore_errors=True)
