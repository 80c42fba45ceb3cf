"""The statements: each has its method, each runs, and none reads a whole table."""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Json

import pipeline.result_store
from pipeline.compiler import SLOTS, WIDE
from pipeline.dispatch import _fresh_id
from pipeline.result_store.connection import Database
from pipeline.result_store.rows import NewExecution
from pipeline.result_store.statements import sql_text, statements
from pipeline.result_store.store import ResultStore
from pipeline.states import TaskStatus
from tests.store.conftest import Driver
from tests.store.mutants import MUTANTS, mutated


class Samples(dict[str, Any]):
    """Something for each parameter of the statements: nothing, where nothing will do."""

    def __missing__(self, name: str) -> None:
        return None


SAMPLES = Samples(
    {name: timedelta(seconds=1) for name in ("age", "lease", "grace", "hard_limit", "delay")},
    execution_id="exec-none", task_id="a", epoch=0, worker_id=1, limit=10, first_only=True, tasks=Json([]), headers=Json([]),
)  # fmt: skip
#: tables that grow with each execution and are filled here
LARGE = ("task_executions_default", "workflow_executions", "join_counters_default", "workflow_states_default")


def called() -> list[str]:
    """Names of statements that the store's methods run."""
    trees = [ast.parse(path.read_text()) for path in Path(pipeline.result_store.__path__[0]).glob("*.py")]
    return [
        node.args[0].value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("_all", "_one", "_steer")
        and node.args and isinstance(node.args[0], ast.Constant)
    ]  # fmt: skip


def test_every_statement_is_run_by_a_method_and_every_method_has_its_statement() -> None:
    assert set(called()) == set(statements())


def test_every_mutant_finds_the_piece_of_the_schema_that_it_breaks() -> None:
    schema = sql_text("schema.sql")
    assert all(mutated(*how) != schema for how in MUTANTS.values())


def test_every_statement_has_a_name_of_its_own_and_says_what_it_is_for() -> None:
    names = re.findall(r"^-- (\w+) --$", sql_text("queries.sql"), re.MULTILINE)
    assert len(names) == len(set(names)) == len(statements())
    assert [name for name, text in statements().items() if not re.match(r"-- [A-Z].*\.$", text.splitlines()[0])] == []


@pytest.mark.parametrize("name", statements())
def test_statement_runs(drive: Driver, name: str) -> None:
    with psycopg.connect(drive.url) as connection:
        with suppress(psycopg.errors.NotNullViolation, psycopg.errors.NoDataFound):  # it was understood
            connection.execute(statements()[name].encode(), SAMPLES)
        connection.rollback()


@pytest.fixture(scope="module")
def filled(shared: Driver) -> Driver:
    """20,000 ended tasks beside 500 open ones: due, not yet due, running and lost."""
    drive = shared
    drive.set_clock(None)
    dead = drive.new_worker(lease=0)
    key = drive.dispatcher.register(drive.define({"a": ""}))
    for statement in (
        """INSERT INTO pipeline.workflow_executions
            (execution_id, definition_id, workflow_id, input_digest, status, finished_at)
           SELECT 'old-' || n, $1, 'w', '', 'success', now() FROM generate_series(1, 20000) n""",
        "INSERT INTO pipeline.workflow_states SELECT 'old-' || n, '{}', '{}' FROM generate_series(1, 20000) n",
        """INSERT INTO pipeline.task_executions (execution_id, task_id, handler, status, epoch, attempt, worker_id, finished_at)
           SELECT 'old-' || n, 'a', 'h', 'success', 1, 1, 1, now() FROM generate_series(1, 20000) n""",
        "INSERT INTO pipeline.join_counters SELECT 'old-' || n, 0, 0 FROM generate_series(1, 20000) n",
        "INSERT INTO pipeline.workers (name, pid, expires_at) SELECT 'w', n, now() FROM generate_series(1, 2000) n",
    ):
        drive.sql(statement.replace("$1", str(key)))
    for n in range(50):
        execution = drive.start({f"t{m}": "" for m in range(10)})
        if n % 5 == 0:
            drive.claim(execution, "t0")
            drive.sql(
                "UPDATE pipeline.task_executions SET worker_id = %s WHERE execution_id = %s AND status = 'running'",
                dead,
                execution,
            )
    drive.sql("UPDATE pipeline.task_executions SET due_at = now() WHERE status = 'pending' AND task_id IN ('t1', 't2')")
    drive.sql("ANALYZE")
    return drive


