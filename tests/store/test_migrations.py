"""The schema's versions: the same database by either way, once, and none that is newer."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql

from pipeline.errors import SchemaMismatch
from pipeline.result_store import migrations
from pipeline.result_store.migrations import Migration, require_current, upgrade, version
from pipeline.result_store.statements import sql_text
from pipeline.result_store.store import ResultStore
from tests.conftest import Servers

#: everything that a schema is made of; each row is one thing
CATALOGUE = """
SELECT 'column', table_name, format('%s %s %s %s %s %s %s', column_name, ordinal_position, data_type, is_nullable,
                                    column_default, collation_name, identity_generation)
  FROM information_schema.columns WHERE table_schema = 'pipeline'
UNION ALL
SELECT 'constraint', conname, format('%s %s', conrelid::regclass, pg_get_constraintdef(oid))
  FROM pg_constraint WHERE connamespace = 'pipeline'::regnamespace
UNION ALL
SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'pipeline'
UNION ALL
SELECT 'function', proname, pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'pipeline'::regnamespace
UNION ALL
SELECT 'trigger', tgname, pg_get_triggerdef(t.oid) FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
 WHERE relnamespace = 'pipeline'::regnamespace
UNION ALL
SELECT 'relation', relname, format('%s %s %s', relkind, reloptions, relacl) FROM pg_class
 WHERE relnamespace = 'pipeline'::regnamespace
