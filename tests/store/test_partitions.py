"""Executions lie in partitions by the day that their ids begin with; what is forgotten leaves with a whole one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from pipeline.errors import ExecutionNotFound
from pipeline.result_store.rows import Created, NewExecution
from tests.store.conftest import OF_AN_EXECUTION, Driver

#: tables that are cut into partitions
CUT = tuple(name for name in OF_AN_EXECUTION if name != "workflow_events")
#: the day on which these tests begin, since 1970
DAY = 20_000
WIDE = {"a": "", "b": "", "end": "a b"}

Connect = Callable[[], "psycopg.Connection[Any]"]


@pytest.fixture
def days(database_url: str) -> Iterator[Driver]:
    """A driver without partitions, at noon of the first day."""
    driver = Driver(database_url)
    driver.worker = driver.new_worker(lease=365 * 86_400)
    go_to(driver, DAY)
    yield driver
    assert driver.store.audit() == []
    driver.close()


def go_to(driver: Driver, day: int) -> None:
    """Set the clock to noon of a day."""
    noon = datetime.fromtimestamp((day + 0.5) * 86_400, UTC)
    driver.sql("SELECT set_config('pipeline.fake_now', %s, false)", noon.isoformat())


def on_day(driver: Driver, day: int, number: int = 0) -> str:
    """An execution that was created on a day."""
    return create(driver, f"exec-{day:04x}{number:08x}")


def create(driver: Driver, execution: str) -> str:
    """An execution with an id of our own."""
    (created,) = record(driver, execution, WIDE)
    return created.execution_id


def record(driver: Driver, execution: str, graph: dict[str, str]) -> list[Created]:
    return driver.store.create_executions(
        [NewExecution(execution_id=execution, input_data={}, input_digest="")],
        definition_id=driver.dispatcher.register(driver.define(graph)), user_id=None, variables={}, timeout=None,
    )  # fmt: skip


def places(driver: Driver, execution: str) -> set[str]:
    """What its rows' tables end with."""
    found = {
        name.removeprefix(table)
        for table in CUT
        for (name,) in driver.sql(
            f"SELECT c.relname FROM pipeline.{table} x JOIN pg_class c ON c.oid = x.tableoid WHERE execution_id = %s", execution
        )
    }
    return {name.removeprefix("_") for name in found}


def partitions(driver: Driver) -> dict[int, int]:
    """First and last day of each partition; each table has just these."""
    found = dict(driver.sql("SELECT first_day, last_day FROM pipeline.partitions ORDER BY 1"))
    for table in CUT:
        names = driver.sql(
            "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = %s::regclass",
            f"pipeline.{table}",
        )
        assert {name for (name,) in names} == {f"{table}_default", *(f"{table}_{first:x}" for first in found)}
    return found


def looks(driver: Driver) -> dict[str, int]:
    """How often each partition of the tasks was read."""
    return dict(
        driver.sql("SELECT relname, idx_scan + seq_scan FROM pg_stat_xact_user_tables WHERE relname LIKE 'task_executions%'")
    )


def end(driver: Driver, execution: str) -> None:
    """Run it to its end."""
    driver.drain(execution)
    assert driver.status(execution) == "success"


def test_executions_of_days_without_partitions_lie_in_the_default_ones(days: Driver) -> None:
    assert places(days, on_day(days, DAY)) == {"default"}


def test_make_makes_the_coming_days_and_then_nothing_until_they_come(days: Driver) -> None:
    assert days.store.make_partitions(7) == 1
    assert partitions(days) == {DAY + 1: DAY + 7}
    assert days.store.make_partitions(7) == 0
    go_to(days, DAY + 1)
    assert days.store.make_partitions(7) == 1
    assert partitions(days) == {DAY + 1: DAY + 7, DAY + 8: DAY + 14}
    assert places(days, on_day(days, DAY)) == {"default"}
    assert places(days, on_day(days, DAY + 7)) == {f"{DAY + 1:x}"}
    assert places(days, on_day(days, DAY + 8)) == {f"{DAY + 8:x}"}
    assert places(days, on_day(days, DAY + 15)) == {"default"}


def test_make_after_a_time_without_it_begins_with_the_next_day(days: Driver) -> None:
    days.store.make_partitions(2)
    go_to(days, DAY + 20)
    assert days.store.make_partitions(3) == 1
    assert partitions(days) == {DAY + 1: DAY + 2, DAY + 21: DAY + 23}


def test_make_takes_along_what_lies_in_the_default_partitions_already(days: Driver) -> None:
    execution, other = on_day(days, DAY + 3), on_day(days, DAY)
    days.complete(execution, "a")
    days.store.end(days.must_claim(execution, "b"), "retry", delay=0.0)
    before = days.picture(execution)
    assert days.store.make_partitions(7) == 1
    assert places(days, execution) == {f"{DAY + 1:x}"}
    assert places(days, other) == {"default"}
    assert days.picture(execution) == before
    end(days, execution)


