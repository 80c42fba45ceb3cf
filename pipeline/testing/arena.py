"""Where the kit runs: servers, the proxies before them, and an installation on both sides of the proxies."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import psutil
from kombu.exceptions import OperationalError

from config.settings import Settings
from pipeline.embedded import EmbeddedServices
from pipeline.engine import WorkflowEngine
from pipeline.errors import DatabaseUnavailable
from pipeline.result_store.connection import Connection, connect
from pipeline.result_store.migrations import upgrade
from pipeline.servers import Postgres, Redis, Server
from pipeline.testing.proxy import Proxy

_PORTS = {"postgresql": 5432, "postgres": 5432, "redis": 6379, "amqp": 5672}


class Arena:
    """A context manager: everything is made when it is entered and gone when it is left.

    Args:
        handlers: modules of handlers beside the built-in ones.
        database_url: of a server on which the kit may make a database of its own; None: an embedded one.
        broker_url: of a broker on which the kit takes a queue of its own; None: an embedded one.
        changes: to the settings, by name.
    """

    def __init__(
        self, *, handlers: tuple[str, ...], database_url: str | None, broker_url: str | None, changes: dict[str, Any]
    ) -> None:
        self.own_database, self.own_broker = database_url is None, broker_url is None
        self.home = Path(tempfile.mkdtemp(prefix="crash-"))
        self._handlers, self._changes = handlers, changes
        self._database_url, self._broker_url = database_url or "", broker_url or ""
        self._left = ExitStack()
        self._services = EmbeddedServices(self.home, postgres=self.own_database, redis=self.own_broker)

    def __enter__(self) -> Self:
        with ExitStack() as made:
            made.callback(shutil.rmtree, self.home, ignore_errors=True)
            self.home.chmod(0o755)  # where we are root, the servers run as somebody else
            made.callback(self._services.stop)
            urls = self._services.start()
            self._database_url = urls.database_url or self._database_of_its_own(made)
            self._broker_url = self._broker_url or urls.broker_url
            upgrade(self._database_url)
            self.database = made.enter_context(Proxy(*_address(self._database_url)))
            self.broker = made.enter_context(Proxy(*_address(self._broker_url)))
            self.settings = Settings.model_validate({
                "database_url": self._database_url, "broker_url": self._broker_url, "home": self.home,
                "queue": f"crash-{secrets.token_hex(4)}", "handlers": self._handlers, "lease": 3.0, "sweep": 0.2,
                "grace": 1.0, "hard_limit": 2.0, "database_patience": 30.0, "loss_budget": 20, "flower_port": 0,
                "fault_plan": self.home / "plan.json", **self._changes,
            })  # fmt: skip
            self.engine = made.enter_context(WorkflowEngine(settings=self.settings))
            made.callback(self._delete_queue)
            self._left = made.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.close()

    @property
    def worker_environment(self) -> dict[str, str]:
        """What the workers' processes see: the servers behind the proxies, and the plan."""
        values = {
            **{name: getattr(self.settings, name) for name in self.settings.model_fields_set},
            "handlers": (*self.settings.handlers, "pipeline.testing.injection"),
            "database_url": _through(self._database_url, self.database),
            "broker_url": _through(self._broker_url, self.broker),
        }
        named = {
            f"PIPELINE_{prefix}_{name}": value
            for prefix, found in (("CONNECTION", self.settings.connections), ("SECRET", self.settings.secrets))
            for name, value in found.items()
        }
        return self.settings.child_environment(named | {
            f"PIPELINE_{name.upper()}": ",".join(value) if isinstance(value, tuple) else str(value)
            for name, value in values.items()
            if value is not None and not isinstance(value, Mapping)
        })  # fmt: skip

    def connect(self) -> Connection:
        """A connection of the kit's own, past the proxy."""
        return connect(self._database_url, "crash kit")

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of one statement, from a server that may be starting again."""
        until = time.monotonic() + 30
        while True:
            try:
                with self.connect() as connection:
                    cursor = connection.execute(statement.encode(), values)
                    return cursor.fetchall() if cursor.description else []
            except DatabaseUnavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def kill_database(self) -> None:
        """kill -9 of the embedded Postgres, and its restart."""
        self._kill(Postgres(self.home))

    def kill_broker(self) -> None:
        """kill -9 of the embedded Redis, the loss of its data, and its restart."""
        self._kill(Redis(self.home), "appendonlydir")

    def _delete_queue(self) -> None:
        """Leave a broker that is not ours as it was."""
        celery = self.engine.installation.celery
        queue = celery.amqp.queues[self.settings.queue]
        with suppress(OSError, OperationalError), celery.connection_or_acquire() as connection:
            queue.bind(connection.default_channel).delete()
            queue.exchange.bind(connection.default_channel).delete()

    def _kill(self, server: Server, data: str = "") -> None:
        process = server.find()
        if process is not None:
            process.kill()
            with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                process.wait(10)
        if data:
            shutil.rmtree(server.folder / data, ignore_errors=True)
        self._services.start()

    def _database_of_its_own(self, made: ExitStack) -> str:
        name = f"crash_{secrets.token_hex(4)}"
        admin = self._database_url

        def run(statement: str) -> None:
            with connect(admin, "crash kit") as connection:
                connection.execute(statement.encode())

        run(f"CREATE DATABASE {name}")
        made.callback(run, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        return urlunsplit(urlsplit(admin)._replace(path=f"/{name}"))


def _address(url: str) -> tuple[str, int]:
    found = urlsplit(url)
    return found.hostname or "127.0.0.1", found.port or _PORTS[found.scheme]


def _through(url: str, proxy: Proxy) -> str:
    found = urlsplit(url)
    user = found.netloc.rpartition("@")[0]
    return urlunsplit(found._replace(netloc=f"{user}@127.0.0.1:{proxy.port}" if user else f"127.0.0.1:{proxy.port}"))
