from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.catalogue import HandlerSpec, Parameter
from pipeline.definition import TaskDefinition, WorkflowDefinition
from pipeline.document import of_data, parse_document
from pipeline.errors import DefinitionError, InputError
from pipeline.validation import Limits, check, json_schema, validate, validate_input

# the same examples in every run, and no clock: a slow machine is no failure
PROPERTY = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

CATALOGUE = {
    spec.name: spec
    for spec in (
        HandlerSpec(name="debug.noop", open_ended=True),
        HandlerSpec(
            name="files.read",
            parameters=(
                Parameter(name="path", required=True, schema={"type": "string"}),
                Parameter(name="limit", required=False, schema={"anyOf": [{"type": "integer"}, {"type": "null"}]}),
            ),
        ),
        HandlerSpec(name="flights.clean", parameters=(Parameter(name="read_it", required=True),)),
    )
}
GOOD = {
    "id": "nyc",
    "version": 1,
    "variables": {"day": "2013-01-01", "my-var": 1},
    "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    "tasks": [
        {"id": "read-it", "handler": "files.read", "params": {"path": "{{ input.path }}", "limit": None}},
        {"id": "clean", "handler": "flights.clean", "dependencies": ["read-it"], "retry_policy": {"max_retries": 0}},
        {
            "id": "report",
            "handler": "debug.noop",
            "dependencies": ["clean"],
            "params": {"rows": '{{ tasks["read-it"].rows }} of {{ variables["my-var"] }}', "x": "{{ secrets.KEY }}"},
        },
    ],
}


def task(id_: str = "t", handler: str = "debug.noop", **fields: Any) -> dict[str, Any]:
    return {"id": id_, "handler": handler, **fields}


def problems(*tasks: Any, **fields: Any) -> list[str]:
    definition, found = check(of_data({"id": "w", "tasks": list(tasks), **fields}), CATALOGUE)
    assert (definition is None) == bool(found)
    return [str(problem).removeprefix("<dict>: ") for problem in found]


def test_good_definition_passes_as_mapping_model_and_text() -> None:
    from_dict = validate(GOOD, CATALOGUE)
    assert validate(from_dict, CATALOGUE) is from_dict
    assert validate(parse_document(json.dumps(GOOD), "w.yaml", "yaml"), CATALOGUE) == from_dict
    assert validate(parse_document(json.dumps(GOOD), "w.json", "json"), CATALOGUE).digest == from_dict.digest
    assert WorkflowDefinition.model_validate(GOOD) == from_dict


BAD = """\
id: nyc
version: 1.10
variabels: {a: 1}
enable_parallel: maybe
tasks:
  - id: read
    handler: files.raed
    timeout: -1
    retry_policy:
      max_retires: 3
      backoff: expnential
  - id: clean
    handler: files.read
    dependencies: [raed]
    params:
      path: 3
      limt: 1
      limit: "{{ 1 + }}"
  - id: clean
    handler: debug.noop
    depends_on: [read]
  - just text
  - id: 5
    handler: debug.noop
    dependencies: read
    params:
  - id: last
"""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (2, 'version should be a valid string, found 1.1; quote it: version: "1.1"'),
        (3, "unknown field 'variabels'; did you mean 'variables'?"),
        (4, "enable_parallel should be a valid boolean"),
        (7, "unknown handler 'files.raed'; did you mean 'files.read'?"),
        (8, "timeout should be greater than 0, found -1"),
        (10, "unknown field 'max_retires'; did you mean 'max_retries'?"),
        (11, "did you mean 'exponential'?"),
        (14, "unknown task 'raed'; did you mean 'read'?"),
        (16, """params.path: does not fit handler 'files.read': 3 is not of type "string\""""),
        (17, "handler 'files.read' has no parameter 'limt'; did you mean 'limit'?"),
        (18, "params.limit: template {{ 1 + }}: syntax"),
        (19, "id 'clean' is taken by tasks[1] (line 12)"),
        (21, "unknown field 'depends_on'; did you mean 'dependencies'?"),
        (22, "a task must be a mapping"),
        (23, 'id should be a valid string, found 5; quote it: id: "5"'),
        (25, "dependencies must be a list, found 'read'; write [read]"),
        (26, "params must be a mapping, found nothing"),
        (27, "task 'last' has no handler"),
    ],
)
def test_every_problem_is_reported_with_its_line(line: int, words: str) -> None:
    _, found = check(parse_document(BAD, "nyc.yaml", "yaml"), CATALOGUE)
    assert any(words in str(problem) for problem in found if problem.line == line)
    assert all(problem.source == "nyc.yaml" for problem in found)


