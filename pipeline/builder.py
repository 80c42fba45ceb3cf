"""A definition written in Python, task by task."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.definition import RetryPolicy, WorkflowDefinition
from pipeline.validation import validate


@dataclass(frozen=True)
class TaskRef:
    """A task of a builder: hand it to `after`, and its results to the params of later tasks."""

    id: str

    @property
    def result(self) -> str:
        """The template of the whole result."""
        return f"{{{{ {_path('tasks', self.id)} }}}}"

    def __getitem__(self, name: str | tuple[str, ...]) -> str:
        """The template of one value of the result: `ref["rows"]`, or `ref["stats", "mean"]` further inside."""
        return f"{{{{ {_path('tasks', self.id, *((name,) if isinstance(name, str) else name))} }}}}"


class WorkflowBuilder:
    """Collects tasks: `flow.task("read", "files.read", params={...})`, then `flow.build()`.

    Args:
        id: name by which the workflow is registered and run.
        fields: further fields of `WorkflowDefinition`, as `version` or `variables`.
    """

    def __init__(self, id: str, **fields: Any) -> None:  # noqa: A002 - the definition's own name
        self._fields = {"id": id, **fields}
        self._tasks: list[dict[str, Any]] = []

    def task(
        self,
        id: str,  # noqa: A002 - the definition's own name
        handler: str,
        *,
        params: Mapping[str, Any] | None = None,
        after: TaskRef | str | Iterable[TaskRef | str] = (),
        timeout: float | None = None,
        retry_policy: RetryPolicy | Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> TaskRef:
        """Add a task that starts once all of `after` succeeded; further fields are those of `TaskDefinition`.

        Raises:
            TypeError: `dependencies` is given, which `after` says.
        """
        if "dependencies" in fields:
            raise TypeError(f"task {id!r}: write after=..., with ids or what task() returned, instead of dependencies=...")
        needed = (after,) if isinstance(after, TaskRef | str) else after
        task: dict[str, Any] = {"id": id, "handler": handler, **fields}
        task["dependencies"] = [other.id if isinstance(other, TaskRef) else other for other in needed]
        given = {"params": params, "timeout": timeout, "retry_policy": retry_policy}
        task |= {name: dict(v) if isinstance(v, Mapping) else v for name, v in given.items() if v is not None}
        self._tasks.append(task)
        return TaskRef(id)

    def build(self) -> WorkflowDefinition:
        """The definition; handlers are checked where it is registered or run.

        Raises:
            DefinitionError: with every problem.
        """
        return validate({**self._fields, "tasks": self._tasks}, None)


def _path(*names: str) -> str:
    """A CEL path; names that are no identifiers stand in brackets."""
    text = names[0]
    for name in names[1:]:
        plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and name not in ("in", "true", "false", "null")
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        text += f".{name}" if plain else f'["{quoted}"]'
    return text
