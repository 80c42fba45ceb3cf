"""DEFINE: what a data engineer declares, as frozen values.

Names and defaults are the user's model. Nothing here touches a file, a database, a broker, a clock or a handler.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

#: kinds of task that the format has names for and this version does not run yet
PLANNED_TYPES = ("workflow", "delay", "signal", "approval")

#: a task's message holds its id four times and must stay under 1 KiB
TASK_ID = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
WORKFLOW_ID = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"


def _version_text(value: object) -> object:
    """YAML reads `version: 1` as a number; 1.10 would lose its zero, so only whole numbers are taken as text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class RetryPolicy(_Value):
    """How often a failed task is tried again, and how long after."""

    max_retries: int = Field(default=3, strict=True, ge=0, le=1000, description="retries after the first try")
    backoff: Literal["exponential", "linear", "fixed"] = Field(
        default="exponential", description="exponential: min(2**n, 60) s; linear: 5*n s; fixed: 1 s; n counts from 0"
    )
    jitter: Literal["none", "full", "equal"] = Field(
        default="full", description="spreads retries: a random part of the delay (full), or of its half (equal)"
    )
    max_delay: float | None = Field(
        default=None, strict=True, ge=0, le=604_800, description="cap of the delay, in seconds"
    )

    def delay(self, retry: int, uniform: float) -> float:
        """Seconds to wait before retry number `retry` (from 0); `uniform` in [0, 1) is the jitter's die.

        The jitter never goes above the plain delay (Brooker, "Exponential Backoff And Jitter").
        """
        match self.backoff:
            case "exponential":
                plain = float(min(2 ** min(retry, 6), 60))
            case "linear":
                plain = 5.0 * retry
            case _:
                plain = 1.0
        if self.max_delay is not None:
            plain = min(plain, self.max_delay)
        match self.jitter:
            case "full":
                return plain * uniform
            case "equal":
                return plain / 2 + plain / 2 * uniform
            case _:
                return plain


class TaskDefinition(_Value):
    """One task: a handler, what it is called with, and what must have ended well before it starts."""

    id: str = Field(pattern=TASK_ID, description="unique in the workflow; its result is known by it")
    name: str = Field(default="", max_length=255, description="for people; the id where empty")
    type: Literal["task", "workflow", "delay", "signal", "approval"] = Field(default="task", description="kind of task")
    handler: str | None = Field(
        default=None, min_length=1, max_length=64, description="name of the handler that runs it"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="input of the handler; strings may hold {{ }}")
    retry_policy: RetryPolicy = Field(default=RetryPolicy(), description="what happens after a failure")
    timeout: float = Field(default=300, strict=True, gt=0, le=604_800, description="seconds that one attempt may run")
    dependencies: tuple[str, ...] = Field(default=(), description="ids of tasks that must succeed first")
    when: str | None = Field(default=None, description="condition; not yet run by this version")
    foreach: Any = Field(default=None, description="list to map over; not yet run by this version")
    description: str = Field(default="", description="for people")

    @model_validator(mode="before")
    @classmethod
    def _name_from_id(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not data.get("name") and isinstance(data.get("id"), str):
            return {**data, "name": data["id"]}
        return data


class WorkflowDefinition(_Value):
    """A workflow: its tasks, its variables, and what starts it."""

    id: str = Field(pattern=WORKFLOW_ID, description="name by which it is registered and run")
    name: str = Field(default="", max_length=255, description="for people; the id where empty")
    version: Annotated[str, BeforeValidator(_version_text, json_schema_input_type=str | int)] = Field(
        default="1", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$", description="changed content needs a new version"
    )
    description: str = Field(default="", description="for people")
    tasks: tuple[TaskDefinition, ...] = Field(min_length=1, description="in any order")
    triggers: tuple[dict[str, Any], ...] = Field(default=(), description="what starts it; not yet run by this version")
    variables: dict[str, Any] = Field(default_factory=dict, description="constants for templates")
    enable_parallel: bool = Field(default=True, description="false: one task after another, in dependency order")
    input_schema: dict[str, Any] | None = Field(default=None, description="JSON Schema of the execution's input")
    timeout: float | None = Field(
        default=None,
        strict=True,
        gt=0,
        le=31_536_000,
        description="seconds that a whole execution may take",
    )
    queue_timeout: float | None = Field(
        default=None,
        strict=True,
        gt=0,
        le=31_536_000,
        description="seconds that a ready task may wait for a worker before the execution fails",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_from_id(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not data.get("name") and isinstance(data.get("id"), str):
            return {**data, "name": data["id"]}
        return data

    @cached_property
    def by_id(self) -> dict[str, TaskDefinition]:
        """Tasks by id."""
        return {task.id: task for task in self.tasks}

    def to_json(self) -> str:
        """The definition as canonical JSON: sorted keys, defaults left out, so that equal content gives equal text."""
        return self._canonical

    @cached_property
    def _canonical(self) -> str:
        data = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`."""
        return cls.model_validate_json(text)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex: what an execution keeps of the definition it started with."""
        return hashlib.sha256(self._canonical.encode()).hexdigest()
