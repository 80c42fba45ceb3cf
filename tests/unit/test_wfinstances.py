"""Graphs of real workflows (WfFormat) compile to exactly their edges and can be drawn.

The graphs lie beside the repository; where they do not, these tests are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from pipeline.compiler import compile_workflow
from pipeline.definition import TaskDefinition, WorkflowDefinition
from pipeline.drawing import draw

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "wfinstances"
FILES = sorted(FOLDER.glob("*.json"))

if not FILES:
    pytest.skip("no graphs of real workflows beside the repository", allow_module_level=True)


def edges_of(path: Path) -> tuple[list[str], set[tuple[str, str]]]:
    tasks = json.loads(path.read_text())["workflow"]["specification"]["tasks"]
    ids = {task["id"]: f"t{number}" for number, task in enumerate(tasks)}
    edges = {(ids[parent], ids[task["id"]]) for task in tasks for parent in task["parents"]}
    return list(ids.values()), edges | {(ids[task["id"]], ids[child]) for task in tasks for child in task["children"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_real_graph_compiles_to_its_edges_and_is_drawn(path: Path) -> None:
    ids, edges = edges_of(path)
    needs: dict[str, list[str]] = {t: [] for t in ids}
    for need, t in edges:
        needs[t].append(need)
    tasks = tuple(TaskDefinition(id=t, handler="debug.noop", dependencies=tuple(sorted(needs[t]))) for t in ids)
    definition = WorkflowDefinition(id="real", tasks=tasks)
    compiled = compile_workflow(definition)

    fans = [
        (sig.args[0], member.args[0])
        for sig in map(compiled.signature, ids)
        for member in compiled.fan_out(*sig.args).tasks
    ]
    joined = [t for t in ids if len(needs[t]) > 1]
    joins = {(sig.args[0], t) for t in joined for sig in compiled.join(t).tasks}
    assert set(fans) | joins == edges
    started = [sig.args[0] for sig in compiled.entry.tasks] + [t for _, t in fans] + joined
    assert sorted(started) == sorted(ids)
    assert {sig.args[0] for sig in compiled.end.tasks} == set(ids) - {need for need, _ in edges}

    picture = ET.fromstring(draw(compiled, definition, "svg"))
    boxes = [box for element in picture.iter() if (box := element.get("data-task"))]
    assert set(boxes) <= set(ids)
    assert len(boxes) == len(ids) if len(ids) <= 400 else 0 < len(boxes) <= 400
    assert json.loads(draw(compiled, definition, "json"))["order"] == list(compiled.order)
    assert draw(compiled, definition, "mermaid").count("\n") > len(ids)
