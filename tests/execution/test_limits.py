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


def processes(site: Site) -> set[int]:
    """The processes of the pool, and the worker's own."""
    found = set()
    with site.engine.installation.store.link.connection.cursor() as cursor:
        for (pid,) in cursor.execute("SELECT pid FROM pipeline.workers WHERE expires_at > now()"):
            found |= {pid, psutil.Process(pid).ppid()}
    return found


@pytest.mark.timeout(60 + TASKS / 5)
def test_memory_of_a_worker_stays_flat_over_many_tasks(prefork_site: Site) -> None:
    each = [task(f"t{n}", "debug.echo", params={"n": n, "text": "x" * 200}) for n in range(500)]
    flow = workflow(*each, task("end", after=tuple(t["id"] for t in each[:20])))
    seen: dict[int, list[float]] = {}
    for _ in range(TASKS // 500):
        started = prefork_site.engine.execute_workflow(flow, {"some": ["input"] * 20})
        assert prefork_site.engine.wait(started, 120).status is ExecutionStatus.SUCCESS
        for pid in processes(prefork_site):
            seen.setdefault(pid, []).append(psutil.Process(pid).memory_info().rss / _MIB)
    assert len(seen) >= 3
    print("MiB after each tenth:", {pid: [round(s, 1) for s in sizes[:: max(1, len(sizes) // 10)]] for pid, sizes in seen.items()})
    assert all(sizes[-1] - sizes[0] < 8 for sizes in seen.values())
