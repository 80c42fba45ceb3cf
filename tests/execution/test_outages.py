"""Servers that die, restart and stand still in the midst of work, and workers that do: each task is recorded once."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest

from config.settings import Settings
from pipeline.embedded import EmbeddedServices
from pipeline.engine import WorkflowEngine
from pipeline.errors import DatabaseUnavailable
from pipeline.observe import Execution
from pipeline.recovery import Recovered, Recovery
from pipeline.result_store.migrations import upgrade
from pipeline.servers import Postgres, Redis, Server
from pipeline.states import ExecutionStatus, TaskStatus
from pipeline.testing.proxy import Proxy
from tests.conftest import NO_RETRY, Servers, Site, task, workflow

SUCCESS = TaskStatus.SUCCESS


@dataclass(kw_only=True)
class Own:
    """Servers that a test may break."""

    home: Path
    services: EmbeddedServices
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def site(self, **changes: Any) -> Iterator[Site]:
        """An installation with a database and a queue of its own; it keeps every invariant to the end."""
        urls, number = self.services.start(), next(self._numbers)
        with psycopg.connect(urls.database_url, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE site_{number}".encode())
        database_url = f"{urls.database_url.rsplit('/', 1)[0]}/site_{number}"
        upgrade(database_url)
        home = self.home / f"site-{number}"
        home.mkdir()
        settings = Settings.model_validate({
            "database_url": database_url, "broker_url": urls.broker_url, "home": home, "queue": f"site-{number}",
            "handlers": ("site_handlers",), "sweep": 0.2, "grace": 1.0, "flower_port": 0, **changes,
        })  # fmt: skip
        with WorkflowEngine(settings=settings) as engine:
            made = Site(settings=settings, engine=engine, log_folder=home)
            yield made
            assert engine.installation.store.audit() == []

    @property
    def postgres(self) -> Server:
        return Postgres(self.home)

    @property
    def redis(self) -> Server:
        return Redis(self.home)

    def kill(self, server: Server) -> None:
        """kill -9."""
        process = found(server)
        process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    """Postgres and Redis of this module's own."""
    home = tmp_path_factory.mktemp("own")
    services = EmbeddedServices(home)
    try:
        services.start()
        made = Own(home=home, services=services)
        yield made
        for server in (made.postgres, made.redis):  # quicker than a stop that saves what nobody wants
            made.kill(server)
    finally:
        services.stop()


@pytest.fixture(scope="module")
def survivor(own: Own) -> Iterator[Site]:
    """An installation whose worker outlives one outage after another."""
    with own.site(lease=30.0) as site, site.worker(concurrency=2):
        yield site


def found(server: Server) -> psutil.Process:
    process = server.find()
    assert process
    return process


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    """A server that stands still with all its processes, and goes on afterwards."""
    process.suspend()  # first, so that there are no more children than we see
    children = process.children(recursive=True)
    try:
        for child in children:
            child.suspend()
        yield
    finally:
        for one in (*children, process):
            one.resume()


@contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    """A line to a server, and the URL that leads through it."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    with Proxy(parts.hostname, parts.port) as proxy:
        user, at, _ = parts.netloc.rpartition("@")
        yield proxy, parts._replace(netloc=f"{user}{at}127.0.0.1:{proxy.port}").geturl()


def starts(folder: Path, *task_ids: str) -> dict[str, int]:
    """How often handlers began, from outside."""
    names = [path.name.partition(".")[0] for path in folder.iterdir() if not re.match(r"(go|lost)-", path.name)]
    return {task_id: names.count(task_id) for task_id in (task_ids or set(names))}


def watched(folder: Path, *task_ids: str) -> list[dict[str, Any]]:
    return [task(t, "site.watch", params={"folder": str(folder)}, retry_policy=NO_RETRY) for t in task_ids]


def marking(folder: Path, task_id: str, *after: str) -> dict[str, Any]:
    return task(task_id, "site.leave_a_mark", after, params={"folder": str(folder)}, retry_policy=NO_RETRY)


def answers(site: Site) -> bool:
    """Whether the engine's own connection works (again)."""
    try:
        site.engine.installation.store.live_workers(after=0)
    except DatabaseUnavailable:
        return False
    return True


