from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import TemplateError
from pipeline.templates import MAX_OUTPUT, references, render, survey, task_names

# the same examples in every run, and no clock: a slow machine is no failure
PROPERTY = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

SCOPE: dict[str, Any] = {
    "tasks": {
        "extract": {"rows": 3, "items": [1, 2, 3], "stats": {"mean": 1.5}},
        "load-data": {"rows": 4},
        "a.b": {"rows": 5},
    },
    "input": {"path": "x.csv", "big": 2**60, "huge": 2**62 + 1, "none": None, "yes": True, "deep": {"a": [{"b": 1}]}},
    "variables": {"day": "2013-01-01", "in": 1},
    "execution": {"id": "exec-1", "workflow_id": "w", "user_id": "ana", "task_id": "t"},
    "secrets": {"KEY": "hunter2"},
}


class Opaque:
    secret = "hunter2"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain", "plain"),
        ("a }} b", "a }} b"),
        ("{ {x} }", "{ {x} }"),
        ("{{ tasks.extract.rows }}", 3),
        ("{{tasks.extract.rows}}", 3),
        ('{{ tasks["load-data"].rows }}', 4),
        ("{{ tasks['load-data'].rows }}", 4),
        ("{{ tasks['a.b']['rows'] }}", 5),
        ("{{ tasks . extract . stats }}", {"mean": 1.5}),
        ("{{ tasks.extract.rows + 1 }}", 4),
        ("{{ input.none }}", None),
        ("{{ input.yes }}", True),
        ("{{ input.huge }}", 2**62 + 1),
        ("{{ input.deep.a[0].b }}", 1),
        ("{{ variables['in'] }}", 1),
        ("{{ [1, 2].map(x, x * 2) }}", [2, 4]),
        ("{{ tasks.extract.items.filter(i, i > 1).map(i, i * 2) }}", [4, 6]),
        ("{{ has(input.zz) ? 1 : 2 }}", 2),
        ('{{ {"a": {"b": 1}} }}', {"a": {"b": 1}}),
        ('{{ {"a": 1}}}', {"a": 1}),
        ("{{ '}}' }}", "}}"),
        ("{{ '{{' }}", "{{"),
        ("{{ '{{' }} x }}", "{{ x }}"),
        ("{{ '''it's''' }}", "it's"),
        (r"{{ r'\d' }}", r"\d"),
        ("{{ 'a\\'b' }}", "a'b"),
        ('{{ timestamp("2013-01-01T00:00:00Z") + duration("24h") }}', "2013-01-02T00:00:00Z"),
        ("day={{ variables.day }}/{{ input.path }}", "day=2013-01-01/x.csv"),
        (
            "{{ input.yes }}{{ input.none }}{{ tasks.extract.items }}{{ 1.5 }}{{ {'a': null} }}",
            'true[1, 2, 3]1.5{"a": null}',
        ),
        (" {{ tasks.extract.rows }}", " 3"),
    ],
)
def test_render_gives_the_value(text: str, value: object) -> None:
    found = render(text, SCOPE)
    assert found == value
    assert type(found) is type(value)


def test_render_goes_into_values_and_items_and_leaves_keys_and_other_values_alone() -> None:
    value = {"{{ 1 }}": ["{{ 1 }}", {"x": "{{ 2 }}"}, 3, None], "y": True}
    assert render(value, {}) == {"{{ 1 }}": [1, {"x": 2}, 3, None], "y": True}


