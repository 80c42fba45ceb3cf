"""What the author of a handler imports: `@handler`, `Context`, `Dataset`, and the verdicts Retry, Skip and Fail.

A handler is a plain function, sync or async; it stays callable as one. Its parameters are bound by name to the
task's merged input (params, then the execution's input, then each dependency's result under the dependency's id)
and checked by pydantic. A parameter annotated `Context` gets the attempt's context.

    @handler("flights.clean", retry_on=(OSError,))
    def clean(flights: Dataset, min_flights: int = 100, *, context: Context) -> Dataset: ...
"""

from __future__ import annotations

import inspect
import logging
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

from pydantic import ConfigDict, PydanticUserError, TypeAdapter
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from pipeline.artifacts import ArtifactStore
from pipeline.catalogue import HandlerSpec, Parameter
from pipeline.errors import HandlerImportError

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "__pipeline_handler__"


class AttemptLost(Exception):  # noqa: N818 - it says what happened, as CancelledError does
    """Raised by `Context.heartbeat`: the attempt is no longer this worker's, nothing that it returns is recorded."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """One attempt of one task, as its handler sees it."""

    execution_id: str
    task_id: str
    workflow_id: str
    #: counts from 1; a retry has the next one
    attempt: int
    #: fencing token: grows with every claim of the task, hand it to systems that can compare
    epoch: int = 0
    #: who enqueued the execution
    user_id: str | None = None
    #: where this attempt writes its files
    artifacts: ArtifactStore
    #: what the site allows handlers to do, as `config/settings.py` names it
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    #: records progress; set by the engine
    report: Callable[[float, str], None] = field(default=lambda percent, message: None, repr=False)
    #: renews the lease and raises AttemptLost where it is gone; set by the engine
    renew: Callable[[], None] = field(default=lambda: None, repr=False)
    #: true once the execution was cancelled or the attempt lost; set by the engine
    is_cancelled: Callable[[], bool] = field(default=lambda: False, repr=False)

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this task: hand it to systems that drop repeats."""
        return f"{self.execution_id}_{self.task_id}"

    @cached_property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """Logs with execution, task and attempt in every record."""
        names = {"execution_id": self.execution_id, "task_id": self.task_id, "attempt": self.attempt}
        return logging.LoggerAdapter(logging.getLogger("pipeline.handler"), names)

    def progress(self, percent: float, message: str = "") -> None:
        """Show how far the attempt is: `percent` from 0 to 100, and a short text. Cheap: written at most once a second."""
        self.report(min(100.0, max(0.0, percent)), message)

    def heartbeat(self) -> None:
        """Call in long loops: raises AttemptLost where the task was cancelled or given to another worker."""
        self.renew()

    @property
    def cancelled(self) -> bool:
        """True once the task should stop."""
        return self.is_cancelled()


