"""The leases of a worker's processes, kept from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psycopg

from pipeline.pulse import Pulse
from pipeline.result_store.store import ResultStore
from pipeline.states import ExecutionStatus

#: whether the process beside the worker keeps leases already
PULSE = """SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
                            AND query LIKE '%pid = ANY%')"""


def test_a_handler_that_keeps_pythons_lock_for_longer_than_the_lease_runs_once(sites: Callable[..., Any]) -> None:
    site = sites(lease=4.0)
    definition = {"id": "held", "tasks": [{"id": "a", "handler": "site.hold_gil", "params": {"seconds": 12}}]}
    with site.worker(concurrency=1), psycopg.connect(site.settings.database_url, autocommit=True) as connection:
        site.until(lambda: connection.execute(PULSE).fetchone() == (True,))
        execution = site.run(definition)

    assert execution.status is ExecutionStatus.SUCCESS
    assert (execution.tasks["a"].attempt, execution.tasks["a"].losses) == (1, 0)


def test_renewal_covers_processes_that_run_and_neither_stopped_nor_ended_ones_nor_those_of_others(
    store: ResultStore,
) -> None:
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(3)]
    running, stopped, ended = children
    try:
        for child in children:
            store.start_worker(name="us", pid=child.pid, lease=60)
        store.start_worker(name="them", pid=running.pid, lease=60)
        store.end_worker(store.start_worker(name="us", pid=running.pid, lease=60))
        ended.kill()
        ended.wait()
        stopped.send_signal(signal.SIGSTOP)
        os.waitpid(stopped.pid, os.WUNTRACED)

        assert Pulse(store=store, name="us", pid=os.getpid(), lease=60).run_once() == 1
        assert Pulse(store=store, name="us", pid=ended.pid, lease=60).run_once() == 0
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
            child.stdin.close()
