"""The simulation of fleets: nothing is lost in it, nothing is faster than it can be. No time is taken here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.costs import Costs, TaskCost, per_task
from benchmarks.fleet import Fleet, Load, Outcome, bounds, simulate
from benchmarks.simulation import DOCUMENT, cost_table, fleet_table, replace_between

MACHINE = {"date": "today", "machine": {"cores": 2, "processor": "one", "memory_gib": 8, "system": "some", "load": [0.5, 1, 1]}}
COSTS = Costs(
    single=TaskCost(pool=0.001, main=0.0004, database=0.0006, broker=0.00005, join=0.0002, tasks_per_message=1.0),
    shared=TaskCost(pool=0.0006, main=0.00004, database=0.0004, broker=0.000005, join=0.0003, tasks_per_message=20.0),
    heartbeat=0.0002, look=0.0002, wait=0.0001, create=0.00004, submit=0.00002,
    idle={"main": 0.001}, memory={"pool": 30.0}, about=MACHINE,
)  # fmt: skip

seconds = st.floats(1e-6, 0.01)
task_costs = st.builds(
    TaskCost, pool=seconds, main=seconds, database=seconds, broker=seconds, join=seconds, tasks_per_message=st.just(1.0)
)
costs = st.builds(
    lambda single, shared, together: replace(COSTS, single=single, shared=replace(shared, tasks_per_message=together)),
    task_costs, task_costs, st.floats(1, 30),
)  # fmt: skip
fleets = st.builds(
    Fleet, processes=st.integers(1, 20), per_worker=st.integers(1, 8), cores=st.integers(1, 4),
    database_cores=st.integers(1, 4), round_trip=seconds, together=st.booleans(),
)  # fmt: skip
loads = st.builds(
    Load, tasks=st.integers(1, 80), duration=st.sampled_from([0.0, 0.01, 0.1, 1.0]), executions=st.integers(1, 5)
)


def most_at_once(outcome: Outcome) -> int:
    """How many processes ran at the same time."""
    changes = sorted(
        change for span in outcome.spans if span.ended > span.began for change in ((span.began, 1), (span.ended, -1))
    )
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


@settings(deadline=None)
@given(costs, fleets, loads)
def test_every_task_runs_once(costs: Costs, fleet: Fleet, load: Load) -> None:
    outcome = simulate(costs, fleet, load)
    assert sorted(span.task for span in outcome.spans) == list(range(load.tasks))


@settings(deadline=None)
@given(costs, fleets, loads)
def test_no_process_runs_two_tasks_at_once_and_no_more_run_than_there_are_processes(
    costs: Costs, fleet: Fleet, load: Load
) -> None:
    outcome = simulate(costs, fleet, load)
    assert most_at_once(outcome) <= fleet.processes
    of_process: dict[int, float] = {}
    for span in sorted(outcome.spans, key=lambda span: (span.began, span.ended)):
        assert 0 <= span.process < fleet.processes
        assert span.began >= of_process.get(span.process, 0.0)
        of_process[span.process] = span.ended


@settings(deadline=None)
@given(costs, fleets, loads)
def test_no_load_ends_before_its_narrowest_resource_could_have_served_it(costs: Costs, fleet: Fleet, load: Load) -> None:
    outcome = simulate(costs, fleet, load)
    assert outcome.seconds >= max(bounds(costs, fleet, load).values()) * (1 - 1e-9)
    assert outcome.seconds == max(span.ended for span in outcome.spans)


@settings(deadline=None)
@given(costs, fleets, loads)
def test_no_load_takes_longer_than_one_thing_after_the_other(costs: Costs, fleet: Fleet, load: Load) -> None:
    alone = Fleet(processes=1, per_worker=1, cores=1, database_cores=1, round_trip=fleet.round_trip)
    limits = bounds(replace(costs, heartbeat=0.0, look=0.0), alone, load)
    quiet = simulate(replace(costs, heartbeat=0.0, look=0.0), alone, load)
    assert quiet.seconds <= (limits["processes"] + limits["worker main"] + limits["broker"]) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("fleet", "load", "narrow"),
    [
        (Fleet(processes=4), Load(tasks=400, duration=1.0, executions=10), "processes"),
        (Fleet(processes=8, cores=1), Load(tasks=2000, executions=10), "cores of workers"),
        (Fleet(processes=200, database_cores=1), Load(tasks=4000, executions=100), "database"),
        (Fleet(processes=400, database_cores=64), Load(tasks=8000, executions=1), "a join"),
        (Fleet(processes=200, per_worker=200, cores=200), Load(tasks=4000, duration=0.03, executions=100), "worker main"),
        (Fleet(processes=8, cores=2, together=True), Load(tasks=2000, executions=10), "cores"),
    ],
)
def test_what_saturates_is_named(fleet: Fleet, load: Load, narrow: str) -> None:
    assert simulate(COSTS, fleet, load).narrow == narrow


def test_tasks_that_wait_are_run_by_as_many_processes_as_there_are() -> None:
    few, many = (simulate(COSTS, Fleet(processes=n), Load(tasks=2000, duration=10.0, executions=10)) for n in (10, 100))
    assert many.rate / few.rate == pytest.approx(10, rel=0.02)
    assert few.rate == pytest.approx(1.0, rel=0.02)


def test_fleet_that_keeps_the_database_busy_with_heartbeats_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="heartbeats and recovery"):
        simulate(COSTS, Fleet(processes=100_000, database_cores=4), Load(tasks=1))


def test_cost_of_a_task_is_what_was_used_between_two_readings() -> None:
    assert per_task({"pool": 1.0, "broker": 2.0}, {"pool": 3.0, "broker": 2.0}, 100) == {"pool": 0.02, "broker": 0.0}


def test_tables_show_every_fleet_and_every_kind_of_process() -> None:
    lines = fleet_table(COSTS, [Fleet(processes=1), Fleet(processes=16)], 10).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1", "| 16"]
    shown = cost_table(COSTS)
    assert "| worker's main process | 400 | 40 | 2,500 to 25,000 |" in shown
    assert shown.endswith("today, 2 cores of one, 8 GiB, some, load 0.5 from other programs as well.")


def test_costs_are_the_same_after_they_were_written_and_read() -> None:
    assert Costs.from_json(json.loads(json.dumps(asdict(COSTS)))) == COSTS


def test_page_shows_the_costs_that_were_measured_last() -> None:
    shown = cost_table(Costs.read())
    assert shown in DOCUMENT.read_text("utf-8"), "python -m benchmarks.simulation --write writes them anew"


def test_tables_replace_what_stands_between_their_markers_and_nothing_else() -> None:
    text = "a\n<!-- x -->\nold\n<!-- /x -->\n<!-- y -->\nkept\n<!-- /y -->\n"
    once = replace_between(text, "x", "new\n")
    assert once == "a\n<!-- x -->\n\nnew\n\n<!-- /x -->\n<!-- y -->\nkept\n<!-- /y -->\n"
    assert replace_between(once, "x", "new") == once
    with pytest.raises(ValueError, match="there is no"):
        replace_between(text, "z", "")
