"""The door to Postgres: what it does when the server is not there, goes away, or is shared with others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from textwrap import dedent

import psycopg
import pytest

from pipeline.errors import DatabaseUnavailable, ExecutionNotFound
from pipeline.result_store.connection import Database, Listener, connect
from pipeline.result_store.store import ResultStore
from tests.store.conftest import Driver


@dataclass(frozen=True, kw_only=True)
class Value:
    value: int


def ask(database: Database, statement: str) -> int:
    return database.fetch(statement, Value, {})[0].value


def backend(database: Database) -> int:
    return ask(database, "SELECT pg_backend_pid() AS value")


def terminate(drive: Driver, pid: int) -> None:
    with psycopg.connect(drive.url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 60000)", (pid,))


@pytest.fixture
def patient(drive: Driver) -> Iterator[Database]:
    database = Database(drive.url, patience=60)
    yield database
    database.close()


@pytest.fixture
def hasty(drive: Driver) -> Iterator[Database]:
    database = Database(drive.url)
    yield database
    database.close()


def test_dead_port_is_unavailable_and_names_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it, and nobody answers
        store = ResultStore.open(f"postgresql://ana:hunter2@127.0.0.1:{taken.getsockname()[1]}/none")
        with pytest.raises(DatabaseUnavailable, match=r"cannot be reached.*PIPELINE_DATABASE_URL") as caught:
            store.newest_worker()
        with pytest.raises(DatabaseUnavailable):
            store.listen("pipeline_finished")
    assert "hunter2" not in str(caught.value)


def test_patience_ends_where_the_server_stays_away() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(DatabaseUnavailable):
            backend(Database(f"postgresql://127.0.0.1:{taken.getsockname()[1]}/none", patience=0.2))


@pytest.mark.parametrize(
    "url", ["nonsense", "mysql://ana:hunter2@host/db", "postgresql://ana:hunter2@host:port:1/db", "host=a pass hunter2"]
)
def test_url_that_cannot_be_read_is_one_clear_error_without_the_password(url: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="PIPELINE_DATABASE_URL") as caught:
        connect(url, "test")
    assert "hunter2" not in f"{caught.value} {caught.value.__cause__}"
    assert "\n" not in str(caught.value)


def test_patience_rides_out_a_terminated_backend(drive: Driver, patient: Database) -> None:
    before = backend(patient)
    terminate(drive, before)
    assert backend(patient) != before


def test_without_patience_a_terminated_backend_is_an_error_once(drive: Driver, hasty: Database) -> None:
    before = backend(hasty)
    terminate(drive, before)
    with pytest.raises(DatabaseUnavailable):
        backend(hasty)
    assert backend(hasty) != before


def test_transaction_on_a_terminated_backend_is_an_error_whatever_the_patience_and_leaves_nothing(
    drive: Driver, patient: Database
) -> None:
    drive.sql("CREATE TABLE lost (value int)")
    with pytest.raises(DatabaseUnavailable), patient.transaction():
        ask(patient, "INSERT INTO lost VALUES (1) RETURNING value")
        terminate(drive, backend(patient))
        ask(patient, "INSERT INTO lost VALUES (2) RETURNING value")
    assert ask(patient, "SELECT count(*)::int AS value FROM lost") == 0
    drive.sql("DROP TABLE lost")


def conflicts(drive: Driver, times: int) -> str:
    """A statement that meets a rival so many times, then succeeds."""
    drive.sql("DROP SEQUENCE IF EXISTS met")
    drive.sql("CREATE SEQUENCE met")
    drive.sql(f"""
        CREATE OR REPLACE FUNCTION meet() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('met') <= {times} THEN RAISE deadlock_detected; END IF;
            RETURN currval('met');
        END $$""")
    return "SELECT meet() AS value"


def test_conflicts_with_rivals_are_tried_again_without_patience(drive: Driver, hasty: Database) -> None:
    assert ask(hasty, conflicts(drive, 3)) == 4


def test_conflicts_without_end_are_an_error(drive: Driver, hasty: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.result_store.connection._TRIES_ON_CONFLICT", 3)
    with pytest.raises(DatabaseUnavailable, match="deadlock_detected"):
        ask(hasty, conflicts(drive, 1000))


def test_conflict_in_a_transaction_is_not_tried_again(drive: Driver, patient: Database) -> None:
    statement = conflicts(drive, 1)
    with pytest.raises(DatabaseUnavailable, match="deadlock_detected"), patient.transaction():
        ask(patient, statement)
    assert ask(patient, statement) == 2


def test_a_users_error_is_not_an_outage(hasty: Database) -> None:
    pid = backend(hasty)
    with pytest.raises(psycopg.errors.DivisionByZero):
        ask(hasty, "SELECT 1 / 0 AS value")
    assert backend(hasty) == pid


def test_each_thread_has_a_connection_of_its_own_and_close_closes_them_all(hasty: Database, drive: Driver) -> None:
    with ThreadPoolExecutor(1) as pool:
        pids = {
            backend(hasty),
            backend(hasty),
            pool.submit(backend, hasty).result(60),
            pool.submit(backend, hasty).result(60),
        }
        assert len(pids) == 2
        hasty.close()
    with psycopg.connect(drive.url, autocommit=True) as connection:
        for pid in pids:  # waits until it is gone; false where it is gone already
            connection.execute("SELECT pg_terminate_backend(%s, 60000)", (pid,))
        assert connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY (%s)", (list(pids),)
        ).fetchone() == (0,)


def test_fork_gives_the_child_a_connection_of_its_own_and_leaves_the_parents_whole(drive: Driver) -> None:
    program = dedent("""
        import os, sys
        from dataclasses import dataclass
        from pipeline.result_store.connection import Database
        @dataclass
        class Value:
            value: int
        database = Database(sys.argv[1])
        def backend():
            return database.fetch("SELECT pg_backend_pid() AS value", Value, {})[0].value
        before = backend()
        child = os.fork()
        if child == 0:
            pids = {backend(), backend()}
            database.close()
            os._exit(0 if len(pids) == 1 and before not in pids else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child shares the parent's connection"
        assert backend() == before
        database.close()
    """)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, drive.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_borrowed_connection_rolled_back_leaves_nothing(drive: Driver) -> None:
    definition = drive.define({"a": ""})
    with psycopg.connect(drive.url) as connection:
        created = drive.dispatcher.create(definition, {}, store=drive.store.within(connection))
        assert drive.store.within(connection).execution_status(created.execution_id) == "pending"
        with pytest.raises(ExecutionNotFound):
            drive.store.execution_status(created.execution_id)
        connection.rollback()
        with pytest.raises(ExecutionNotFound):
            drive.store.within(connection).execution_status(created.execution_id)


def test_borrowed_connection_committed_is_there_beside_what_the_caller_did(drive: Driver) -> None:
    drive.sql("CREATE TABLE orders (id int)")
    with psycopg.connect(drive.url) as connection:
        connection.execute("INSERT INTO orders VALUES (1)")
        created = drive.dispatcher.create(drive.define({"a": ""}), {}, store=drive.store.within(connection))
        connection.commit()
    assert drive.drain(created.execution_id) == ["a"]
    assert drive.sql("SELECT id FROM orders") == [(1,)]
    drive.sql("DROP TABLE orders")


def test_close_leaves_a_borrowed_connection_open(drive: Driver) -> None:
    with psycopg.connect(drive.url) as connection:
        drive.store.within(connection).close()
        assert not connection.closed


def test_listener_hears_of_executions_that_end_and_are_awaited_and_only_of_those(drive: Driver) -> None:
    with drive.store.listen("pipeline_finished") as listener:
        execution = drive.start({"a": "", "b": "a"})
        drive.drain(drive.start({"a": ""}))
        drive.store.await_execution(execution)
        drive.complete(execution, "a")
        assert listener.wait(0) == []
        drive.complete(execution, "b")
        assert listener.wait(60) == [execution]


def test_waiting_writes_once_and_nothing_where_the_execution_has_ended_or_nothing_may_be_written(drive: Driver) -> None:
    def versions() -> list[tuple[str]]:
        return drive.sql("SELECT ctid::text FROM pipeline.workflow_executions WHERE execution_id = %s", execution)

    execution = drive.start({"a": ""})
    drive.sql("SET default_transaction_read_only = on")
    drive.store.await_execution(execution)
    drive.sql("SET default_transaction_read_only = off")
    assert drive.sql("SELECT awaited FROM pipeline.workflow_executions WHERE execution_id = %s", execution) == [(False,)]
    drive.store.await_execution(execution)
    before = versions()
    drive.store.await_execution(execution)
    assert versions() == before
    drive.drain(execution)
    before = versions()
    drive.store.await_execution(execution)
    assert versions() == before


@pytest.mark.parametrize("operation", ["cancel_execution", "expire"])
def test_listener_hears_what_is_to_be_stopped(drive: Driver, operation: str) -> None:
    drive.set_clock(0)
    execution = drive.start({"a": ""}, timeout=10)
    drive.claim(execution, "a")
    with drive.store.listen("pipeline_stop") as listener:
        if operation == "expire":
            drive.set_clock(10)
            drive.store.expire_executions(100)
        else:
            drive.store.cancel_execution(execution, None)
        assert listener.wait(60) == [execution]


def test_listener_that_hears_nothing_times_out_empty(drive: Driver) -> None:
    with drive.store.listen("pipeline_finished") as listener:
        assert listener.wait(0.01) == []
        assert listener.wait(-1) == []


def test_listener_is_woken_by_a_file_descriptor(drive: Driver) -> None:
    reader, writer = os.pipe()
    with drive.store.listen("pipeline_finished") as listener:
        os.write(writer, b"x")
        assert listener.wait(60, reader) == []
    os.close(reader)
    os.close(writer)


def test_listener_on_a_terminated_backend_is_unavailable(drive: Driver) -> None:
    with Listener(drive.url, "pipeline_finished") as listener:
        terminate(drive, listener._connection.info.backend_pid)
        with pytest.raises(DatabaseUnavailable):
            while True:
                listener.wait(60)