def test_problem_of_the_header_hides_none_that_input_schema_shows() -> None:
    definition = {
        "id": "w", "unknown": 1, "input_schema": {"properties": {"path": {}}},
        "tasks": [task("a", handler="files.read"), task("b", params={"x": "{{ input.paht }}"})],
    }  # fmt: skip

    _, found = check(of_data(definition), CATALOGUE)

    text = "\n".join(map(str, found))
    assert "unknown field" in text
    assert "input_schema has no property 'paht'" in text


def test_problems_are_no_more_than_what_is_wrong() -> None:
    _, found = check(parse_document(BAD, "nyc.yaml", "yaml"), CATALOGUE)
    assert [problem.line for problem in found] == [2, 3, 4, 7, 8, 10, 11, 14, 16, 17, 18, 19, 21, 22, 23, 25, 26, 27]


@pytest.mark.parametrize(
    ("tasks", "fields", "words"),
    [
        ([], {}, "tasks must be a list of at least one task"),
        ([task(dependencies=["t"])], {}, "task 't' depends on itself"),
        ([task("a"), task(dependencies=["a", "a"])], {}, "dependency 'a' stands twice"),
        ([task("__end")], {}, "id '__end' is reserved"),
        ([task("a b")], {}, "id 'a b' is not a name that can be used"),
        ([{"id": "t"}], {}, "task 't' has no handler; name one"),
        ([{"handler": "debug.noop"}], {}, "id is missing"),
        *(
            ([{"id": "t", "type": kind}], {}, f"tasks of type '{kind}' are not yet run")
            for kind in ("workflow", "delay")
        ),
        *(
            ([{"id": "t", "type": kind}], {}, f"tasks of type '{kind}' are not yet run")
            for kind in ("signal", "approval")
        ),
        ([task(type="taks")], {}, "did you mean 'task'?"),
        ([task(when="true")], {}, "when is not yet run"),
        ([task(foreach=[1])], {}, "foreach is not yet run"),
        ([task()], {"triggers": [{"cron": "* * * * *"}]}, "triggers are not yet run"),
        ([task()], {"variables": {"a": "{{ input.x }}"}}, "variables are constants"),
        ([task()], {"version": 1.5}, 'quote it: version: "1.5"'),
        ([task(retry_policy={"max_retries": -1})], {}, "max_retries should be greater than or equal to 0"),
        ([task(retry_policy={"max_retries": True})], {}, "max_retries should be a valid integer"),
        ([task(timeout="5")], {}, "timeout should be a valid number"),
        ([task(timeout=10**9)], {}, "timeout should be less than or equal to 604800"),
        ([task(params={"a": {1, 2}})], {}, "tasks[0].params.a: a set is not JSON"),
        ([task(params={"a": [float("nan")]})], {}, "tasks[0].params.a[0]: nan is no number"),
        ([task(params={"a": b"x"})], {}, "a bytes is not JSON"),
        ([task(params={"a": {1: 2}})], {}, "tasks[0].params.a: key 1 is not text"),
        ([task(params={"a": 2**64})], {}, "more than 64 bits"),
        ([task(params={"a": "\0"})], {}, "NUL"),
        ([task(params={"\ud800": 1})], {}, "half a surrogate pair"),
        ([{**task(), 5: 1}], {}, "key 5 is not text"),
        ([task()], {"variables": {"a": {1}}}, "variables.a: a set is not JSON"),
        ([task(params={"a": "x" * 300_000})], {}, "above the limit of 262144"),
        ([task(params={"a": json.loads("[" * 40 + "]" * 40)})], {}, "nested deeper than 32 levels"),
        ([task(handler="files.read", params={"path": "x", "limit": "y"})], {}, "is not of type"),
        ([task(params={"a": "{{ tusks.a }}"})], {}, "unknown name 'tusks'; did you mean 'tasks'?"),
        ([task(params={"a": "{{ variables.dya }}"})], {"variables": {"day": 1}}, "did you mean 'day'?"),
        (
            [task(params={"a": "{{ tasks.extrct.x }}"}), task("extract")],
            {},
            "unknown task 'extrct'; did you mean 'extract'?",
        ),
        ([task(params={"a": "{{ tasks.t.x }}"})], {}, "task 't' reads its own result"),
        ([task(params={"a": "{{ tasks.b.x }}"}), task("b")], {}, "add b to dependencies"),
        ([task("b", dependencies=["t"]), task(params={"a": "{{ tasks.b.x }}"})], {}, "add b to dependencies"),
        ([task(params={"a": "{{ tasks[input.x].y }}"})], {}, "tasks must be read one by one"),
        ([task(params={"a": "{{ secrets }}"})], {}, "secrets must be read one by one"),
        ([task(params={"a": "{{ item }}"})], {}, "item exists only in a task with foreach"),
        ([task(params={"a": "{{ execution.di }}"})], {}, "execution has no 'di'"),
        ([task(params={"a": "{{ tasks.b-c.x }}"}, dependencies=["b-c"]), task("b-c")], {}, 'write tasks["b-c"]'),
        ([task(params={"a": "{{ tasks.b.c.x }}"}, dependencies=["b.c"]), task("b.c")], {}, 'write tasks["b.c"]'),
        ([task(params={"a": "{{ variables.my-var }}"})], {"variables": {"my-var": 1}}, 'write variables["my-var"]'),
        (
            [task(params={"a": "{{ input.pth }}"})],
            {"input_schema": {"properties": {"path": {}}}},
            "did you mean 'path'?",
        ),
        ([task(handler="files.read")], {"input_schema": {"additionalProperties": False}}, "task 't' lacks 'path'"),
        ([task()], {"input_schema": {"type": "nope"}}, "input_schema.type: not a JSON Schema"),
        ([task()], {"input_schema": {"$ref": "http://schema.invalid/x"}}, "other documents are never fetched"),
        ([task()], {"input_schema": {"$ref": "file:///etc/passwd"}}, "other documents are never fetched"),
        ([task()], {"input_schema": {"pattern": "("}}, "not a JSON Schema"),
    ],
)
def test_problem_is_reported_once_and_with_a_way_out(tasks: list[Any], fields: dict[str, Any], words: str) -> None:
    found = problems(*tasks, **fields)
    assert len(found) == 1, found
    assert words in found[0]


