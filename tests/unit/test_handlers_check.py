"""check.expect: what passes is handed on, what does not is told, all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from handlers import check, sql
from handlers.check import Bounds
from pipeline import ArtifactStore, Context, Dataset, Fail
from pipeline.handler import collect

Attempt = Callable[..., Context]

PEOPLE = """
    SELECT * FROM (VALUES (1, 'ana', 30, DATE '2013-01-05', 'x'), (2, 'bo', 17, DATE '2013-02-05', 'y'),
                          (2, 'bo', NULL, DATE '2013-03-05', NULL)) AS t (id, name, age, day, kind)"""


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    def make(task: str = "task") -> Context:
        store = ArtifactStore(root=str(tmp_path / "artifacts"), folder=f"exec-1/{task}/1")
        return Context(execution_id="exec-1", task_id=task, workflow_id="w", attempt=1, artifacts=store)

    return make


@pytest.fixture
def people(attempt: Attempt) -> Dataset:
    return sql.transform(PEOPLE, context=attempt("people"))


def failure(data: Dataset, context: Context, **expected: Any) -> str:
    with pytest.raises(Fail) as caught:
        check.expect(data, context=context, **expected)
    return str(caught.value)


def test_expect_holds_hands_the_dataset_on(people: Dataset, attempt: Attempt) -> None:
    done = check.expect(
        people,
        rows=Bounds(min=3, max=3),
        not_null=["id"],
        unique=["day", ["id", "day"]],
        ranges={"age": Bounds(min=17, max=30), "day": Bounds(min="2013-01-05", max="2013-03-05")},
        values={"kind": ["x", "y"], "id": [1, 2], "day": ["2013-01-05", "2013-02-05", "2013-03-05"]},
        sql={"names": "FROM data WHERE name = ''"},
        context=attempt(),
    )
    assert Dataset.model_validate(done.model_dump(mode="json")) == people
    assert done.checks == len(done.passed) == 10


@pytest.mark.parametrize(
    ("expected", "told"),
    [
        ({"rows": Bounds(min=4)}, "rows 4..: there are 3"),
        ({"rows": Bounds(max=2.5)}, "rows ..2.5: there are 3"),
        ({"not_null": ["age"]}, "not_null age: 1 row, as:\n    id=2, name=bo, age=None, day=2013-03-05, kind=None"),
        ({"unique": ["id"]}, "unique id: 1 row, as:\n    id=2, times=2"),
        ({"unique": [["id", "name"]]}, "unique id, name: 1 row, as:\n    id=2, name=bo, times=2"),
        ({"ranges": {"age": Bounds(min=17.5)}}, "range age 17.5..: 1 row"),
        ({"ranges": {"age": Bounds(max=29.5)}}, "range age ..29.5: 1 row"),
        ({"ranges": {"day": Bounds(max="2013-02-28")}}, "range day ..2013-02-28: 1 row"),
        ({"values": {"day": ["2013-01-05", "2013-02-05"]}}, "values day: 1 row"),
        ({"values": {"kind": ["x"]}}, "values kind: 1 row"),
        ({"values": {"id": []}}, "values id: 3 rows"),
        ({"sql": {"grown up": "FROM data WHERE age < 18"}}, "sql grown up: 1 row, as:\n    id=2, name=bo, age=17"),
        ({"not_null": ["agee"]}, "there is no column agee; there are id, name, age, day, kind"),
        ({"sql": {"broken": "SELEC"}}, "sql broken: Parser Error"),
        ({"sql": {"two": "SELECT 1; SELECT 2"}}, "one SELECT statement"),
        ({"sql": {"file": "FROM read_text('/etc/passwd')"}}, "sql file: Permission Error"),
        ({"ranges": {"age": Bounds(min="young")}}, "range age young..: Conversion Error"),
    ],
)
def test_expect_broken_fails_and_tells_count_and_rows(
    people: Dataset, attempt: Attempt, expected: dict[str, Any], told: str
) -> None:
    message = failure(people, attempt(), **expected)
    assert message.startswith("1 of 1 expectations failed\n- ")
    assert told in message


@pytest.mark.parametrize(("first", "holds"), [("2013-01-05 02:00:00+02", True), ("2013-01-05 02:00:01+02", False)])
def test_expect_compares_times_in_their_zones(attempt: Attempt, first: str, holds: bool) -> None:
    data = sql.transform("SELECT TIMESTAMPTZ '2013-01-05 00:00:00Z' AS at", context=attempt("times"))
    if holds:
        assert check.expect(data, ranges={"at": Bounds(min=first)}, context=attempt()).checks == 1
    else:
        assert "1 row" in failure(data, attempt(), ranges={"at": Bounds(min=first)})


def test_expect_reports_all_that_failed_and_only_that(people: Dataset, attempt: Attempt) -> None:
    message = failure(people, attempt(), not_null=["id", "age", "kind"], unique=["id", "day"])
    assert message.startswith("3 of 5 expectations failed")
    assert [line.split(":")[0] for line in message.splitlines() if line.startswith("- ")] == [
        "- not_null age",
        "- not_null kind",
        "- unique id",
    ]


def test_expect_shows_no_more_than_the_sample_and_cuts_long_rows(attempt: Attempt) -> None:
    data = sql.transform("SELECT i, repeat('x', 5000) AS t FROM range(50) AS r (i)", context=attempt("many"))
    message = failure(data, attempt(), ranges={"i": Bounds(max=-1)}, sample=2)
    assert "50 rows, as:" in message
    assert len(message.splitlines()) == 4
    assert len(message) < 1000
    assert len(failure(data, attempt(), ranges={"i": Bounds(max=-1)}, sample=0).splitlines()) == 2


def test_expect_sql_sees_the_other_datasets_and_data_is_always_the_one_checked(
    people: Dataset, attempt: Attempt
) -> None:
    known = sql.transform("SELECT 1 AS id", context=attempt("known"))
    message = failure(
        people, attempt(), sql={"id is known": "FROM data ANTI JOIN known_ids USING (id)"}, **{"known-ids": known}
    )
    assert "sql id is known: 2 rows" in message


def test_expect_params_of_a_definition_are_checked(people: Dataset) -> None:
    declared = collect([check])["check.expect"]
    given = {
        "data": {**people.model_dump(mode="json"), "checks": 1},
        "ranges": {"age": {"min": 1}},
        "unique": ["id", ["id", "day"]],
    }
    bound = declared.input_adapter.validate_python(given)
    assert (bound["data"], bound["ranges"]) == (people, {"age": Bounds(min=1)})
    with pytest.raises(ValidationError, match="minimum"):
        declared.input_adapter.validate_python({**given, "ranges": {"age": {"minimum": 1}}})