def assert_once(done: Execution, folder: Path) -> None:
    """Every task succeeded in its first attempt, and no handler began twice."""
    assert done.status is ExecutionStatus.SUCCESS, done.error_message
    assert {(t.status, t.attempt, t.losses) for t in done.tasks.values()} == {(SUCCESS, 1, 0)}
    assert starts(folder) == dict.fromkeys(done.tasks, 1)


def start_two(site: Site, folder: Path) -> str:
    """A workflow of which two tasks run, two wait for one of them and one for both."""
    (folder / "go-also_after_ends").touch()
    started = site.engine.execute_workflow(
        workflow(
            *watched(folder, "ends", "goes_on"), marking(folder, "after_ends", "ends"),
            # of another handler, so that it shares no message
            task("also_after_ends", "site.watch", ("ends",), params={"folder": str(folder)}, retry_policy=NO_RETRY),
            marking(folder, "after_both", "ends", "goes_on"),
        )
    )  # fmt: skip
    site.until(lambda: starts(folder, "ends", "goes_on") == {"ends": 1, "goes_on": 1})
    return started


def finish_two(site: Site, folder: Path, started: str) -> None:
    """What was released during the outage runs, then the task that ran all the while ends."""
    site.until(lambda: site.task(started, "after_ends").status is SUCCESS)
    site.until(lambda: site.task(started, "also_after_ends").status is SUCCESS)
    assert site.task(started, "goes_on").status is TaskStatus.RUNNING
    (folder / "go-goes_on").touch()
    assert_once(site.engine.wait(started, 60), folder)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_postgres_restarted_in_the_midst_of_work_costs_no_task_a_second_run(
    own: Own, survivor: Site, tmp_path: Path, how: str
) -> None:
    started = start_two(survivor, tmp_path)
    before = survivor.log("worker").count("trying again")
    if how == "kill":
        # claims are committed asynchronously: one that the server forgets is made again
        with psycopg.connect(str(survivor.settings.database_url), autocommit=True) as connection:
            connection.execute("CHECKPOINT")
        own.kill(own.postgres)
    else:
        own.postgres.stop()
    (tmp_path / "go-ends").touch()
    survivor.until(lambda: survivor.log("worker").count("trying again") > before)
    own.services.start()
    survivor.until(lambda: answers(survivor))
    finish_two(survivor, tmp_path, started)


@pytest.fixture(scope="module")
def short_lease(own: Own) -> Iterator[tuple[Site, Proxy]]:
    """An installation with a lease that tests can wait for, and its worker's line to Postgres."""
    with own.site(lease=5.0) as site, proxied(str(site.settings.database_url)) as (line, url):
        with site.worker(concurrency=2, env={"PIPELINE_DATABASE_URL": url}):
            yield site, line


@pytest.mark.parametrize("how", ["blackhole", "frozen"])
def test_postgres_silent_for_longer_than_the_lease_costs_no_task_a_second_run(
    own: Own, short_lease: tuple[Site, Proxy], tmp_path: Path, how: str
) -> None:
    site, line = short_lease
    store = site.engine.installation.store
    started = start_two(site, tmp_path)
    silence_over = time.monotonic() + 1.5 * site.settings.lease
    if how == "blackhole":
        line.set("blackhole")
        (tmp_path / "go-ends").touch()
        site.until(lambda: store.live_workers(after=0) == 0 and time.monotonic() > silence_over)
        line.set("pass")
    else:
        with frozen(found(own.postgres)):
            (tmp_path / "go-ends").touch()
            site.until(lambda: time.monotonic() > silence_over)
    site.until(lambda: store.live_workers(after=0) == 2)
    finish_two(site, tmp_path, started)