UNION ALL
SELECT 'attribute', c.relname, format('%s %s', a.attname, format_type(a.atttypid, a.atttypmod))
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid WHERE c.relnamespace = 'pipeline'::regnamespace AND c.relkind = 'c'
"""


@pytest.fixture
def empty_url(servers: Servers) -> Iterator[str]:
    """A database without anything."""
    name = sql.Identifier(f"chordal_empty_{secrets.token_hex(4)}")
    with psycopg.connect(servers.database_url, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(name))
        yield urlsplit(servers.database_url)._replace(path=f"/{name.as_string().strip(chr(34))}").geturl()
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def test_migrations_make_the_same_schema_as_schema_sql(empty_url: str) -> None:
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(sql_text("schema.sql").encode())
        wanted = set(connection.execute(CATALOGUE).fetchall())
        assert {kind for kind, _, _ in wanted} == {"column", "constraint", "index", "function", "relation", "attribute"}
        connection.execute("DROP SCHEMA pipeline CASCADE")
        upgrade(empty_url)
        assert set(connection.execute(CATALOGUE).fetchall()) == wanted


def test_migrations_are_numbered_from_one_without_gaps() -> None:
    folder = resources.files("pipeline.result_store").joinpath("migrations")
    steps = migrations.migrations()
    assert [step.version for step in steps] == list(range(1, len(steps) + 1))
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".sql"))
    assert names == [f"{step.version:04d}_{step.name}.sql" for step in steps]


def test_upgrade_waits_until_no_worker_of_the_old_version_runs_and_keeps_what_is_open(empty_url: str) -> None:
    first = migrations.migrations()[0]
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(first.sql.encode())
        connection.execute("INSERT INTO pipeline.schema_versions (version, name) VALUES (1, 'initial')")
        connection.execute(
            "INSERT INTO pipeline.workers (name, pid, expires_at) VALUES ('old', 1, now() + interval '1 h');"
            "INSERT INTO pipeline.workflow_executions (execution_id, definition_id, workflow_id, input_digest)"
            " VALUES ('exec-0', 1, 'w', '');"
            "INSERT INTO pipeline.task_executions (execution_id, task_id, handler, due_at) VALUES ('exec-0', 'a', 'h', now());"
            "INSERT INTO pipeline.workflow_definitions (workflow_id, version, digest, definition) VALUES ('w', '1', '',"
            """ '{"tasks": [{"id": "a", "params": {"b": 1, "a": 2}}, {"id": "c", "retry_policy": {"max_retries": 1}}]}');"""
            "INSERT INTO pipeline.workflow_tasks VALUES (1, 'a', 0, 'h', 1, '{}', '{}', '{c}', '{}'),"
            " (1, 'c', 1, 'h', 1, '{a}', '{a}', '{}', '{0}')"
        )
        connection.execute("GRANT SELECT ON pipeline.task_executions TO PUBLIC")
        with pytest.raises(SchemaMismatch, match="1 processes of workers run"):
            upgrade(empty_url)
        assert version(empty_url) == 1
        connection.execute("UPDATE pipeline.workers SET expires_at = now()")
        assert [step.version for step in upgrade(empty_url)] == [step.version for step in migrations.migrations()[1:]]
        assert connection.execute("SELECT task_id, led_by FROM pipeline.task_executions").fetchall() == [("a", None)]
        granted = connection.execute(
            "SELECT a.privilege_type FROM pg_class c, aclexplode(c.relacl) a"
            " WHERE c.oid = 'pipeline.task_executions'::regclass AND a.grantee = 0"
        )
        assert granted.fetchall() == [("SELECT",)], "who could read the tasks still can"
        plan = connection.execute("SELECT task_id, params::text, retry_policy FROM pipeline.workflow_tasks ORDER BY 1").fetchall()
        assert plan == [("a", '{"b": 1, "a": 2}', None), ("c", None, {"max_retries": 1})]


def test_upgrade_brings_an_empty_database_to_the_newest_version_and_then_does_nothing(empty_url: str) -> None:
    assert version(empty_url) == 0
    assert upgrade(empty_url) == migrations.migrations()
    assert version(empty_url) == len(migrations.migrations())
    require_current(empty_url)
    assert upgrade(empty_url) == ()


def test_upgrades_at_once_take_each_step_once(empty_url: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        taken = [done.result(60) for done in [pool.submit(upgrade, empty_url) for _ in range(3)]]
    assert sorted(map(len, taken)) == [0, 0, len(migrations.migrations())]


def test_upgrade_that_fails_leaves_nothing_of_its_step(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = migrations.migrations()
    broken = Migration(version=len(good) + 1, name="broken", sql="CREATE TABLE pipeline.half (); SELECT 1 / 0")
    monkeypatch.setattr(migrations, "migrations", lambda: (*good, broken))
    with pytest.raises(psycopg.errors.DivisionByZero):
        upgrade(empty_url)
    assert version(empty_url) == len(good)
    with psycopg.connect(empty_url) as connection:
        assert connection.execute("SELECT to_regclass('pipeline.half')").fetchone() == (None,)


def test_claim_as_the_version_before_asks_for_it_is_refused_for_that_would_not_know_what_it_gets(database_url: str) -> None:
    with psycopg.connect(database_url) as connection, pytest.raises(psycopg.errors.UndefinedFunction):
        connection.execute("SELECT pipeline.claim_task(%s, %s, 0, 1, %s, interval '30 s')", ["exec-none", "a", "debug.noop"])


@pytest.mark.parametrize("operation", [upgrade, require_current])
def test_a_newer_database_is_refused_with_both_versions(database_url: str, operation: object) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("INSERT INTO pipeline.schema_versions (version, name) VALUES (999, 'of the future')")
    with pytest.raises(SchemaMismatch, match=f"version 999, this code knows {len(migrations.migrations())}"):
        operation(database_url)  # type: ignore[operator]


def test_require_current_of_an_older_database_names_the_command(empty_url: str) -> None:
    with pytest.raises(SchemaMismatch, match=r"on schema version 0, .*run `pipeline db upgrade`"):
        require_current(empty_url)


def test_a_database_without_schema_is_a_mismatch_that_names_the_command(empty_url: str) -> None:
    store = ResultStore.open(empty_url, patience=60)
    for ask in (store.newest_worker, store.recovery_work, lambda: store.execution_status("exec-none")):
        with pytest.raises(SchemaMismatch, match="run `pipeline db upgrade`"):
            ask()
    store.close()
