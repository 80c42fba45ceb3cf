"""Graphs of real workflows (WfFormat) run whole and in order.

The graphs lie beside the repository; where they do not, this is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.states import ExecutionStatus
from tests.conftest import Site, task, workflow

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "wfinstances"
MOST = 60


def graphs() -> dict[str, dict[str, list[str]]]:
    """Parents by task, of every graph that is small enough to run here."""
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        tasks = json.loads(path.read_text())["workflow"]["specification"]["tasks"]
        names = {t["id"]: f"t{number}" for number, t in enumerate(tasks)}
        if len(tasks) <= MOST:
            found[path.stem] = {names[t["id"]]: [names[p] for p in t["parents"]] for t in tasks}
    return found


def test_real_graphs_run_whole_and_each_task_after_its_parents(busy_site: Site) -> None:
    found = graphs()
    if not found:
        pytest.skip("no graphs of real workflows beside the repository")
    started = {
        name: busy_site.engine.execute_workflow(workflow(*(task(t, after=tuple(p)) for t, p in graph.items())))
        for name, graph in found.items()
    }
    for name, graph in found.items():
        done = busy_site.engine.wait(started[name], 100)
        assert done.status is ExecutionStatus.SUCCESS, name
        assert done.tasks.keys() == graph.keys()
        for child, parents in graph.items():
            assert done.tasks[child].attempt == 1
            for parent in parents:
                assert done.tasks[parent].finished_at <= done.tasks[child].started_at, (name, parent, child)