def test_recovery_declares_nobody_lost_where_the_look_itself_took_the_outage(own: Own) -> None:
    with own.site() as site:
        store, now = site.engine.installation.store, [0.0]
        started = site.engine.execute_workflow(workflow(task("t")))
        worker_id = store.start_worker(name="cut off", pid=1, lease=60)
        assert store.claim(execution_id=started, task_id="t", epoch=0, worker_id=worker_id, handler="debug.noop")
        store.end_worker(worker_id)
        recovery = Recovery(
            store, site.engine.installation.dispatcher, waiting=lambda: 0, lease=6.0, clock=lambda: now[0]
        )
        now[0] = 7.0  # the first answer came late
        assert recovery.run_once() == Recovered()
        for now[0] in (9.0, 11.0, 13.0):
            assert recovery.run_once() == Recovered()
        now[0] = 13.1
        assert recovery.run_once().lost == 1


def test_recovery_that_looks_more_rarely_than_a_lease_lasts_still_declares_workers_lost(own: Own) -> None:
    with own.site() as site:
        store, now = site.engine.installation.store, [0.0]
        started = site.engine.execute_workflow(workflow(task("t")))
        worker_id = store.start_worker(name="gone", pid=1, lease=60)
        assert store.claim(execution_id=started, task_id="t", epoch=0, worker_id=worker_id, handler="debug.noop")
        recovery = Recovery(
            store, site.engine.installation.dispatcher, waiting=lambda: 0, lease=6.0, sweep=10.0, clock=lambda: now[0]
        )
        assert recovery.run_once() == Recovered()
        store.end_worker(worker_id)
        now[0] = 10.0
        assert recovery.run_once().lost == 1


@pytest.mark.parametrize("how", ["kill", "stop", "frozen"])
def test_redis_lost_while_tasks_run_loses_neither_them_nor_what_follows(
    own: Own, survivor: Site, tmp_path: Path, how: str
) -> None:
    started = start_two(survivor, tmp_path)

    def end_one() -> None:
        (tmp_path / "go-ends").touch()
        survivor.until(lambda: survivor.task(started, "ends").status is SUCCESS)

    if how == "frozen":
        with frozen(found(own.redis)):
            end_one()
    else:
        if how == "kill":
            own.kill(own.redis)
            shutil.rmtree(own.redis.folder / "appendonlydir")
        else:
            own.redis.stop()
        end_one()
        # Where the process goes on at once, it does so with the first of the two, which then needs no message.
        assert survivor.task(started, "also_after_ends").status is TaskStatus.PENDING
        own.services.start()
    finish_two(survivor, tmp_path, started)


def test_connection_to_redis_that_is_cut_again_and_again_runs_each_task_once(own: Own, tmp_path: Path) -> None:
    with own.site(lease=30.0, grace=1.0) as site, site.worker(concurrency=1, name="busy"):
        started = site.engine.execute_workflow(workflow(*watched(tmp_path, "runs")))
        site.until(lambda: starts(tmp_path, "runs") == {"runs": 1})
        second = [site.engine.execute_workflow(workflow(marking(tmp_path, f"t{n}"))) for n in range(5)]
        celery, waiting = site.engine.installation.celery, site.engine.installation.dispatcher.waiting
        for _ in range(3):
            site.until(lambda: waiting() >= 4)
            with celery.connection_for_read() as connection, connection.channel() as channel:
                assert channel.client.keys("unacked*") == [], "no copy of what a worker has fetched"
                channel.client.client_kill_filter(_type="normal", skipme=True)
        with site.worker(concurrency=1, name="idle"):
            done = {name: task for e in second for name, task in site.engine.wait(e, 60).tasks.items()}
            (tmp_path / "go-runs").touch()
            assert site.engine.wait(started, 60).status is ExecutionStatus.SUCCESS
            # the busy worker has messages still, and finds nothing to claim
            assert site.run(workflow(*(task(f"u{n}") for n in range(10)))).status is ExecutionStatus.SUCCESS
        assert {t.attempt for t in done.values()} == {1}
        assert starts(tmp_path) == dict.fromkeys(["runs", *done], 1)