@pytest.mark.parametrize(
    ("tasks", "fields"),
    [
        ([task(handler="files.read")], {}),
        ([task(handler="files.read")], {"input_schema": {"properties": {"path": {}}}}),
        ([task(handler="files.read")], {"input_schema": {"additionalProperties": True, "properties": {}}}),
        ([task(handler="files.read")], {"input_schema": {"allOf": [{"properties": {"path": {}}}]}}),
        ([task("path"), task(handler="files.read", dependencies=["path"])], {"input_schema": {"properties": {}}}),
        ([task(handler="files.read", params={"path": "x", "limit": "{{ input.n }}"})], {}),
        ([task(params={"a": ("x", 1)})], {}),
        ([task("a"), task("b", dependencies=["a"]), task(dependencies=["b"], params={"x": "{{ tasks.a.r }}"})], {}),
        ([task(params={"a": "{{ execution.id }}{{ [1].map(x, x) }}{{ input.zz }}"})], {}),
    ],
)
def test_definition_without_problem_passes(tasks: list[Any], fields: dict[str, Any]) -> None:
    assert problems(*tasks, **fields) == []


def test_what_follows_from_a_misspelt_dependency_is_not_told() -> None:
    found = problems(
        task("extract"),
        task("b", dependencies=["extrct"], params={"x": "{{ tasks.extract.rows }}"}),
        task("c", dependencies=["b"], params={"x": "{{ tasks.extract.rows }}"}),
    )
    assert len(found) == 1
    assert "did you mean 'extract'?" in found[0]


