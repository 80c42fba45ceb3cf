"""What a worker uses stays bounded."""

from __future__ import annotations

import os

import psutil
import pytest

from pipeline.states import ExecutionStatus
from tests.conftest import Site, task, workflow

#: tasks to run; PIPELINE_TEST_TASKS=20000 looks further by hand
TASKS = int(os.environ.get("PIPELINE_TEST_TASKS", "2000"))
_MIB = 2**20


def memory(pids: set[int]) -> dict[int, int]:
    return {pid: psutil.Process(pid).memory_info().rss for pid in pids}


def processes(site: Site) -> set[int]:
    """The processes of the pool, and the worker's own."""
    found = set()
    with site.engine.installation.store.link.connection.cursor() as cursor:
        for (pid,) in cursor.execute("SELECT pid FROM pipeline.workers WHERE expires_at > now()"):
            found |= {pid, psutil.Process(pid).ppid()}
    return found


@pytest.mark.timeout(60 + TASKS / 10)
def test_memory_of_a_worker_stays_flat_over_many_tasks(prefork_site: Site) -> None:
    def run(count: int) -> None:
        each = [task(f"t{n}", "debug.echo", params={"n": n, "text": "x" * 200}) for n in range(500)]
        flow = workflow(*each, task("end", after=tuple(t["id"] for t in each[:20])))
        for _ in range(count // 500):
            started = prefork_site.engine.execute_workflow(flow, {"some": ["input"] * 20})
            assert prefork_site.engine.wait(started, 120).status is ExecutionStatus.SUCCESS

    run(500)
    pids = processes(prefork_site)
    assert len(pids) == 3
    before = memory(pids)
    run(TASKS - 500)
    after = memory(pids)
    print("MiB before and after:", {pid: (before[pid] / _MIB, after[pid] / _MIB) for pid in pids})
    assert all(after[pid] - before[pid] < 8 * _MIB for pid in pids)