def test_partitions_have_the_indexes_constraints_and_settings_of_the_default_ones(days: Driver) -> None:
    days.store.make_partitions(1)
    for table in CUT:
        shapes = [
            days.sql(
                """SELECT c.reloptions, ARRAY(SELECT regexp_replace(pg_get_indexdef(i.indexrelid), '.* USING', '')
                                                FROM pg_index i WHERE i.indrelid = c.oid ORDER BY 1),
                          ARRAY(SELECT pg_get_constraintdef(k.oid) FROM pg_constraint k WHERE k.conrelid = c.oid ORDER BY 1)
                     FROM pg_class c WHERE c.oid = %s::regclass""",
                f"pipeline.{table}_{suffix}",
            )
            for suffix in ("default", f"{DAY + 1:x}")
        ]
        assert shapes[0] == shapes[1]


def test_forgotten_execution_is_seen_no_more_and_leaves_with_its_partition(days: Driver) -> None:
    days.store.make_partitions(1)
    go_to(days, DAY + 1)
    first, second = on_day(days, DAY + 1, 1), on_day(days, DAY + 1, 2)
    days.store.end(days.must_claim(first, "a"), "retry", delay=0.0)
    end(days, first)
    end(days, second)
    go_to(days, DAY + 3)
    assert days.store.forget_executions([first]) == 1
    assert (days.store.get_task(first, "a"), days.store.get_attempts(first, "a"), days.store.get_tasks(first)) == (None, [], [])
    assert days.store.drop_partitions() == 0, "the second is there yet"
    assert places(days, first) == {f"{DAY + 1:x}"}, "no row was deleted by itself"
    assert days.store.forget_executions([second]) == 1
    assert days.store.drop_partitions() == 1
    assert partitions(days) == {}
    assert days.picture(first) == days.picture(second) == []


def test_forgotten_execution_of_a_day_without_a_partition_leaves_row_by_row(days: Driver) -> None:
    execution = on_day(days, DAY)
    end(days, execution)
    days.store.make_partitions(1)
    assert days.store.forget_executions([execution]) == 1
    assert days.picture(execution) == []


def test_drop_keeps_what_is_to_come_and_the_last_two_days_for_clocks_that_are_late(days: Driver) -> None:
    days.store.make_partitions(1)
    for day in (DAY, DAY + 1, DAY + 2):
        go_to(days, day)
        assert days.store.drop_partitions() == 0
    go_to(days, DAY + 3)
    assert days.store.drop_partitions() == 1


def test_drop_waits_for_nobody_for_long_and_drops_at_a_later_look(days: Driver) -> None:
    days.store.make_partitions(1)
    go_to(days, DAY + 3)
    with psycopg.connect(days.url) as reader:
        reader.execute("SELECT count(*) FROM pipeline.task_executions")
        assert days.store.drop_partitions() == 0
        assert partitions(days) == {DAY + 1: DAY + 1}
        reader.commit()
        assert days.store.drop_partitions() == 1


def test_make_waits_for_nobody_for_long_and_makes_at_a_later_look(days: Driver) -> None:
    with psycopg.connect(days.url) as writer:
        writer.execute("LOCK TABLE pipeline.join_counters IN ROW EXCLUSIVE MODE")
        assert days.store.make_partitions(1) == 0
        assert partitions(days) == {}
        writer.commit()
        assert days.store.make_partitions(1) == 1


def test_make_makes_none_where_the_default_partition_is_larger_than_can_be_read_in_a_moment(days: Driver) -> None:
    on_day(days, DAY)
    assert days.store.make_partitions(1, most_bytes=0) == 0
    assert partitions(days) == {}


def test_create_with_an_id_of_a_forgotten_execution_whose_partition_is_there_records_nothing(days: Driver) -> None:
    days.store.make_partitions(1)
    execution = on_day(days, DAY + 1)
    end(days, execution)
    assert days.store.forget_executions([execution]) == 1
    assert record(days, execution, {"x": ""}) == []
    with pytest.raises(ExecutionNotFound):
        days.status(execution)


def test_drop_keeps_an_execution_that_a_late_clock_creates_at_the_same_time(days: Driver) -> None:
    days.store.make_partitions(1)
    go_to(days, DAY + 3)
    late = Driver(days.url)
    try:
        with late.store.link.transaction():
            execution = on_day(late, DAY + 1)
            assert days.store.drop_partitions() == 0
        assert days.store.drop_partitions() == 0
        assert places(days, execution) == {f"{DAY + 1:x}"}
        end(days, execution)
    finally:
        late.close()


def test_straight_path_reads_the_partition_of_its_execution_and_no_other(days: Driver) -> None:
    for day in range(DAY, DAY + 3):
        go_to(days, day)
        days.store.make_partitions(1)
    execution = on_day(days, DAY + 2)
    for _ in range(10):  # as often as Postgres takes to settle on a plan
        end(days, on_day(days, DAY + 2, int(days.sql("SELECT count(*) FROM pipeline.workflow_executions")[0][0])))
    with days.store.link.transaction():
        before = looks(days)
        days.complete(execution, "a")
        looked = {name for name, times in looks(days).items() if times > before[name]}
    assert looked == {f"task_executions_{DAY + 2:x}"}


def test_create_with_an_id_that_is_taken_records_nothing(days: Driver) -> None:
    execution = on_day(days, DAY)
    before = days.picture(execution)
    assert record(days, execution, {"x": ""}) == []
    assert days.picture(execution) == before