@pytest.mark.parametrize(
    ("name", "indexes"),
    [
        ("recovery_work", {"due_at", "worker_id"}),
        ("lost_attempts", {"worker_id"}),
        ("overdue_attempts", {"worker_id"}),
        ("count_published", {"due_at"}),
    ],
)
def test_statement_looks_at_the_partial_indexes_only(filled: Driver, name: str, indexes: set[str]) -> None:
    with psycopg.connect(filled.url) as connection:
        plan = "\n".join(line for (line,) in connection.execute(f"EXPLAIN {statements()[name]}".encode(), SAMPLES))
    assert not re.findall(rf"Seq Scan on ({'|'.join(LARGE)})", plan), plan
    assert set(re.findall(r"task_executions_default_(due_at|worker_id)_idx", plan)) == indexes, plan


def seq_scans(drive: Driver) -> dict[str, int]:
    return dict(drive.sql("SELECT relname, seq_scan FROM pg_stat_xact_user_tables WHERE schemaname = 'pipeline'"))


def test_no_operation_reads_a_large_table_from_end_to_end(filled: Driver) -> None:
    drive, store = filled, filled.store
    operations = {
        "create": lambda: drive.start({"a": "", "b": "", "join": "a b", "s": "", "t": "s"}),
        "scatter": lambda: store.scatter(execution, {"a": 0, "b": 0}),
        "claim": lambda: drive.claim(execution, "a"),
        "complete": lambda: drive.complete(execution, "b"),
        "state": lambda: store.state(execution),
        "results": lambda: store.results(execution, ["a", "b"]),
        "skip": lambda: drive.end(execution, "s", "skipped"),
        "lose": lambda: store.end(drive.fence(execution, "a"), "lost"),
        "fail": lambda: drive.end(execution, "a", "failed"),
        "reopen": lambda: store.reopen_execution(execution, None),
        "pause": lambda: store.pause_execution(execution, None),
        "resume": lambda: store.resume_execution(execution, None),
        "take due": lambda: store.take_due(5, first_only=False),
        "take new": lambda: store.take_due(5, first_only=True),
        "mark": lambda: store.mark_task(execution, "a", TaskStatus.SUCCESS, result=1, user_id=None, reason="why"),
        "expire": lambda: store.expire_executions(10),
        "cancel": lambda: store.cancel_execution(execution, None),
        "get": lambda: (store.get_execution(execution), store.get_tasks(execution), store.get_task(execution, "a")),
        "events": lambda: store.get_events(execution),
        "forget": lambda: store.forget_executions([execution]),
        "drop": lambda: store.drop_partitions(),
    }
    execution = drive.start({"a": "", "b": "", "join": "a b", "s": "", "t": "s"})
    guilty = []
    for name, operate in operations.items():
        with store.link.transaction():
            before = seq_scans(drive)
            operate()
            guilty += [
                (name, table) for table, n in seq_scans(drive).items() if table in LARGE and n > before.get(table, 0)
            ]
    assert guilty == []


def test_plans_made_while_tables_were_small_do_not_read_them_from_end_to_end_once_they_are_large(database_url: str) -> None:
    drive = Driver(database_url)
    for number in range(10):
        drive.drain(drive.start({"a": "", "b": "a", "c": "a"}))
        if number == 3:
            drive.sql("VACUUM ANALYZE")
    before = seq_scans(drive)
    execution = drive.start({"a": "", **{f"b{n}": "a" for n in range(300)}})
    assert len(drive.complete(execution, "a")) == 300
    for n in range(10):
        drive.complete(execution, f"b{n}")
    drive.sql("SELECT pg_stat_force_next_flush()")
    after = seq_scans(drive)
    drive.close()
    tables = [table for table in after if table.startswith(("task_executions", "workflow_tasks", "join_counters", "workflow_ex"))]
    assert {table: after[table] - before.get(table, 0) for table in tables} == dict.fromkeys(tables, 0)


