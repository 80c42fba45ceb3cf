"""Real servers for every test: the embedded pair always, others where the environment names them.

PIPELINE_TEST_DATABASE_URL with PIPELINE_TEST_REDIS_URL adds the pair `system`, with PIPELINE_TEST_AMQP_URL the pair
`amqp`. Each test gets a database of its own, copied from a template, and a queue of its own.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from config.settings import Settings
from pipeline.embedded import EmbeddedServices
from pipeline.engine import WorkflowEngine
from pipeline.observe import Execution
from pipeline.result_store.migrations import upgrade
from pipeline.result_store.rows import TaskExecution
from pipeline.result_store.store import ResultStore
from pipeline.states import EXECUTION_TRANSITIONS, TASK_TRANSITIONS, TaskStatus

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # installations of the tests name the module of handlers that lies there
IN_CI = os.environ.get("CI") == "true"


@dataclass(frozen=True, kw_only=True)
class Servers:
    """A Postgres and a broker."""

    name: str
    database_url: str
    broker_url: str


def _pairs() -> dict[str, tuple[str, str]]:
    database, redis, amqp = (os.environ.get(f"PIPELINE_TEST_{n}_URL", "") for n in ("DATABASE", "REDIS", "AMQP"))
    found = {"embedded": ("", "")}
    if database and redis:
        found["system"] = (database, redis)
    if database and amqp:
        found["amqp"] = (database, amqp)
    return found


#: which pairs a folder's tests run on, where not on all: the command line and the kit are the same on each, and to the
#: store a broker is nothing; a pool of threads need not meet the second Redis too
PAIRS = {"acceptance": {"embedded"}, "crash": {"embedded"}, "store": {"embedded", "system"}, "unit": {"embedded", "system"}}


#: files whose tests are long: on every pair alike, or no other with the second Redis than with the first
FEWER = {
    "test_pulse.py": {"embedded"}, "test_limits.py": {"embedded"}, "test_turn.py": {"embedded", "amqp"},
    "test_steering.py": {"embedded", "amqp"}, "test_stopping.py": {"embedded", "amqp"},
}  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what would be the same test again."""
    out = []
    for item in items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        pair, pool = given.get("servers"), given.get("busy_site")
        pairs = FEWER.get(item.path.name) or PAIRS.get(item.path.parent.name, {pair})
        if pair is not None and (pair not in pairs or (pool, pair) == ("threads", "system")):
            out.append(item)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The servers from wheels, for the whole run."""
    with EmbeddedServices(tmp_path_factory.mktemp("services")) as services:
        yield Servers(name="embedded", database_url=services.database_url, broker_url=services.broker_url)


@pytest.fixture(scope="session", params=list(_pairs()))
def servers(request: pytest.FixtureRequest) -> Servers:
    """Each pair in turn."""
    name: str = request.param
    if name == "embedded":
        pair: Servers = request.getfixturevalue("embedded")
        return pair
    database_url, broker_url = _pairs()[name]
    try:
        psycopg.connect(database_url, connect_timeout=5).close()
    except psycopg.OperationalError as exc:
        if IN_CI:
            raise
        pytest.skip(f"PIPELINE_TEST_DATABASE_URL does not answer: {exc}")
    return Servers(name=name, database_url=database_url, broker_url=broker_url)


@pytest.fixture(scope="session")
def databases(servers: Servers) -> Iterator[Callable[[], str]]:
    """Makes databases with the schema, and a trigger that refuses what the transition tables do not name."""
    with psycopg.connect(servers.database_url, autocommit=True) as admin:
        template = f"chordal_test_{secrets.token_hex(4)}"
        made = [template]
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(template)))
        upgrade(_named(servers.database_url, template))
        with psycopg.connect(_named(servers.database_url, template), autocommit=True) as connection:
            connection.execute(_guards().encode())

        def make() -> str:
            made.append(f"{template}_{len(made)}")
            admin.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(made[-1]), sql.Identifier(template))
            )
            return _named(servers.database_url, made[-1])

        try:
            yield make
        finally:
            for name in made if servers.name != "embedded" else ():  # those are gone with their server
                admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def database_url(databases: Callable[[], str]) -> str:
    """A database for this test alone."""
    return databases()


@pytest.fixture
def store(database_url: str) -> Iterator[ResultStore]:
    """The store on a database for this test alone."""
    opened = ResultStore.open(database_url)
    yield opened
    opened.close()


@dataclass(frozen=True, kw_only=True)
class Site:
    """An installation for tests: settings, an engine, and workers as real processes."""

    settings: Settings
    engine: WorkflowEngine
    log_folder: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process of this installation."""
        s = self.settings
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("PIPELINE_")},
            "PYTHONPATH": str(TESTS),
            **{
                f"PIPELINE_{name.upper()}": ",".join(value) if isinstance(value, tuple) else str(value)
                for name in s.model_fields_set
                if not isinstance(value := getattr(s, name), Mapping)
            },
            **{f"PIPELINE_SECRET_{name}": value for name, value in s.secrets.items()},
            **{f"PIPELINE_CONNECTION_{name}": value for name, value in s.connections.items()},
        }

    def spawn(
        self, *arguments: str, name: str, env: Mapping[str, str] = {}, module: str = "pipeline"
    ) -> subprocess.Popen[bytes]:
        """Start `pipeline ...` (or another module's command) with its output in a log."""
        with (self.log_folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments], env={**self.env, **env}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def run(self, definition: Any, input_data: Mapping[str, Any] | None = None, **options: Any) -> Execution:
        """Execute and wait for the end."""
        return self.engine.wait(self.engine.execute_workflow(definition, input_data, **options), 60)

    def task(self, execution_id: str, task_id: str) -> TaskExecution:
        """One task as it is now."""
        return self.engine.get_execution(execution_id).tasks[task_id]

    def until_running(self, execution_id: str, *task_ids: str) -> None:
        """Wait until tasks run."""
        self.until(
            lambda: all(self.task(execution_id, t).status is TaskStatus.RUNNING for t in task_ids)
        )

    def log(self, name: str) -> str:
        """What a process said."""
        return (self.log_folder / f"{name}.log").read_text("utf-8", "replace")

    @contextmanager
    def worker(
        self, *, pool: str = "prefork", concurrency: int = 2, name: str = "worker", env: Mapping[str, str] = {},
    ) -> Iterator[subprocess.Popen[bytes]]:  # fmt: skip
        """A worker that can run tasks; ended afterwards, its log printed where the test failed."""
        before = self.engine.installation.store.newest_worker()
        expected = concurrency if pool == "prefork" else 1
        process = self.spawn(
            "worker", "--pool", pool, "--concurrency", str(concurrency), "--name", name, name=name, env=env
        )
        try:
            self.until(
                lambda: self.engine.installation.store.live_workers(after=before) >= expected or process.poll() is not None
            )
            assert process.poll() is None, self.log(name)
            yield process
        except BaseException:
            print(self.log(name)[-6000:])
            raise
        finally:
            ended = end(process)
        assert ended, f"the worker did not end by itself\n{self.log(name)[-3000:]}"

    def until(self, condition: Callable[[], Any], timeout: float = 60.0) -> None:
        """Wait for something that another process does; fails loudly, with the workers' logs."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {p.name}\n{p.read_text('utf-8', 'replace')[-3000:]}" for p in self.log_folder.glob("*.log"))
                pytest.fail(f"did not happen within {timeout:g} s\n{logs}")
            time.sleep(0.02)


def end(process: subprocess.Popen[bytes], timeout: float = 30.0) -> bool:
    """SIGTERM, and SIGKILL to the whole session; false where the first did not end it."""
    ended = True
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            ended = False
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return ended


@pytest.fixture(scope="session")
def sites(
    servers: Servers, databases: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Site]]:
    """Makes installations with a database and a queue of their own; keyword arguments are settings."""
    with ExitStack() as opened:

        def make(**changes: Any) -> Site:
            home = tmp_path_factory.mktemp("site")
            settings = Settings.model_validate({
                "database_url": databases(), "broker_url": servers.broker_url, "home": home,
                "queue": f"test-{secrets.token_hex(4)}", "handlers": ("site_handlers",), "sweep": 0.2, "lease": 6.0,
                "grace": 3.0, "hard_limit": 3.0, "flower_port": 0, **changes,
            })  # fmt: skip
            engine = opened.enter_context(WorkflowEngine(settings=settings))
            return Site(settings=settings, engine=engine, log_folder=home)

        yield make


@pytest.fixture
def site(sites: Callable[..., Site]) -> Site:
    """An installation for this test alone, without workers."""
    return sites()


@pytest.fixture(scope="session")
def _busy_sites(sites: Callable[..., Site]) -> Iterator[Callable[[str], Site]]:
    """Installations with a worker, by kind of pool; a secret in their settings, and limits that tests can wait for."""
    with ExitStack() as opened:

        @cache
        def busy(pool: str) -> Site:
            made = sites(hard_limit=1.0, secrets={"TOKEN": CANARY}, max_result_bytes=4096, loss_budget=1)
            opened.enter_context(made.worker(pool=pool))
            return made

        yield busy


@pytest.fixture
def prefork_site(_busy_sites: Callable[[str], Site]) -> Site:
    """An installation with a prefork worker for two tasks, shared by the tests that leave it as it was."""
    return _busy_sites("prefork")


@pytest.fixture
def threads_site(_busy_sites: Callable[[str], Site]) -> Site:
    """The same with a worker of two threads."""
    return _busy_sites("threads")


@pytest.fixture(params=["prefork", "threads"])
def busy_site(request: pytest.FixtureRequest, _busy_sites: Callable[[str], Site]) -> Site:
    """Both in turn."""
    return _busy_sites(request.param)


@pytest.fixture(autouse=True)
def _audited(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the store it used keeps every invariant."""
    names = ("site", "busy_site", "prefork_site", "threads_site")
    used = [request.getfixturevalue(name) for name in names if name in request.fixturenames]
    yield
    for made in (one for one in used if isinstance(one, Site)):  # a test file may give these names to its own
        assert made.engine.installation.store.audit() == []