def test_handlers_are_not_checked_without_a_catalogue() -> None:
    assert check(of_data({"id": "w", "tasks": [task(handler="no.such", params={"x": 1})]}), None)[1] == ()


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_definition_that_is_no_mapping_is_refused(data: Any) -> None:
    assert "a definition is a mapping" in str(check(of_data(data), CATALOGUE)[1][0])


def test_more_tasks_than_the_limit_are_refused() -> None:
    with pytest.raises(DefinitionError, match="3 tasks, above the limit of 2"):
        validate({"id": "w", "tasks": [task("a"), task("b"), task("c")]}, None, Limits(tasks=2))


def test_model_with_values_that_are_not_json_is_refused_with_their_place() -> None:
    definition = WorkflowDefinition(id="w", tasks=(TaskDefinition(id="t", handler="debug.noop", params={"a": {1}}),))
    with pytest.raises(DefinitionError, match=r"<definition>: tasks\[0\]\.params\.a: a set is not JSON"):
        validate(definition, CATALOGUE)


def test_chain_of_many_tasks_and_a_cycle_of_many_tasks_need_no_recursion() -> None:
    chain = [task(f"t{i}", dependencies=[f"t{i - 1}"] if i else []) for i in range(5000)]
    chain[-1]["params"] = {"x": "{{ tasks.t0.r }}"}
    assert problems(*chain) == []
    chain[0]["dependencies"] = ["t4999"]
    (found,) = problems(*chain)
    assert "a cycle: t0 -> t1 -> t2" in found
    assert "4981 more" in found


GRAPHS = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*(st.sets(st.integers(0, max(0, i - 1)), max_size=3 if i else 0) for i in range(n)))
)


def graph_tasks(graph: tuple[set[int], ...], order: list[int]) -> list[dict[str, Any]]:
    ancestors: list[set[int]] = []
    for needed in graph:
        ancestors.append(needed.union(*(ancestors[other] for other in needed)))
    made = [
        task(
            f"t{i}",
            dependencies=[f"t{d}" for d in sorted(needed)],
            params={f"p{a}": f"{{{{ tasks.t{a}.rows }}}}" for a in ancestors[i]},
        )
        for i, needed in enumerate(graph)
    ]
    return [made[i] for i in order]


@PROPERTY
@given(graph=GRAPHS, data=st.data())
def test_any_acyclic_graph_that_reads_its_ancestors_passes_in_any_order(graph: tuple[set[int], ...], data: Any) -> None:
    assert problems(*graph_tasks(graph, data.draw(st.permutations(range(len(graph)))))) == []


@PROPERTY
@given(graph=GRAPHS, data=st.data())
def test_reading_a_task_that_is_no_ancestor_is_always_found(graph: tuple[set[int], ...], data: Any) -> None:
    reader = data.draw(st.integers(0, len(graph) - 2))
    other = data.draw(st.integers(reader + 1, len(graph) - 1))
    tasks = graph_tasks(graph, list(range(len(graph))))
    tasks[reader]["params"]["late"] = f"{{{{ tasks.t{other}.rows }}}}"
    (found,) = problems(*tasks)
    assert f"add t{other} to dependencies" in found


