"""The states and transitions of the engine, as tables."""

from __future__ import annotations

import pytest

from pipeline.states import (
    EXECUTION_TRANSITIONS,
    OPEN_EXECUTIONS,
    OPEN_TASKS,
    TASK_TRANSITIONS,
    TERMINAL_EXECUTIONS,
    TERMINAL_TASKS,
    ExecutionStatus,
    TaskStatus,
)

E, T = ExecutionStatus, TaskStatus


@pytest.mark.parametrize(("status", "table"), [(E, EXECUTION_TRANSITIONS), (T, TASK_TRANSITIONS)])
def test_table_is_closed(status: type[E | T], table: dict[E | T, frozenset[E | T]]) -> None:
    assert set(table) == set(status)
    assert all(targets <= set(status) for targets in table.values())
    assert all(source not in targets for source, targets in table.items())


@pytest.mark.parametrize(
    ("table", "open_", "terminal"),
    [(EXECUTION_TRANSITIONS, OPEN_EXECUTIONS, TERMINAL_EXECUTIONS), (TASK_TRANSITIONS, OPEN_TASKS, TERMINAL_TASKS)],
)
def test_open_and_terminal_states_part_the_table_and_every_open_state_can_end(
    table: dict[E | T, frozenset[E | T]], open_: frozenset[E | T], terminal: frozenset[E | T]
) -> None:
    assert open_ | terminal == set(table) and not open_ & terminal
    for status in open_:
        assert {"success", "cancelled"} <= {target.value for target in table[status] & terminal}
    for status in terminal:
        assert table[status] <= open_  # the way back is to be run again
    reached = {"pending"}
    while more := {t.value for s, targets in table.items() if s.value in reached for t in targets} - reached:
        reached |= more
    assert reached == {status.value for status in table}


def test_terminal_states_are_those_of_the_design() -> None:
    assert {s.value for s in TERMINAL_EXECUTIONS} == {"success", "failed", "cancelled"}
    assert {s.value for s in TERMINAL_TASKS} == {"success", "failed", "skipped", "cancelled"}


def test_what_failed_has_run() -> None:
    assert [s for s, targets in TASK_TRANSITIONS.items() if T.FAILED in targets] == [T.RUNNING]
    assert [s for s, targets in TASK_TRANSITIONS.items() if T.RETRY in targets] == [T.RUNNING]
