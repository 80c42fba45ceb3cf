from __future__ import annotations

import pytest

from pipeline.builder import WorkflowBuilder
from pipeline.definition import RetryPolicy
from pipeline.errors import DefinitionError
from pipeline.templates import render


def test_built_definition_is_what_was_said() -> None:
    flow = WorkflowBuilder("nyc", version="2", variables={"day": "2013-01-01"}, enable_parallel=False)
    read = flow.task("read", "files.read", params={"path": "{{ variables.day }}"})
    clean = flow.task(
        "clean",
        "flights.clean",
        after=[read],
        params={"rows": read["rows"]},
        timeout=5,
        retry_policy={"max_retries": 0},
    )
    flow.task("report", "report.write", after=clean, name="Report", retry_policy=RetryPolicy(backoff="fixed"))
    definition = flow.build()
    assert (definition.id, definition.version, definition.enable_parallel) == ("nyc", "2", False)
    assert {t.id: t.dependencies for t in definition.tasks} == {"read": (), "clean": ("read",), "report": ("clean",)}
    assert definition.by_id["clean"].params == {"rows": "{{ tasks.read.rows }}"}
    assert (definition.by_id["clean"].timeout, definition.by_id["clean"].retry_policy.max_retries) == (5, 0)
    assert definition.by_id["report"].name == "Report"
    assert definition.by_id["report"].retry_policy.backoff == "fixed"


@pytest.mark.parametrize("id_", ["read", "load-data", "a.b", "in", "9"])
@pytest.mark.parametrize("key", ["rows", "a-b", 'q"\\', "in"])
def test_reference_reads_the_result_whatever_the_names(id_: str, key: str) -> None:
    ref = WorkflowBuilder("w").task(id_, "debug.noop")
    scope = {"tasks": {id_: {key: 7, "deep": {key: 8}}}}
    assert (render(ref[key], scope), render(ref["deep", key], scope)) == (7, 8)
    assert render(ref.result, scope) == scope["tasks"][id_]


def test_build_with_problems_raises_all_of_them() -> None:
    flow = WorkflowBuilder("nyc", versoin="1")
    flow.task("a", "debug.noop", after="b")
    flow.task("a", "debug.noop")
    with pytest.raises(DefinitionError) as caught:
        flow.build()
    text = str(caught.value)
    assert "did you mean 'version'?" in text
    assert "unknown task 'b'" in text
    assert "id 'a' is taken" in text


def test_task_with_dependencies_is_refused_for_they_are_called_after() -> None:
    flow = WorkflowBuilder("w")
    with pytest.raises(TypeError, match="write after="):
        flow.task("b", "debug.noop", dependencies=["a"])
