"""The composition root: puts settings, services, store, broker and handlers together."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any, Self

from celery import Celery
from kombu.entity import Exchange, Queue

from config import celeryconfig
from config.settings import Settings
from pipeline.catalogue import Catalogue
from pipeline.dispatch import Dispatcher
from pipeline.document import Limits
from pipeline.embedded import EmbeddedServices
from pipeline.errors import HandlerImportError, SettingsError
from pipeline.execution import ExecutionPolicy, Executor, celery_task
from pipeline.handler import Handler, collect
from pipeline.recovery import Recovery
from pipeline.redis_transport import Connection
from pipeline.result_backend import StoreBackend
from pipeline.result_store.migrations import upgrade
from pipeline.result_store.store import ResultStore
from pipeline.retention import Retention
from pipeline.worker import equip, in_pool_child


class Installation:
    """Everything that one process needs, made when it is first asked for.

    Args:
        settings: of this installation.
        services: embedded servers that this process holds; None where both URLs are set.
    """

    def __init__(self, settings: Settings, services: EmbeddedServices | None, database_url: str, broker_url: str) -> None:
        self.settings, self.services = settings, services
        self.database_url, self.broker_url = database_url, broker_url

    @classmethod
    def open(cls, settings: Settings | None = None) -> Self:
        """Connects to what the settings name; what they do not name is started under `home` and kept up to date.

        Raises:
            SettingsError: a variable cannot be used.
            ServiceUnavailable: an embedded server does not start.
        """
        settings = settings or read_settings()
        if settings.database_url and settings.broker_url:
            return cls(settings, None, settings.database_url, settings.broker_url)
        services = EmbeddedServices(
            settings.home, postgres=settings.database_url is None, redis=settings.broker_url is None
        )
        urls = services.start()
        database_url = settings.database_url or urls.database_url
        try:
            if settings.database_url is None:
                upgrade(database_url)
            return cls(settings, services, database_url, settings.broker_url or urls.broker_url)
        except BaseException:
            services.stop()
            raise

    @cached_property
    def store(self) -> ResultStore:
        """The store, for callers who want to hear of an outage at once."""
        return self._store()

    def _store(self, **options: Any) -> ResultStore:
        s = self.settings
        return ResultStore.open(
            self.database_url, grace=s.grace, hard_limit=s.hard_limit, loss_budget=s.loss_budget, **options
        )

    @cached_property
    def limits(self) -> Limits:
        """Sizes that definitions and inputs must keep."""
        return Limits(tasks=self.settings.max_tasks, params_bytes=self.settings.max_params_bytes)

    @cached_property
    def handlers(self) -> Mapping[str, Handler]:
        """All handlers by name.

        Raises:
            HandlerImportError: a module cannot be imported.
        """
        return MappingProxyType(collect(import_modules(self.settings.handler_modules)))

    @cached_property
    def catalogue(self) -> Catalogue:
        """All handlers as data."""
        return MappingProxyType({name: handler.spec for name, handler in self.handlers.items()})

    @cached_property
    def celery(self) -> Celery:
        """The Celery app, without tasks: enough to publish, to look and to control."""
        celery = Celery("pipeline", backend=self._backend, set_as_current=False)
        celery.config_from_object(celeryconfig)
        redis = self.broker_url.startswith("redis")
        celery.installation = self
        celery.amqp.Connection = Connection
        queue = self.settings.queue
        exchange = Exchange(queue, type="direct" if redis else "topic")
        celery.conf.update(
            broker_url=self.broker_url,
            broker_transport_options=dict(celeryconfig.REDIS_TRANSPORT if redis else celeryconfig.AMQP_TRANSPORT),
            worker_disable_prefetch=redis,  # what all processes are busy for waits in the broker, for whoever is free first
            task_default_queue=queue,
            # installations that share a broker neither see nor steer each other's workers
            control_exchange=f"{queue}.control",
            event_exchange=f"{queue}.events",
            task_default_queue_type="classic" if redis else "quorum",
            task_default_exchange_type=exchange.type,
            task_queues=[
                Queue(queue, exchange, routing_key=queue, queue_arguments={} if redis else {"x-queue-type": "quorum"})
            ],
        )
        return celery

    @cached_property
    def _backend(self) -> type[StoreBackend]:
        return type("Backend", (StoreBackend,), {"store": self.store})

    @cached_property
    def worker_app(self) -> Celery:
        """The Celery app with every handler as a task: what workers run."""
        handlers, executor = self.handlers.values(), self.executor
        for handler in handlers:
            self.celery.register_task(celery_task(handler, executor))
        self._backend.executor = executor
        executor.attendant.handlers = tuple(self.handlers)
        equip(
            self.celery, executor, database_url=self.database_url, recovery_beside=self.settings.recovery_beside,
            drain=self.settings.drain,
        )  # fmt: skip
        return self.celery

    @cached_property
    def executor(self) -> Executor:
        """Runs attempts in this process."""
        s = self.settings
        connections = {"default": self.database_url, **{k.lower(): v for k, v in s.connections.items()}}
        store = self._store(patience=s.database_patience, keep_plans=True)
        return Executor(
            store,
            Dispatcher(store, self.celery, hard_limit=s.hard_limit),
            ExecutionPolicy(
                artifacts_root=s.artifacts_root,
                handler_settings=MappingProxyType({**s.for_handlers, "connections": MappingProxyType(connections)}),
                secrets=s.secrets,
                max_result_bytes=s.max_result_bytes,
            ),
            lease=s.lease,
            hard_limit=s.hard_limit,
            worker_name="worker",
            killable=in_pool_child,
        )

    @cached_property
    def dispatcher(self) -> Dispatcher:
        """Creates executions and publishes."""
        return Dispatcher(self.store, self.celery, hard_limit=self.settings.hard_limit)

    @cached_property
    def recovery(self) -> Recovery:
        """Publishes what was lost."""
        s = self.settings
        return Recovery(self.store, self.dispatcher, waiting=self.dispatcher.waiting, lease=s.lease, sweep=s.sweep)

    @cached_property
    def retention(self) -> Retention | None:
        """Forgets old executions; None where they are kept for ever."""
        s = self.settings
        if s.retention_days is None:
            return None
        return Retention(
            store=self.store, artifacts_root=s.artifacts_root, keep=s.retention_days * 86_400, archive=s.archive_url
        )

    def close(self) -> None:
        """Let go of connections, and of embedded servers where this process is their last holder."""
        self.store.close()
        if "celery" in self.__dict__:
            self.celery.close()
        if self.services is not None:
            self.services.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_settings() -> Settings:
    """The settings of this process.

    Raises:
        SettingsError: a variable cannot be used.
    """
    try:
        return Settings.from_env()
    except ValueError as exc:
        raise SettingsError(str(exc)) from None


def import_modules(names: Iterable[str]) -> list[ModuleType]:
    """Import modules of handlers; a package stands for its modules too.

    Raises:
        HandlerImportError: one cannot be imported; the error names it and what Python said.
    """
    found = []
    for name in names:
        try:
            module = importlib.import_module(name)
            found.append(module)
            inner = pkgutil.iter_modules(getattr(module, "__path__", []))
            found.extend(importlib.import_module(f"{name}.{info.name}") for info in inner)
        except (Exception, SystemExit) as exc:
            raise HandlerImportError(name, f"{type(exc).__name__}: {exc}") from exc
    return found
