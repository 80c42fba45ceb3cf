"""The kit on real processes: a kill at every transition, some faults from outside, and that it finds what is wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.definition import WorkflowDefinition
from pipeline.result_store.connection import connect
from pipeline.testing import CrashKit, Fault, Record
from pipeline.testing.__main__ import main
from pipeline.testing.arena import Arena
from pipeline.testing.campaign import Campaign
from pipeline.testing.fault import TRANSITIONS, all_kinds, describe, draw, from_json, select, to_json
from pipeline.testing.fleet import Fleet
from pipeline.testing.workload import random_workflow

pytestmark = pytest.mark.timeout(300)

KILLS = [Fault(kind=f"{point}:kill", nth=2) for point in TRANSITIONS]
BROKEN_LINES = [Fault(kind=kind) for kind in ("claim.before:sever", "complete.before:sever", "end.before:raise")]
OUTSIDE = [
    Fault(kind=kind, after=0.1)
    for kind in ("child-kill", "session-kill", "broker-flush", "broker-cut", "database-terminate", "messages-forged")
]


def test_kill_at_every_transition_and_faults_from_outside_lose_nothing() -> None:
    report = CrashKit(in_flight=4).run([*KILLS, *BROKEN_LINES, *OUTSIDE], seed=7, minutes=4)
    assert report.violations == []
    assert set(report.faults) == {fault.kind for fault in (*KILLS, *BROKEN_LINES, *OUTSIDE)}, "some never hit"
    assert report.runs > report.executions > 0


def test_kit_on_servers_of_others_breaks_only_what_is_its_own_and_leaves_no_database(servers: Any) -> None:
    kit = CrashKit(in_flight=3, database_url=servers.database_url, broker_url=servers.broker_url)
    assert not {"broker-kill", "database-kill"} & set(kit.kinds)
    kinds = ("child-kill", "broker-flush", "broker-cut", "database-cut", "messages-doubled", "publish.before:drop")
    report = kit.run([Fault(kind=kind, after=0.1) for kind in kinds], seed=1, minutes=4)
    assert report.violations == []
    assert set(report.faults) == set(kinds)
    with kit.open_arena() as arena:
        ((name,),) = arena.query("SELECT current_database()")
    with connect(servers.database_url, "test") as connection:
        assert connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchall() == []


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with CrashKit().open_arena() as arena:
        yield arena


@pytest.fixture(scope="module")
def fleet(arena: Arena) -> Iterator[Fleet]:
    with Fleet(arena, workers=1, concurrency=2) as fleet:
        yield fleet


def flow(*tasks: dict[str, Any]) -> WorkflowDefinition:
    plain = {"retry_policy": {"max_retries": 0}}
    return WorkflowDefinition.model_validate({"id": f"crash-{id(tasks)}", "version": "1", "tasks": [plain | t for t in tasks]})


def test_failed_workflow_is_a_violation_unless_it_may_fail(arena: Arena, fleet: Fleet) -> None:
    broken = flow({"id": "a", "handler": "debug.fail"})
    strict, lenient = Campaign(arena, fleet, patience=60), Campaign(arena, fleet, patience=60, may_fail=True)
    (found,) = strict.round([(broken, {})], ()).violations
    assert "is failed: task a failed" in found
    assert lenient.round([(broken, {})], ()).violations == ()


def test_check_of_the_callers_is_asked_for_every_execution(arena: Arena, fleet: Fleet) -> None:
    def check(record: Record) -> Sequence[str]:
        return [f"saw {task}" for task in record.tasks]

    done = Campaign(arena, fleet, patience=60, check=check).round([(flow({"id": "a", "handler": "debug.noop"}), {})], ())
    assert [text.partition(": ")[2] for text in done.violations] == ["saw a"]
    assert (done.executions, done.runs, done.injected) == (1, 1, ())


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE pipeline.task_executions SET epoch = epoch + 5 WHERE task_id = 'b'", "recorded_as_run"),
        ("UPDATE pipeline.workflow_executions SET status = 'running', finished_at = NULL", "has not ended"),
        ("UPDATE pipeline.task_executions SET status = 'running', worker_id = 1, deadline_at = now(), finished_at = NULL WHERE task_id = 'b'",
         "with open tasks b"),
        ("UPDATE pipeline.workflow_tasks SET dependencies = '{b}' WHERE task_id = 'a'", "in_order"),
    ],
)  # fmt: skip
def test_doctored_store_is_a_violation(arena: Arena, fleet: Fleet, statement: str, found: str) -> None:
    campaign = Campaign(arena, fleet, patience=60)
    offset = campaign.ledger.size()
    work = flow({"id": "a", "handler": "debug.noop"}, {"id": "b", "handler": "debug.noop", "dependencies": ["a"]})
    execution_id = arena.engine.execute_workflow(work)
    arena.engine.wait(execution_id, timeout=60)
    assert campaign._look([execution_id], offset, ()) == []
    saved = "CREATE TABLE saved_{0} AS SELECT * FROM pipeline.{0}"
    tables = ("task_executions", "workflow_executions", "workflow_tasks")
    for table in tables:
        arena.query(saved.format(table))
    try:
        arena.query(statement)
        texts = campaign._look([execution_id], offset, ())
        assert any(found in text for text in texts), texts
    finally:
        for table in tables:
            arena.query(f"TRUNCATE pipeline.{table}")
            arena.query(f"INSERT INTO pipeline.{table} SELECT * FROM saved_{table}")
            arena.query(f"DROP TABLE saved_{table}")


def test_lock_of_an_idle_backend_is_a_violation(arena: Arena, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.testing.campaign._LOCKS", 0.0)
    campaign = Campaign(arena, fleet, patience=60)
    with arena.connect() as connection:
        connection.execute("SELECT pg_advisory_lock(1)")
        (found,) = campaign._locks_left()
        assert "pg_advisory_lock" in found


def test_every_kind_has_a_description_and_is_selected_by_name_beginning_or_action() -> None:
    kinds = all_kinds()
    assert len(kinds) == len(set(kinds)) >= 60
    assert all(describe(kind) for kind in kinds)
    assert select(["child-kill", "child-kill"], kinds) == ("child-kill",)
    assert set(select(["claim."], kinds)) == {f"{p}:{a}" for p, actions in TRANSITIONS.items() for a in actions if "claim" in p}
    assert select([":drop"], kinds) == ("publish.before:drop",)
    with pytest.raises(ValueError, match="'nothing'"):
        select(["nothing"], kinds)


def test_draw_with_the_same_seed_is_the_same_and_covers_every_kind(tmp_path: Path) -> None:
    kinds = all_kinds()
    one, other = (draw(kinds, random.Random(3)) for _ in range(2))
    faults = [next(one) for _ in kinds]
    assert faults == [next(other) for _ in kinds]
    assert {fault.kind for fault in faults} == set(kinds)
    assert from_json(to_json(faults)) == tuple(faults)
    assert random_workflow(random.Random(3), tmp_path) == random_workflow(random.Random(3), tmp_path)


def test_command_lists_kinds_and_refuses_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(all_kinds())
    assert main(["--kinds", "nothing"]) == 2
    assert "'nothing'" in capsys.readouterr().err