@dataclass(frozen=True)
class Handler:
    """A function with a name by which definitions and Celery know it."""

    name: str
    function: Callable[..., Any]
    #: exceptions that the retry policy applies to; all others fail the task at once. None: every exception
    retry_on: tuple[type[BaseException], ...] | None = None
    #: exceptions that are never retried
    never_retry_on: tuple[type[BaseException], ...] = ()
    #: upper bound in seconds on the definition's timeout; None: the definition decides
    timeout: float | None = None

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.function, include_extras=True)

    @cached_property
    def context_parameter(self) -> str | None:
        """Name of the parameter that takes the context, where there is one."""
        return next((name for name, hint in self._hints.items() if hint is Context and name != "return"), None)

    @cached_property
    def _parameters(self) -> tuple[inspect.Parameter, ...]:
        found = inspect.signature(self.function).parameters.values()
        return tuple(p for p in found if p.name != self.context_parameter and p.kind is not p.VAR_POSITIONAL)

    @cached_property
    def open_ended(self) -> bool:
        """True where the function takes any name (**kwargs)."""
        return any(p.kind is p.VAR_KEYWORD for p in self._parameters)

    @cached_property
    def input_adapter(self) -> TypeAdapter[dict[str, Any]]:
        """Checks a merged input and gives the arguments of the call; names that the function does not take are dropped.

        A TypedDict and not a model: a parameter may then have any name, as `json` or `copy`.
        """
        fields: dict[str, Any] = {
            p.name: typing.Required[hint] if p.default is p.empty else typing.NotRequired[hint]
            for p in self._parameters
            if p.kind is not p.VAR_KEYWORD and (hint := self._hints.get(p.name, Any)) is not None
        }
        typed_dict: Any = TypedDict  # called, which type checkers take for a declaration
        shape = typed_dict("Input", fields)
        shape.__pydantic_config__ = ConfigDict(
            extra="allow" if self.open_ended else "ignore", arbitrary_types_allowed=True
        )
        return TypeAdapter(shape)

    @cached_property
    def spec(self) -> HandlerSpec:
        """The handler as data, for validation."""
        lines = (inspect.getdoc(self.function) or "").splitlines()
        parameters = tuple(
            Parameter(name=p.name, required=p.default is p.empty, schema=_schema(self._hints.get(p.name, Any)))
            for p in self._parameters
            if p.kind is not p.VAR_KEYWORD
        )
        return HandlerSpec(
            name=self.name, parameters=parameters, open_ended=self.open_ended, summary=lines[0] if lines else ""
        )


def _schema(hint: Any) -> dict[str, Any]:
    try:
        return TypeAdapter(hint).json_schema()
    except PydanticUserError:  # a type that has no JSON Schema: checked when the task runs
        return {}


def handler(
    name: str,
    *,
    retry_on: Iterable[type[BaseException]] | None = None,
    never_retry_on: Iterable[type[BaseException]] = (),
    timeout: float | None = None,
) -> Callable[[F], F]:
    """Declare a function as the handler called `name`; the function itself is returned unchanged.

    Args:
        name: unique in the installation, as `family.verb`; also the name of the Celery task.
        retry_on: exceptions that the task's retry policy applies to; all others fail at once. None: every exception.
        never_retry_on: exceptions that fail the task at once.
        timeout: seconds; the smaller of this and the definition's timeout holds.

    Raises:
        TypeError: an argument is of the wrong kind, as where `@handler` is written without a name.
    """
    if not isinstance(name, str):
        raise TypeError('a handler has a name: write @handler("family.verb")')
    if timeout is not None and (not isinstance(timeout, int | float) or timeout <= 0):
        raise TypeError(f"handler {name!r}: timeout is a number of seconds above 0, not {timeout!r}")
    for option, kinds in (("retry_on", retry_on), ("never_retry_on", never_retry_on)):
        if isinstance(kinds, type):
            raise TypeError(f"handler {name!r}: {option} is a list of exceptions: write [{kinds.__name__}]")

    def declare(function: F) -> F:
        declared = Handler(name, function, None if retry_on is None else tuple(retry_on), tuple(never_retry_on), timeout)
        setattr(function, _ATTRIBUTE, declared)
        return function

    return declare


def collect(modules: Iterable[ModuleType]) -> dict[str, Handler]:
    """The handlers that the modules declare, by name.

    Raises:
        HandlerImportError: two functions claim the same name, or a signature cannot be read.
    """
    found: dict[str, Handler] = {}
    for module in modules:
        for value in vars(module).values():
            declared = getattr(value, _ATTRIBUTE, None)
            if not isinstance(declared, Handler):
                continue
            rival = found.setdefault(declared.name, declared)
            if rival.function is not declared.function:
                raise HandlerImportError(
                    module.__name__,
                    f"{declared.name!r} is declared by {rival.function.__module__}.{rival.function.__qualname__} too",
                )
            try:
                declared.input_adapter, declared.spec  # noqa: B018 - a wrong signature must show at start, not at run
            except Exception as exc:
                raise HandlerImportError(module.__name__, f"signature of {declared.name!r}: {exc}") from exc
    return found