def test_connection_to_rabbitmq_that_is_cut_again_and_again_runs_each_task_once(
    servers: Servers, sites: Callable[..., Site], tmp_path: Path
) -> None:
    if servers.name != "amqp":
        pytest.skip("needs RabbitMQ")
    with proxied(servers.broker_url) as (line, url):
        site = sites(lease=30.0, grace=1.0)
        with site.worker(concurrency=1, env={"PIPELINE_BROKER_URL": url}):
            started = site.engine.execute_workflow(
                workflow(
                    *watched(tmp_path, "runs"), *(marking(tmp_path, f"t{n}") for n in range(5)),
                    *(marking(tmp_path, f"u{n}", "runs", f"t{n}") for n in range(5)),
                )
            )  # fmt: skip
            site.until(lambda: starts(tmp_path, "runs") == {"runs": 1})
            for _ in range(3):
                site.until(lambda: line.connections > 0)
                line.cut()
            line.set("refuse")
            (tmp_path / "go-runs").touch()
            site.until(lambda: site.task(started, "runs").status is SUCCESS)
            line.set("pass")
            done = site.engine.wait(started, 60)
    assert_once(done, tmp_path)
    assert site.engine.installation.store.audit() == []


def test_frozen_worker_that_goes_on_after_its_lease_neither_records_nor_publishes(own: Own, tmp_path: Path) -> None:
    with own.site(lease=3.0) as site, site.worker(concurrency=2, name="frozen") as first:
        started = site.engine.execute_workflow(
            workflow(*watched(tmp_path, "returns", "goes_on"), marking(tmp_path, "next", "returns", "goes_on"))
        )
        site.until(lambda: starts(tmp_path, "returns", "goes_on") == {"returns": 1, "goes_on": 1})
        before = site.engine.get_execution(started).tasks
        os.killpg(first.pid, signal.SIGSTOP)
        try:
            with site.worker(concurrency=2, name="other"):
                site.until(lambda: starts(tmp_path, "returns", "goes_on") == {"returns": 2, "goes_on": 2})
                for name, found_ in site.engine.get_execution(started).tasks.items():
                    (tmp_path / f"go-{name}.{found_.epoch}").touch()
                done = site.engine.wait(started, 60)
                (tmp_path / f"go-returns.{before['returns'].epoch}").touch()
                os.killpg(first.pid, signal.SIGCONT)
                lost = tmp_path / f"lost-goes_on.{before['goes_on'].epoch}"
                site.until(lost.exists)
                said = rf"task returns of {started}( moved on without|: the task was given to another worker)"
                site.until(lambda: re.search(said, site.log("frozen")))
        finally:
            os.killpg(first.pid, signal.SIGCONT)
        assert lost.read_text() == "the task was given to another worker"
        assert done.status is ExecutionStatus.SUCCESS
        assert {t.worker.partition("@")[0] for t in done.tasks.values() if t.worker} == {"other"}
        assert site.engine.get_execution(started) == done
        assert starts(tmp_path) == {"returns": 2, "goes_on": 2, "next": 1}


def test_task_that_kills_its_process_each_time_disturbs_no_other_task_of_its_worker(prefork_site: Site, tmp_path: Path) -> None:
    site = prefork_site
    beside = site.engine.execute_workflow(workflow(*watched(tmp_path, "beside")))
    site.until(lambda: starts(tmp_path, "beside") == {"beside": 1})
    poison = site.run(workflow(task("poison", "site.die", params={"attempts": 99}), task("next", after=("poison",))))
    assert poison.status is ExecutionStatus.FAILED
    assert poison.error_message and "task poison failed: lost its worker 2 times" in poison.error_message
    assert "SIGKILL" in str(poison.tasks["poison"].error_message)
    assert poison.tasks["next"].status is TaskStatus.SKIPPED
    assert site.run(workflow(*(task(f"t{n}") for n in range(10)))).status is ExecutionStatus.SUCCESS
    assert site.task(beside, "beside").status is TaskStatus.RUNNING
    (tmp_path / "go-beside").touch()
    assert_once(site.engine.wait(beside, 60), tmp_path)
