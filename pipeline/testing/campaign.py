"""One round: enqueue, break, wait until all is over, look for violations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline.definition import WorkflowDefinition
from pipeline.errors import PipelineError
from pipeline.testing.arena import Arena
from pipeline.testing.checks import Evidence, Record, records_of, violations
from pipeline.testing.fault import Fault, write_plan
from pipeline.testing.fleet import Fleet
from pipeline.testing.ledger import Ledger
from pipeline.testing.outside import Outside, go_on

#: seconds that locks of dead processes may stay
_LOCKS = 20.0


@dataclass(frozen=True, kw_only=True)
class Round:
    """What came of one round."""

    #: from 1
    number: int
    injected: tuple[Fault, ...]
    #: planned for an occurrence that did not come, or a victim that was dead
    missed: tuple[Fault, ...]
    executions: int
    runs: int
    violations: tuple[str, ...]
    #: seconds from the last fault, or its end, to the end of the last execution
    recovery: float


class Campaign:
    """Rounds on one arena with one fleet.

    Args:
        patience: seconds that a round may take.
        may_fail: executions need not succeed.
        check: of the caller's: what is wrong with an execution that ended.
    """

    def __init__(
        self, arena: Arena, fleet: Fleet, *, patience: float, may_fail: bool = False,
        check: Callable[[Record], Sequence[str]] = lambda record: (),
    ) -> None:  # fmt: skip
        self.arena, self.fleet, self.patience, self.may_fail, self.check = arena, fleet, patience, may_fail, check
        self.ledger = Ledger(arena.home / "ledger")
        self.outside = Outside(arena, fleet)
        self._number = 0
        self._before = 0

    def round(
        self, work: Sequence[tuple[WorkflowDefinition, Mapping[str, Any]]], faults: Sequence[Fault],
        *, meanwhile: Callable[[float, int], Sequence[Fault]] = lambda seconds, ended: (),
    ) -> Round:  # fmt: skip
        """Run workflows, those of one definition after each other, with faults; `meanwhile` is asked all the time for more, given the seconds and ended tasks."""
        self._number += 1
        offset, plan = self.ledger.size(), self.arena.settings.fault_plan
        assert plan is not None
        inside = write_plan(plan, faults, self._number)
        ids = [
            execution_id
            for _, alike in groupby(work, key=lambda one: one[0].digest)
            for execution_id in self._enqueue(list(alike))
        ]
        began = time.monotonic()
        waiting = sorted((f for f in faults if f.transition is None), key=lambda f: f.after)
        undo: list[tuple[float, Callable[[], None]]] = []
        injected: list[Fault] = []
        missed: list[Fault] = []
        disturbed = finished = 0.0
        while True:
            now = time.monotonic() - began
            while waiting and waiting[0].after <= now:
                fault = waiting.pop(0)
                try:
                    back = self.outside.do(fault)
                except ProcessLookupError:  # its victim is dead already
                    missed.append(fault)
                    continue
                injected.append(fault)
                disturbed = time.monotonic() - began
                if back is not None:
                    undo.append((disturbed + back[0], back[1]))
            for name in [name for name in inside if (self.arena.home / f"{name}.fired").exists()]:
                injected.append(inside.pop(name))
                disturbed = now
                if ":stop" in injected[-1].kind:
                    pid = int((self.arena.home / f"{name}.fired").read_text().split()[0])
                    undo.append((now + self.outside.long, lambda pid=pid: go_on(pid)))  # type: ignore[misc]
            for moment, back_to_normal in [u for u in undo if u[0] <= now]:
                undo.remove((moment, back_to_normal))
                back_to_normal()
                disturbed = now
            self.fleet.tend()
            open_, done = self._progress(ids)
            waiting += meanwhile(now, done) if open_ else ()
            if open_ == 0 and finished <= disturbed:
                finished = time.monotonic() - began
            if (open_ == 0 and not waiting and not undo) or now > self.patience:
                break
            time.sleep(0.05)
        for _, back_to_normal in undo:
            back_to_normal()
        write_plan(plan, (), self._number)
        found = self._look(ids, offset, injected)
        self.fleet.bury()
        self._before = len(injected)
        starts = sum(entry.kind == "start" for entry in self.ledger.entries(offset))
        return Round(
            number=self._number, injected=tuple(injected), missed=(*inside.values(), *waiting, *missed), executions=len(ids), runs=starts,
            violations=tuple(found), recovery=max(0.0, finished - disturbed),
        )  # fmt: skip

    def _enqueue(self, work: Sequence[tuple[WorkflowDefinition, Mapping[str, Any]]]) -> list[str]:
        """Half of them with one call, and then one by one."""
        definition, engine, half = work[0][0], self.arena.engine, len(work) // 2
        together = engine.execute_many(definition, [data for _, data in work[:half]]) if half else []
        return [*together, *(engine.execute_workflow(definition, data) for _, data in work[half:])]

    def _progress(self, ids: list[str]) -> tuple[int, int]:
        found = self.arena.query(
            "SELECT (SELECT count(*) FROM pipeline.workflow_executions WHERE execution_id = ANY (%s) AND finished_at IS NULL),"
            " (SELECT count(*) FROM pipeline.task_executions WHERE execution_id = ANY (%s) AND finished_at IS NOT NULL)",
            ids, ids,
        )  # fmt: skip
        return int(found[0][0]), int(found[0][1])

    def _look(self, ids: list[str], offset: int, injected: Sequence[Fault]) -> list[str]:
        evidence = self.evidence(ids, offset, injected)
        found = violations(evidence)
        if any(text.startswith("ended: ") and "has not ended" in text for text in found):
            found.append(f"the workers said:\n{self.fleet.last_lines()}")
        found += [f"audit: {v.violation}: {v.execution_id}/{v.subject}" for v in self._audit()]
        found += [f"{record.execution_id}: {text}" for record in evidence.records for text in self.check(record)]
        return found + self._locks_left()

    def evidence(self, ids: list[str], offset: int, injected: Sequence[Fault]) -> Evidence:
        """What store and ledger say of some executions."""
        executions = self.arena.query(
            "SELECT execution_id, status, error_message FROM pipeline.workflow_executions WHERE execution_id = ANY (%s)", ids
        )
        tasks = self.arena.query(
            "SELECT t.execution_id, t.task_id, t.handler, t.status, t.epoch, w.dependencies"
            "  FROM pipeline.task_executions t JOIN pipeline.workflow_executions e USING (execution_id)"
            "  JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = t.task_id"
            " WHERE t.execution_id = ANY (%s)", ids,
        )  # fmt: skip
        attempts = self.arena.query(
            "SELECT execution_id, task_id, epoch, outcome FROM pipeline.task_attempts WHERE execution_id = ANY (%s)", ids
        )
        names = set(ids)
        return Evidence(
            records=records_of(executions, tasks, attempts),
            entries=[entry for entry in self.ledger.entries(offset) if entry.execution_id in names],
            effects=frozenset(key for key in self.ledger.effects() if key[: key.rfind("_")] in names),
            faults=len(injected) + self._before,
            claims_forgotten=any(fault.kind == "database-kill" for fault in injected), may_fail=self.may_fail,
        )  # fmt: skip

    def _audit(self) -> Sequence[Any]:
        until = time.monotonic() + 10
        while True:
            try:
                return self.arena.engine.installation.store.audit()
            except PipelineError:
                if time.monotonic() > until:
                    raise

    def _locks_left(self) -> list[str]:
        """Locks and transactions of processes that do nothing any more."""
        until = time.monotonic() + _LOCKS
        while True:
            left = self.arena.query(
                "SELECT DISTINCT a.pid, a.state, a.query FROM pg_stat_activity a LEFT JOIN pg_locks l USING (pid)"
                " WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()"
                "   AND (a.state LIKE 'idle in transaction%%' OR (a.state = 'idle' AND l.locktype = 'advisory'))"
                "   AND 0 = %s", 0,
            )  # fmt: skip
            if not left or time.monotonic() > until:
                return [f"left: backend {json.dumps(row, default=str)}" for row in left]
            time.sleep(0.1)

    def connections_left(self) -> list[str]:
        """Connections of the engine's that outlive all its processes; for when the fleet is closed."""
        self.arena.engine.installation.store.close()
        until = time.monotonic() + _LOCKS
        while True:
            left = self.arena.query(
                "SELECT pid, state, query FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name LIKE %s", "chordal%",
            )  # fmt: skip
            if not left or time.monotonic() > until:
                return [f"left: connection {json.dumps(row, default=str)}" for row in left]
            time.sleep(0.1)
