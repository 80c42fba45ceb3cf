"""RECORD: definitions with their compiled plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg.types.json import Json

from pipeline.errors import DefinitionConflict, ExecutionNotFound, WorkflowNotFound
from pipeline.result_store.door import Count, Door


@dataclass(frozen=True, kw_only=True)
class _Definition:
    definition_id: int
    digest: str = ""
    definition: str = ""


class Definitions(Door):
    """What workflows are."""

    def register(
        self, *, workflow_id: str, version: str, digest: str, definition: str,
        tasks: Sequence[Mapping[str, Any]], headers: Sequence[Mapping[str, Any]],
    ) -> int:  # fmt: skip
        """Record a definition with its plan, once; returns its key.

        Raises:
            DefinitionConflict: id and version are registered with another digest.
        """
        known = self._one("definition_digest", _Definition, workflow_id=workflow_id, version=version)
        if known is None:
            with self.link.transaction():
                fresh = self._one(
                    "insert_definition", _Definition, workflow_id=workflow_id, version=version, digest=digest,
                    definition=definition,
                )  # fmt: skip
                if fresh is not None:
                    self._all(
                        "insert_plan", Count, definition_id=fresh.definition_id, tasks=Json(tasks), headers=Json(headers)
                    )
                    return fresh.definition_id
            known = self._one("definition_digest", _Definition, workflow_id=workflow_id, version=version)
        if known is None or known.digest != digest:
            raise DefinitionConflict(workflow_id, version)
        return known.definition_id

    def find_definition(self, workflow_id: str, version: str | None = None) -> tuple[int, str]:
        """Key and JSON of a registered definition, the newest one where `version` is None.

        Raises:
            WorkflowNotFound: there is none.
        """
        found = self._one("find_definition", _Definition, workflow_id=workflow_id, version=version)
        if found is None:
            raise WorkflowNotFound(workflow_id, version)
        return found.definition_id, found.definition

    def definition_of(self, execution_id: str) -> str:
        """JSON of the definition that an execution started with.

        Raises:
            ExecutionNotFound: there is none.
        """
        found = self._one("definition_of", _Definition, execution_id=execution_id)
        if found is None:
            raise ExecutionNotFound(execution_id)
        return found.definition