def task(id: str, handler: str = "debug.noop", after: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:  # noqa: A002
    """A task of a definition, as a dict."""
    return {"id": id, "handler": handler, "dependencies": list(after), **more}


def workflow(*tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A definition with an id of its own, as a dict."""
    return {"id": f"w-{secrets.token_hex(4)}", "version": "1", "tasks": list(tasks), **more}


NO_RETRY = {"max_retries": 0}
#: retries that tests can wait for
SOON = {"max_retries": 3, "max_delay": 0.2}
#: a secret's value, with what JSON and Python escape
CANARY = 'canary-"4711"-\\-tweet'


def _named(url: str, name: str) -> str:
    return psycopg.conninfo.make_conninfo(url, dbname=name) if "://" not in url else url.rsplit("/", 1)[0] + "/" + name


def _guards() -> str:
    """The transition tables as triggers."""

    def pairs(table: Mapping[Any, frozenset[Any]]) -> str:
        return ", ".join(f"('{a.value}', '{b.value}')" for a, targets in table.items() for b in sorted(targets))

    return "".join(
        f"""
        CREATE FUNCTION pipeline.guard_{name}() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.status <> OLD.status AND (OLD.status, NEW.status) NOT IN ({pairs(transitions)}) THEN
                RAISE EXCEPTION 'illegal transition of {name}: % -> %', OLD.status, NEW.status;
            END IF;
            {"IF NEW.epoch < OLD.epoch THEN RAISE EXCEPTION 'epoch went back'; END IF;" if name == "task" else ""}
            RETURN NEW;
        END $$;
        CREATE TRIGGER guard BEFORE UPDATE ON pipeline.{table}
            FOR EACH ROW EXECUTE FUNCTION pipeline.guard_{name}();
        """
        for name, table, transitions in (
            ("task", "task_executions", TASK_TRANSITIONS),
            ("execution", "workflow_executions", EXECUTION_TRANSITIONS),
        )
    )