@PROPERTY
@given(graph=GRAPHS, data=st.data())
def test_a_back_edge_is_reported_as_a_cycle_that_is_one(graph: tuple[set[int], ...], data: Any) -> None:
    last = data.draw(st.integers(1, len(graph) - 1))
    first = data.draw(st.integers(0, last - 1))
    tasks = [{**t, "params": {}} for t in graph_tasks(graph, list(range(len(graph))))]
    tasks[last]["dependencies"] = sorted({*tasks[last]["dependencies"], f"t{first}"})
    tasks[first]["dependencies"].append(f"t{last}")
    found = problems(*tasks)
    needed = {t["id"]: t["dependencies"] for t in tasks}
    assert found
    for problem in found:
        names = problem.split("a cycle: ")[1].split(";")[0].split(" -> ")
        assert names[0] == names[-1]
        assert len(set(names)) == len(names) - 1 >= 2
        assert all(before in needed[after] for before, after in pairwise(names))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*TaskDefinition.model_fields, *WorkflowDefinition.model_fields, "zz"})
TASK_JUNK = st.dictionaries(st.sampled_from(FIELDS), JUNK | st.sampled_from(["t", "task", "debug.noop"]), max_size=5)


@PROPERTY
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=5), tasks=st.lists(TASK_JUNK | JUNK, max_size=4))
def test_any_junk_is_reported_and_never_raises(fields: dict[str, Any], tasks: list[Any]) -> None:
    definition, found = check(of_data({**fields, "tasks": tasks}), CATALOGUE)
    assert (definition is None) == bool(found)
    if definition is not None:
        assert WorkflowDefinition.from_json(definition.to_json()).digest == definition.digest


def input_problems(definition: dict[str, Any], input_data: Any, limits: Limits | None = None) -> list[str]:
    try:
        validate_input(validate(definition, CATALOGUE), input_data, CATALOGUE, limits or Limits())
    except InputError as exc:
        return [str(problem).removeprefix("<input>: ") for problem in exc.problems]
    return []


@pytest.mark.parametrize(
    ("input_data", "words"),
    [
        ({"path": "x"}, []),
        ({"path": "x", "more": 1}, []),
        ({}, ['"path" is a required property']),
        ({"path": 3}, ['path: 3 is not of type "string"']),
        ([], ["the input must be a JSON object, found list"]),
        (None, ["the input must be a JSON object, found NoneType"]),
        ({"path": float("nan")}, ["path: nan is no number that JSON has"]),
        ({"path": {1}}, ["path: a set is not JSON"]),
        ({1: 2}, ["key 1 is not text"]),
        ({"path": "x" * 300_000}, ["above the limit of 262144"]),
    ],
)
def test_input_is_held_against_its_schema(input_data: Any, words: list[str]) -> None:
    found = input_problems(GOOD, input_data)
    assert len(found) == len(words), found
    assert all(word in problem for word, problem in zip(words, found, strict=True))


def test_input_without_what_tasks_surely_need_is_refused_with_their_names() -> None:
    definition = {
        "id": "w",
        "tasks": [
            task("a", "files.read"),
            task("b", "files.read"),
            task("c", params={"x": "{{ input.day }}", "y": "{{ has(input.opt) ? input.opt : 1 }}"}),
            task("d", "files.read", params={"path": "given"}),
        ],
    }
    found = input_problems(definition, {})
    assert [problem.split(";")[0] for problem in found] == [
        "path: path is missing: needed by a, b",
        "day: day is missing: needed by c",
    ]
    assert input_problems(definition, {"path": "x", "day": None}) == []


def test_json_schema_takes_what_check_takes_and_refuses_shapes_that_it_refuses() -> None:
    schema = json_schema()
    assert schema["title"]
    validator = jsonschema_rs.validator_for(schema, offline=True)
    assert validator.is_valid(GOOD)
    assert validator.is_valid({**GOOD, "version": "1.0"})
    for wrong in ({"versoin": "1"}, {"version": 1.5}, {"tasks": []}, {"tasks": [{"id": "a b"}]}, {"id": 5}):
        assert not validator.is_valid({**GOOD, **wrong})
    assert all("description" in field for field in schema["properties"].values())