def test_claims_and_ends_find_their_task_by_its_key_alone_also_by_plans_made_while_tables_were_empty(
    database_url: str,
) -> None:
    drive = Driver(database_url)

    def scans() -> int:
        drive.sql("SELECT pg_stat_force_next_flush()")
        ((number,),) = drive.sql(
            "SELECT sum(idx_scan)::int FROM pg_stat_user_indexes WHERE relname LIKE 'task_executions%' AND indexrelname NOT LIKE '%pkey'"
        )
        return int(number)

    drive.store.renew_worker(drive.worker, 3600, quick=["debug.noop"])
    definition = drive.define({"a": ""})
    for _ in range(2):
        drive.start({"a": ""})
    drive.dispatcher.create(definition, {})  # looks at what waits, so that others may join it
    before = scans()
    assert [bool(drive.dispatcher.create(definition, {}).ready) for _ in range(7)] == [False] * 7, "they join"
    execution = drive.start({f"t{n}": "" for n in range(30)})
    for n in range(25, 30):
        drive.complete(execution, f"t{n}")
    drive.store.scatter(execution, {f"t{n}": 0 for n in range(5, 25)})
    for task, outcome in (("t0", "success"), ("t1", "retry"), ("t2", "skipped"), ("t3", "lost"), ("t4", "failed")):
        drive.store.set_progress(fence := drive.must_claim(execution, task), 0.5, "half")
        drive.store.end(fence, outcome)
    assert scans() == before
    drive.close()


def test_create_is_planned_once_and_not_with_each_call_also_for_who_does_not_ask_for_it(database_url: str) -> None:
    store = ResultStore.open(database_url)
    drive = Driver(database_url)
    key, planned = drive.dispatcher.register(drive.define({"a": "", "b": "a", "c": "a", "d": "b c"})), list[str]()

    def create() -> None:
        new = [NewExecution(execution_id=_fresh_id(), input_data={}, input_digest="")]
        store.create_executions(new, definition_id=key, user_id=None, variables={}, timeout=None)

    for _ in range(12):
        create()
    assert isinstance(store.link, Database)
    connection = store.link.connection
    connection.add_notice_handler(lambda told: planned.append(told.message_primary or ""))
    connection.execute("SET log_planner_stats = on")
    connection.execute("SET client_min_messages = log")
    connection.execute("SELECT count(*) FROM pipeline.workers")
    assert planned == ["PLANNER STATISTICS"], "the server says when it plans"
    create()
    store.close()
    drive.close()
    assert planned == ["PLANNER STATISTICS"]


def test_counting_down_a_join_is_a_hot_update(drive: Driver) -> None:
    def updates() -> tuple[int, int]:
        drive.sql("SELECT pg_stat_force_next_flush()")
        drive.sql("SELECT 1")
        ((every, hot),) = drive.sql(
            """SELECT sum(n_tup_upd)::int, sum(n_tup_hot_upd)::int FROM pg_stat_user_tables
                WHERE relname LIKE 'join_counters%'"""
        )
        return every, hot

    execution = drive.start({**{f"a{n}": "" for n in range(200)}, "end": " ".join(f"a{n}" for n in range(200))})
    before = updates()
    drive.drain(execution)
    after = updates()
    assert after[0] - before[0] == 200 + SLOTS + 1
    assert after[1] - before[1] > 200


@pytest.mark.parametrize(
    ("statement", "violation"),
    [
        ("UPDATE pipeline.join_counters SET remaining = remaining + 1 WHERE slot = 2", "counter differs from its open tasks"),
        ("INSERT INTO pipeline.join_counters SELECT execution_id, 7, 1 FROM pipeline.workflow_executions", "counter differs from its open tasks"),
        ("DELETE FROM pipeline.join_counters WHERE slot = 2", "counter differs from its open tasks"),
        ("DELETE FROM pipeline.workflow_executions", "may start although its execution is gone"),
    ],
    ids=["wrong counter", "counter of nothing", "no counter", "no execution"],
)  # fmt: skip
def test_audit_finds_what_is_broken_on_purpose(database_url: str, statement: str, violation: str) -> None:
    drive = Driver(database_url)
    drive.start({**{f"a{n}": "" for n in range(WIDE)}, "end": " ".join(f"a{n}" for n in range(WIDE))})
    assert drive.store.audit() == []
    drive.sql(statement)
    assert {found.violation for found in drive.store.audit()} == {violation}
    drive.close()