def test_rendered_text_is_not_rendered_again() -> None:
    assert (
        render("{{ input.x }}", {"input": {"x": "{{ secrets.KEY }}"}, "secrets": SCOPE["secrets"]})
        == "{{ secrets.KEY }}"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ input.pth }}", "input has no 'pth'; it has path, big"),
        ("{{ tasks.nope.rows }}", "tasks has no 'nope'"),
        ("{{ input.path.x }}", "input.path is text, it has no 'x'"),
        ("{{ item }}", "the scope has no 'item'"),
        ("{{ tasks.nope.rows + 1 }}", "there is no 'nope'"),
        ("{{ input.path + 1 }}", "Unsupported operation"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 + }}", "syntax: mismatched input end"),
        ("{{ }}", "empty"),
        ("{{ x", "{{ is not closed by }}"),
        ("{{ 'x }}", "syntax: token recognition error"),
        ("{{ 1 // 2 }}", "comments are not possible"),
        ("{{ nope(1) }}", "there is no function 'nope'"),
        ("{{ 'a'.__class__ }}", "No such overload"),
        ("{{ input.__class__ }}", "input has no '__class__'"),
        ("{{ b'x' }}", "gives bytes that is not JSON"),
        ("{{ {1: 2} }}", "a key that is not text"),
        ("{{ 1.0 / 0.0 }}", "not JSON"),
        ("{{ 'a\\u0000' }}", "a NUL character"),
        ("{{ '" + "x" * 5000 + "' }}", "longer than 4096 characters"),
        ("{{ " + "x." * 5000, "longer than 4096 characters"),
        ("{{ " + "(" * 1000 + "1" + ")" * 1000 + " }}", "syntax"),
        ("{{ [1].map(a, [1].map(b, [1].map(c, 1))) }}", "inside each other"),
        ("{{ [1]" + ".map(a, 1)" * 5 + " }}", "more than 4 macros"),
        ("\ud800{{ '\ud800' }}", "syntax"),
    ],
)
def test_render_that_fails_names_expression_and_cause(text: str, words: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render({"a": [text]}, SCOPE)
    assert str(caught.value).startswith("a[0]: template {{")
    assert words in str(caught.value)


def test_failure_that_reads_a_secret_does_not_show_it() -> None:
    for text in (
        "{{ duration(secrets.KEY) }}",
        "{{ secrets.KEY + 1 }}",
        "{{ secrets.KEY.x }}",
        "{{ int(secrets.KEY) }}",
    ):
        with pytest.raises(TemplateError) as caught:
            render(text, SCOPE)
        assert "hunter2" not in str(caught.value)


def test_python_object_in_the_scope_cannot_be_reached() -> None:
    for text in ("{{ input.x }}", "{{ input.x.secret }}", "{{ [input.x][0].secret }}", "{{ input.x.__class__ }}"):
        with pytest.raises(TemplateError):
            render(text, {"input": {"x": Opaque()}})


def test_output_above_the_limit_is_refused_in_one_and_in_sum() -> None:
    scope = {"input": {"x": "y" * (MAX_OUTPUT // 4)}}
    assert render(["{{ input.x }}"] * 3, scope)
    for value in (["{{ input.x }}"] * 5, "{{ input.x }}" * 5, "{{ input.x + input.x + input.x + input.x + input.x }}"):
        with pytest.raises(TemplateError, match="hand on an artifact"):
            render(value, scope)


def test_nesting_without_end_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(TemplateError, match="nested deeper"):
        render(value, {})


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("{{ tasks.extract.rows }}", [("tasks", "extract")]),
        ("{{ tasks['x'].rows + tasks[\"load-data\"].rows }}", [("tasks", "x"), ("tasks", "load-data")]),
        (r"{{ tasks['\x61'] }}", [("tasks", "a")]),
        ("{{ tasks[input.x].rows }}", [("tasks", None), ("input", "x")]),
        ("{{ tasks.map(t, t) }}", [("tasks", None)]),
        ("{{ size(tasks) }}", [("tasks", None)]),
        ("{{ (tasks).a }}", [("tasks", None)]),
        ("{{ tasks.size() }}", [("tasks", None)]),
        ("{{ 'tasks.a' + \"tasks.b\" + '''tasks.c''' }}", []),
        ("{{ input.tasks.a }}", [("input", "tasks")]),
        ("{{ [1].map(x, x + input.y) }}", [("input", "y")]),
        ("{{ [1].map(x, x) + [x] }}", [("x", None)]),
        ("{{ [1].map(tasks, tasks) }}", []),
        ("{{ tasks.a.items.all(x, x > variables.v) }}", [("tasks", "a"), ("variables", "v")]),
        ("{{ tusks.a }}", [("tusks", "a")]),
        ("{{ .tasks.a }}", [(".tasks", None)]),
        ("{{ type(input.x) == int }}", [("input", "x")]),
        ("{{ input.a }} and {{ input.b }}", [("input", "a"), ("input", "b")]),
        ("{{ secrets.KEY }}", [("secrets", "KEY")]),
        ("{{ {'tasks': 1} }}", []),
    ],
)
def test_references_are_exactly_what_is_read(text: str, read: list[tuple[str, str | None]]) -> None:
    assert sorted((r.root, r.name or "") for r in references({"p": [text]})) == sorted((a, b or "") for a, b in read)


def test_reference_knows_its_place_and_whether_it_is_the_whole_expression() -> None:
    first, second = references({"a": {"b": ["x", "{{ input.x }}"]}, "c": "{{ has(input.y) }}"})
    assert (first.path, first.expression.strip(), first.plain) == ("a.b[1]", "input.x", True)
    assert (second.path, second.plain) == ("c", False)


def test_task_names_are_the_tasks_to_fetch() -> None:
    assert task_names({"a": "{{ tasks.x.r }}-{{ tasks['y-z'] }}", "b": ["{{ input.q }}"]}) == {"x", "y-z"}


def test_references_of_a_template_that_cannot_be_compiled_raise_with_the_place() -> None:
    with pytest.raises(TemplateError, match=r"a\[1\]: template {{ 1 \+ }}: syntax"):
        references({"a": ["x", "{{ 1 + }}"]})


def test_survey_finds_every_fault_and_every_reference() -> None:
    found, faults = survey({"a": "{{ 1 + }}", "b": "{{ input.x }}", "c": "{{"})
    assert [r.name for r in found] == ["x"]
    assert [f.at for f in faults] == [("a",), ("c",)]


# fmt: off
FRAGMENTS = st.sampled_from(['{{', '}}', 'tasks', '.extract', '.rows', '["load-data"]', 'input',
    '.x', '+', '1', "'", '"', '{', '}', '(', ')', '[', ']', '.map(x,', 'x', ',', ':', '?', "'''", '\\', '//', 'size(', 'timestamp(', '-', '!', 'in', "r'", "b'", 'é', '0x', '.', '{{tasks.', '}}'])
# fmt: on


@PROPERTY
@given(
    text=st.lists(FRAGMENTS, max_size=14).map("".join)
    | st.lists(FRAGMENTS, max_size=14).map(" ".join)
    | st.text(max_size=40).map(lambda t: f"a{{{{{t}}}}}")
)
def test_render_of_any_text_gives_json_or_a_template_error(text: str) -> None:
    message = "template {{"
    try:
        json.dumps(render(text, SCOPE), allow_nan=False)
    except TemplateError as exc:
        message = str(exc)
    assert message.startswith("template {{")
    with contextlib.suppress(TemplateError):
        task_names(text)


@PROPERTY
@given(text=st.text().filter(lambda t: "{{" not in t))
def test_text_without_opening_braces_stays_as_it_is(text: str) -> None:
    assert render(text, {}) == text
