"""Tasks that run in a row: without messages of their own, and without holding each other up."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from severable_line import line

from pipeline.events import Reporter
from pipeline.result_store.connection import Database
from pipeline.states import ExecutionStatus, TaskStatus
from tests.conftest import NO_RETRY, SOON, Servers, Site, task, workflow

WIDTH = 60


def received(site: Site, execution_id: str, worker: str = "worker") -> int:
    """How many messages of an execution a worker has taken."""
    return sum(execution_id in line and line.endswith(" received") for line in site.log(worker).splitlines())


def chain(length: int) -> dict[str, Any]:
    return workflow(*(task(f"t{n}", after=(f"t{n - 1}",) if n else ()) for n in range(length)))


def waiting(folder: Path, count: int) -> dict[str, Any]:
    """Tasks of which the first waits for a file and the others find theirs."""
    (folder / "there").touch()
    return workflow(*(
        task(f"t{n}", "site.wait_for_file", params={"path": str(folder / ("there" if n else "late"))}) for n in range(count)
    ))  # fmt: skip


def test_chain_of_quick_tasks_goes_on_in_one_process_without_a_message_for_each(sites: Callable[..., Site]) -> None:
    site = sites()
    with site.worker(concurrency=1):
        done = site.run(chain(40))
    assert (done.status, {t.attempt for t in done.tasks.values()}) == (ExecutionStatus.SUCCESS, {1})
    assert 1 <= received(site, done.execution_id) < 20
    ends = [done.tasks[f"t{n}"] for n in range(40)]
    assert all(a.finished_at <= b.started_at for a, b in pairwise(ends))  # type: ignore[operator]


def test_wide_tasks_share_messages_and_each_is_recorded_with_its_own_attempt(sites: Callable[..., Site]) -> None:
    site = sites()
    wide = [task(f"t{n}", "debug.echo", params={"n": n}) for n in range(WIDTH)]
    definition = site.engine.register(workflow(*wide, task("join", after=tuple(t["id"] for t in wide))))
    started = [site.engine.execute_workflow(definition)]
    assert 1 <= site.engine.installation.dispatcher.waiting() < WIDTH / 2

    def shared() -> bool:
        """In a run in which few tasks were given away, as a slow machine does."""
        done = site.engine.wait(started.pop() if started else site.engine.execute_workflow(definition), 60)
        assert done.status is ExecutionStatus.SUCCESS
        assert {n: done.results[f"t{n}"] for n in range(WIDTH)} == {n: {"n": n} for n in range(WIDTH)}
        assert {t.attempt for t in done.tasks.values()} == {1}
        return 1 <= received(site, done.execution_id) < WIDTH / 2

    with site.worker(concurrency=2):
        site.until(shared)


def test_executions_enqueued_together_share_messages_and_each_runs_with_its_own_input(sites: Callable[..., Site]) -> None:
    site = sites()
    fan = [task(f"m{n}", "debug.echo", ("first",), params={"n": n}) for n in range(3)]
    definition = workflow(task("first", "debug.echo"), *fan, task("last", "debug.echo", tuple(t["id"] for t in fan)))
    days = [{"day": day} for day in range(30)]
    enqueued = [site.engine.execute_many(definition, days, "ana")]
    assert 1 <= site.engine.installation.dispatcher.waiting() <= 15

    def shared() -> bool:
        """In a run in which few tasks were given away, as a slow machine does."""
        ids = enqueued.pop() if enqueued else site.engine.execute_many(definition, days, "ana")
        done = [site.engine.wait(execution_id, 60) for execution_id in ids]
        assert [x.status for x in done] == [ExecutionStatus.SUCCESS] * 30
        for day, x in enumerate(done):
            assert {t.attempt for t in x.tasks.values()} == {1}
            assert (x.created_by, x.results["first"], x.results["m2"]["day"]) == ("ana", {"day": day}, day)
        return sum(received(site, execution_id) for execution_id in ids) <= 15

    with site.worker(concurrency=1):
        site.until(shared)


def is_quick(site: Site, handler: str) -> bool:
    """Whether a worker has told others that a handler is quick."""
    link = site.engine.installation.store.link
    assert isinstance(link, Database)
    with link.connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pipeline.workers WHERE %s = ANY (quick) AND expires_at > now()", [handler])
        return cursor.fetchone() is not None


def until_quick(site: Site, handler: str) -> None:
    """Run a handler until it is known to be quick."""
    site.until(lambda: site.run(workflow(task("t", handler))) and is_quick(site, handler))


def test_executions_enqueued_one_by_one_while_workers_are_busy_share_messages_and_each_runs_with_its_own_input(
    sites: Callable[..., Site], tmp_path: Path
) -> None:  # fmt: skip
    site = sites()
    definition = site.engine.register(workflow(task("first", "debug.echo"), task("last", "debug.echo", ("first",))))
    days = [{"day": day} for day in range(24)]
    tries = count()

    def shared() -> bool:
        """In a run in which few tasks were given away, as a slow machine does."""
        folder = tmp_path / str(next(tries))
        folder.mkdir()
        until_quick(site, "debug.echo")
        busy = site.engine.execute_workflow(waiting(folder, 1))
        site.until_running(busy, "t0")
        ids = [site.engine.execute_workflow(definition, day) for day in days]
        assert 1 <= site.engine.installation.dispatcher.waiting() <= 12
        (folder / "late").touch()
        done = [site.engine.wait(execution_id, 60) for execution_id in ids]
        assert [(x.status, x.results["first"]) for x in done] == [(ExecutionStatus.SUCCESS, day) for day in days]
        assert {t.attempt for x in done for t in x.tasks.values()} == {1}
        return sum(received(site, execution_id) for execution_id in ids) <= 12

    with site.worker(concurrency=1):
        site.until(shared)


def test_execution_whose_message_others_joined_is_cancelled_and_the_others_run_without_recovery(
    sites: Callable[..., Site], tmp_path: Path
) -> None:  # fmt: skip
    site = sites(grace=600.0)
    with site.worker(concurrency=1):
        until_quick(site, "debug.echo")
        busy = site.engine.execute_workflow(waiting(tmp_path, 1))
        site.until_running(busy, "t0")
        definition = site.engine.register(workflow(task("t", "debug.echo")))
        before = [site.engine.execute_workflow(definition) for _ in range(2)]
        first, *others = (site.engine.execute_workflow(definition) for _ in range(3))
        fetched = int(site.settings.broker_url.startswith("amqp"))
        site.until(lambda: site.engine.installation.dispatcher.waiting() == len([*before, first]) - fetched)
        site.engine.cancel(first)
        (tmp_path / "late").touch()
        assert {site.engine.wait(execution_id, 60).status for execution_id in others} == {ExecutionStatus.SUCCESS}
    assert site.engine.get_execution(first).status is ExecutionStatus.CANCELLED
    assert sum(received(site, execution_id) for execution_id in others) == 0


def test_executions_that_joined_the_message_of_one_that_takes_long_are_run_by_another_worker_without_recovery(
    sites: Callable[..., Site], tmp_path: Path
) -> None:  # fmt: skip
    site = sites(grace=600.0)
    (tmp_path / "there").touch()
    with site.worker(concurrency=1), site.worker(concurrency=1, name="other"):
        quick = site.engine.register(workflow(task("t", "site.wait_for_file")))
        there, late = ({"path": str(tmp_path / name)} for name in ("there", "late"))
        site.until(lambda: site.engine.wait(site.engine.execute_workflow(quick, there), 60) and is_quick(site, "site.wait_for_file"))
        busy: list[str] = []

        def both_are_busy() -> bool:
            """A worker may have fetched several: so until each has one."""
            busy.append(site.engine.execute_workflow(workflow(task("t", "site.watch", params={"folder": str(tmp_path)}))))
            return sum(site.task(one, "t").status is TaskStatus.RUNNING for one in busy) == 2

        site.until(both_are_busy)
        fill = [site.engine.execute_workflow(quick, there) for _ in range(4)]
        first, *joined = (site.engine.execute_workflow(quick, each) for each in (late, there, there, there))
        (tmp_path / "go-t").touch()
        # RabbitMQ may have handed one of them to the worker that is busy, as any message
        free = len(joined) - site.settings.broker_url.startswith("amqp")
        site.until(lambda: sum(site.task(one, "t").status is TaskStatus.SUCCESS for one in joined) >= free)
        assert site.task(first, "t").status is TaskStatus.RUNNING
        (tmp_path / "late").touch()
        ended = {site.engine.wait(one, 60).status for one in (*busy, *fill, first, *joined)}
    assert ended == {ExecutionStatus.SUCCESS}


def test_tasks_behind_one_of_another_execution_that_takes_long_are_run_by_another_worker(
    sites: Callable[..., Site], tmp_path: Path
) -> None:
    site = sites(grace=1.0)
    (tmp_path / "there").touch()
    definition = workflow(task("t", "site.wait_for_file", params={"path": "{{ input.path }}"}))
    paths = [str(tmp_path / ("there" if n else "late")) for n in range(6)]
    with site.worker(concurrency=1):
        late, *others = site.engine.execute_many(definition, [{"path": path} for path in paths])
        site.until_running(late, "t")
        assert [received(site, execution_id) for execution_id in (late, *others)] == [1, 0, 0, 0, 0, 0]
        with site.worker(concurrency=1, name="second"):
            for execution_id in others:
                assert site.engine.wait(execution_id, 60).status is ExecutionStatus.SUCCESS
            assert site.task(late, "t").status is TaskStatus.RUNNING
            (tmp_path / "late").touch()
            assert site.engine.wait(late, 60).tasks["t"].attempt == 1


def test_process_killed_amid_executions_that_share_messages_leaves_them_to_recovery(sites: Callable[..., Site]) -> None:
    site = sites(grace=1.0)
    definition = workflow(task("a", "debug.echo"), task("b", "site.die", ("a",), params={"attempts": 1}, timeout=30))
    ids = site.engine.execute_many(definition, [{}] * 4)
    with site.worker(concurrency=1):
        done = [site.engine.wait(execution_id, 60) for execution_id in ids]
    assert [(x.status, x.tasks["a"].attempt, x.tasks["b"].losses) for x in done] == [(ExecutionStatus.SUCCESS, 1, 1)] * 4


def test_process_killed_with_executions_left_open_leaves_their_end_to_recovery(sites: Callable[..., Site]) -> None:
    site = sites(grace=2.0)
    ids = site.engine.execute_many(workflow(task("t", "site.die", timeout=30)), [{"attempts": n} for n in (0, 0, 1)])
    with site.worker(concurrency=1):
        *left, last = [site.engine.wait(execution_id, 60) for execution_id in ids]
    assert {x.status for x in (*left, last)} == {ExecutionStatus.SUCCESS}
    assert [(x.tasks["t"].attempt, x.tasks["t"].losses) for x in (*left, last)] == [(1, 0), (1, 0), (2, 1)]
    for x in left:
        assert x.finished_at - x.tasks["t"].finished_at >= timedelta(seconds=0.5)  # type: ignore[operator]


def test_tasks_behind_one_that_takes_long_are_run_by_another_worker(sites: Callable[..., Site], tmp_path: Path) -> None:
    site = sites(grace=1.0)  # a worker may have fetched the message of one task before the other was there
    with site.worker(concurrency=1):
        started = site.engine.execute_workflow(waiting(tmp_path, 6))
        site.until_running(started, "t0")
        assert received(site, started) == 1
        with site.worker(concurrency=1, name="second"):
            site.until(lambda: all(site.task(started, f"t{n}").status is TaskStatus.SUCCESS for n in range(1, 6)))
            assert site.task(started, "t0").status is TaskStatus.RUNNING
            (tmp_path / "late").touch()
            done = site.engine.wait(started, 60)
    assert {t.attempt for t in done.tasks.values()} == {1}


def test_task_with_a_longer_timeout_than_its_predecessors_gets_the_time_that_it_asks_for(sites: Callable[..., Site]) -> None:
    site = sites(hard_limit=1.0)
    with site.worker(concurrency=1):
        done = site.run(workflow(
            task("a", "debug.sleep", params={"seconds": 0}, timeout=1),
            task("short", "debug.sleep", ("a",), params={"seconds": 0}, timeout=1, retry_policy=NO_RETRY),
            task("long", "debug.sleep", ("a",), params={"seconds": 5}, timeout=60, retry_policy=NO_RETRY),
        ))  # fmt: skip
    assert done.status is ExecutionStatus.SUCCESS, done.error_message


def test_process_killed_in_a_turn_leaves_the_rest_of_it_to_recovery(sites: Callable[..., Site], tmp_path: Path) -> None:
    site = sites(grace=1.0)
    (tmp_path / "there").touch()
    with site.worker(concurrency=1):
        definition = workflow(*(task(f"t{n}", "site.die", params={"attempts": 1}, timeout=30) for n in range(5)))
        done = site.run(definition)
    assert (done.status, {t.losses for t in done.tasks.values()}) == (ExecutionStatus.SUCCESS, {1})


def test_handler_that_runs_long_gets_a_message_for_each_task(sites: Callable[..., Site]) -> None:
    site = sites()
    link = site.engine.installation.store.link

    def slow() -> bool:
        assert isinstance(link, Database)
        with link.connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pipeline.workers WHERE 'debug.sleep' = ANY (slow) AND expires_at > now()")
            return cursor.fetchone() is not None

    with site.worker(concurrency=1):
        site.run(workflow(task("t", "debug.sleep", params={"seconds": 0.2})))
        site.until(slow)
        done = site.run(workflow(*(task(f"t{n}", "debug.sleep", params={"seconds": 0}) for n in range(10))))
        assert received(site, done.execution_id) == 10
        site.until(lambda: not slow())


def test_worker_that_is_told_to_end_starts_nothing_more_of_its_turn(sites: Callable[..., Site], tmp_path: Path) -> None:
    site = sites(grace=600.0)
    with site.worker(concurrency=1) as process:
        started = site.engine.execute_workflow(waiting(tmp_path, 4))
        site.until_running(started, "t0")
        (child,) = [p for p in psutil.Process(process.pid).children() if "scheduler" not in p.cmdline()]
        child.suspend()  # so that it sees the file and the worker's end together
        (tmp_path / "late").touch()
        process.send_signal(signal.SIGTERM)
        site.until(lambda: "Warm shutdown" in site.log("worker"))
        child.resume()
        process.wait(60)
    found = site.engine.get_execution(started).tasks
    assert (found["t0"].status, found["t0"].attempt) == (TaskStatus.SUCCESS, 1)
    assert {(found[f"t{n}"].status, found[f"t{n}"].attempt) for n in range(1, 4)} == {(TaskStatus.PENDING, 0)}
    with site.worker(concurrency=1, name="next"):
        assert site.engine.wait(started, 60).status is ExecutionStatus.SUCCESS


@contextmanager
def events(site: Site) -> Iterator[list[dict[str, Any]]]:
    """What whoever watches the workers is told."""
    celery, heard = site.engine.installation.celery, list[dict[str, Any]]()
    with celery.connection_for_read() as connection:
        receiver = celery.events.Receiver(connection, handlers={"*": heard.append})

        # one capture for all: a second one would subscribe anew, and what comes before that is lost
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
        thread.start()
        try:
            yield heard
        finally:
            receiver.should_stop = True
            thread.join()


def test_event_that_cannot_be_sent_ends_nothing_and_is_followed_by_silence(
    servers: Servers, sites: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    with line(servers.broker_url) as broker:
        dispatcher = sites(broker_url=broker.url).engine.installation.dispatcher
        reporter = Reporter(dispatcher.celery, dispatcher.broker_errors)
        reporter.heed(SimpleNamespace(enabled=True, groups=None))
        broker.cut()
        for n in range(3):
            reporter.started(f"exec-0_{n}", "debug.noop", {})
    assert [r.message.partition(":")[0] for r in caplog.records if r.name == "pipeline.events"] == ["no events for 10 s"]


def test_every_task_of_a_turn_has_its_events_once_while_somebody_watches(sites: Callable[..., Site]) -> None:
    site = sites()
    definition = workflow(
        *(task(f"t{n}") for n in range(20)), task("after", after=("t3",)),
        task("again", "site.fail_until", after=("after",), params={"attempt": 2}, retry_policy=SOON),
        task("fails", "debug.fail", after=("again", *(f"t{n}" for n in range(20))), params={"message": "x"},
             retry_policy=NO_RETRY),
    )  # fmt: skip
    with site.worker(concurrency=2), events(site) as heard:

        def watched() -> bool:
            """A worker hears only some time after its start that somebody watches."""
            site.engine.installation.celery.control.enable_events()
            site.run(chain(2))
            return any(event["type"] == "task-succeeded" for event in heard)

        success = {"task-received": 1, "task-started": 1, "task-succeeded": 1}
        wanted = {t.id: success for t in site.engine.register(definition).tasks}
        wanted["again"] = {"task-received": 2, "task-started": 2, "task-succeeded": 1, "task-retried": 1}
        wanted["fails"] = {"task-received": 1, "task-started": 1, "task-failed": 1}

        def told(execution_id: str) -> dict[str, Counter[str]]:
            kinds: dict[str, Counter[str]] = {}
            for event in list(heard):
                if str(event.get("uuid", "")).startswith(execution_id):
                    kinds.setdefault(event["uuid"].partition("_")[2], Counter())[event["type"]] += 1
            return kinds

        def ends(kinds: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
            begins = ("task-received", "task-started")
            return {t: {kind: n for kind, n in each.items() if kind not in begins} for t, each in kinds.items()}

        def once() -> bool:
            """In a run in which no task was given away meanwhile: its own message would be told as received too."""
            done = site.run(definition)
            assert done.status is ExecutionStatus.FAILED
            site.until(lambda: ends(told(done.execution_id)) == ends(wanted), 20)
            with suppress(pytest.fail.Exception):
                site.until(lambda: told(done.execution_id) == wanted, 2)
                return True
            return False

        site.until(watched)
        site.until(once)
