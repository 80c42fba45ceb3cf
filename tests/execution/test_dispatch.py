"""What goes to the broker, what is recorded at submission, and what foreign messages can do."""

from __future__ import annotations

import json
import pickle
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import ValidationError
from severable_line import line

from pipeline.definition import TaskDefinition
from pipeline.errors import DefinitionConflict, IdempotencyConflict, InputError, WorkflowNotFound
from pipeline.result_store.rows import ReadyTask
from pipeline.states import ExecutionStatus
from tests.conftest import Servers, Site, task, workflow


def raw_messages(site: Site) -> list[bytes]:
    """Everything in the queue, as the broker holds it."""
    celery = site.engine.installation.celery
    with celery.connection_for_read() as connection, connection.channel() as channel:
        if site.settings.broker_url.startswith("redis"):
            found: list[bytes] = channel.client.lrange(site.settings.queue, 0, -1)
            return found
        queue = celery.amqp.queues[site.settings.queue].bind(channel)
        got: list[bytes] = []

        def drained() -> bool:  # a quorum queue shows a confirmed message a moment later
            while (message := queue.get(no_ack=True)) is not None:
                properties = {k: v for k, v in message.properties.items() if k != "application_headers"}
                got.append(message.body.encode() + json.dumps([message.headers, properties], default=str).encode())
            return bool(got)

        site.until(drained)
        return got


def test_execution_id_begins_with_the_day_of_its_creation_and_one_that_is_taken_is_not_taken_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = int(time.time() // 86_400)
    first = site.engine.execute_workflow(workflow(task("a")))
    assert re.fullmatch("exec-[0-9a-f]{12}", first)
    assert before <= int(first[5:9], 16) <= int(time.time() // 86_400)
    ends = iter([first[9:], first[9:], "00000000"])
    monkeypatch.setattr("pipeline.dispatch.secrets.token_hex", lambda size: next(ends))
    monkeypatch.setattr("pipeline.dispatch.time.time", lambda: int(first[5:9], 16) * 86_400.0)
    second = site.engine.execute_workflow(workflow(task("b")))
    assert second == first[:9] + "00000000"
    assert list(site.engine.get_execution(first).tasks) == ["a"]
    assert list(site.engine.get_execution(second).tasks) == ["b"]


def test_executions_enqueued_together_are_all_there_or_none_and_every_problem_is_told(site: Site) -> None:
    definition = workflow(task("a", "debug.echo", params={"n": "{{ input.n }}"}))
    with pytest.raises(InputError) as wrong:
        site.engine.execute_many(definition, [{"n": 1}, {}, {"n": 2}, {}])
    assert [(p.path, p.source) for p in wrong.value.problems] == [("inputs[1].n", ""), ("inputs[3].n", "")]
    with pytest.raises(InputError) as wrong:
        site.engine.execute_many(definition, [{}, 5, "n", {"n": 1}, None])  # type: ignore[list-item]
    assert [p.path for p in wrong.value.problems] == ["inputs[0].n", "inputs[1]", "inputs[2]", "inputs[4].n"]
    for inputs in ({"n": 1}, "n", 5, None):
        with pytest.raises(InputError, match=r"inputs: is a (dict|str|int|NoneType), not a list of mappings"):
            site.engine.execute_many(definition, inputs)  # type: ignore[arg-type]
    with pytest.raises(InputError) as wrong:
        site.engine.execute_many(definition, [{}] * 200)
    assert len(wrong.value.problems) == 51 and "not checked" in wrong.value.problems[-1].what
    for keys in ("ab", 5, {"a": 1, "b": 2}):
        with pytest.raises(InputError, match=r"idempotency_keys: is a (str|int|dict), not a list"):
            site.engine.execute_many(definition, [{"n": 1}, {"n": 2}], idempotency_keys=keys)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"idempotency_keys\[1\]: is a int, not text"):
        site.engine.execute_many(definition, [{"n": 1}, {"n": 2}], idempotency_keys=["a", 0])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"idempotency_keys\[1\]: 'a' repeats idempotency_keys\[0\], whose input differs"):
        site.engine.execute_many(definition, [{"n": 1}, {"n": True}], idempotency_keys=["a", "a"])
    with pytest.raises(InputError, match=r"idempotency_keys\[1\]: is empty"):
        site.engine.execute_many(definition, [{"n": 1}, {"n": 2}], idempotency_keys=["a", ""])
    with pytest.raises(InputError, match="connection: is a str, not a connection of psycopg 3"):
        site.engine.execute_many(definition, [{"n": 1}], connection="postgresql://")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="user_id: is a list, not text"):
        site.engine.execute_workflow(definition, {"n": 1}, ["u"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 keys for 2 inputs"):
        site.engine.execute_many(definition, [{"n": 1}, {"n": 2}], idempotency_keys=["a"])
    with pytest.raises(InputError, match=r"idempotency_keys\[1\]"):
        site.engine.execute_many(definition, [{"n": 1}, {"n": 2}], idempotency_keys=["a", "\0"])
    assert site.engine.list_executions() == []
    assert site.engine.execute_many(definition, []) == []
    assert len(site.engine.execute_many(definition, ({"n": n} for n in range(3)), idempotency_keys=iter("xyz"))) == 3
    for row in site.engine.list_executions():
        site.engine.cancel(row.execution_id)
    first, second = site.engine.execute_many(definition, [{"n": 1}, {"n": 2}], idempotency_keys=["a", None])
    with pytest.raises(IdempotencyConflict):
        site.engine.execute_many(definition, [{"n": 3}, {"n": 2}], idempotency_keys=[None, "a"])
    third, again = site.engine.execute_many(definition, [{"n": 3}, {"n": 1}], idempotency_keys=[None, "a"])
    assert (again, {row.execution_id for row in site.engine.list_executions("pending")}) == (first, {first, second, third})


def test_executions_enqueued_together_in_a_callers_transaction_exist_once_it_commits(site: Site) -> None:
    definition = workflow(task("a"))
    with psycopg.connect(site.settings.database_url or "") as connection:
        ids = site.engine.execute_many(definition, [{}, {}], connection=connection)
        connection.rollback()
        assert site.engine.list_executions() == []
        ids = site.engine.execute_many(definition, [{}, {}], connection=connection)
    assert {row.execution_id for row in site.engine.list_executions()} == set(ids)


def test_message_has_a_constant_size_whatever_the_workflow_and_its_input(site: Site) -> None:
    sizes = []
    for count, text in ((10, ""), (5_000, "x" * 100_000)):
        tasks = [task("t0"), *(task(f"t{n}", after=("t0",)) for n in range(1, count))]
        site.engine.execute_workflow(workflow(*tasks), {"text": text})
        (message,) = raw_messages(site)
        site.engine.installation.celery.control.purge()
        sizes.append(len(message))
    assert sizes[0] == sizes[1] < 1024


def test_message_of_the_longest_names_that_a_definition_may_hold_stays_under_a_kibibyte(site: Site) -> None:
    longest = ReadyTask(
        execution_id="exec-0123456789ab", task_id="t" * 64, epoch=2**31 - 1, handler="h" * 64, timeout=604_800.0
    )
    assert TaskDefinition(id=longest.task_id, handler=longest.handler)
    for names in ({"id": longest.task_id + "t"}, {"id": "t", "handler": longest.handler + "h"}):
        with pytest.raises(ValidationError):
            TaskDefinition.model_validate(names)

    site.engine.installation.dispatcher.publish([longest])

    (message,) = raw_messages(site)
    assert len(message) < 1024


def test_message_under_another_handlers_name_is_dropped_and_the_task_waits_for_its_own(site: Site) -> None:
    execution_id = site.engine.execute_workflow(workflow(task("t", "site.add", params={"a": 1})))
    site.engine.installation.celery.control.purge()
    forged = ReadyTask(execution_id=execution_id, task_id="t", epoch=0, handler="debug.echo", timeout=5.0)
    site.engine.installation.dispatcher.publish([forged])
    with site.worker(concurrency=1):
        execution = site.engine.wait(execution_id, 60)

    assert execution.status is ExecutionStatus.SUCCESS
    assert (execution.results["t"], execution.tasks["t"].attempt) == (2, 1)


def test_message_holds_only_what_celery_itself_writes_and_names_the_task_by_its_ids(site: Site) -> None:
    dispatcher = site.engine.installation.dispatcher
    ready = ReadyTask(execution_id="exec-0123456789ab", task_id="t", epoch=3, handler="debug.noop", timeout=5.0)
    body, headers, properties = dispatcher._message(ready, [])
    of_celery = dispatcher.celery.amqp.create_task_message("id", "debug.noop", ())
    assert headers.keys() <= of_celery.headers.keys()
    assert properties.keys() == of_celery.properties.keys()
    assert body == (("exec-0123456789ab", "t", 3), {}, {}), "of what canvas needs, nothing"
    assert (headers["id"], headers["task"], headers["ignore_result"]) == ("exec-0123456789ab_t", "debug.noop", True)
    assert headers["timelimit"] == [5.0 + 2 * site.settings.hard_limit, None]


def test_group_of_tasks_is_published_without_waiting_for_an_answer_between(servers: Servers, sites: Callable[..., Site]) -> None:
    if servers.broker_url.startswith("amqp"):
        pytest.skip("AMQP confirms each message")
    with line(servers.broker_url) as broker:
        site = sites(broker_url=broker.url)
        dispatcher, queue = site.engine.installation.dispatcher, site.settings.queue
        tasks = [
            ReadyTask(execution_id="exec-0123456789ab", task_id=f"t{n}", epoch=0, handler="debug.noop", timeout=5.0)
            for n in range(200)
        ]
        with site.engine.installation.celery.connection_for_read(servers.broker_url) as direct:
            server = direct.default_channel.client
            dispatcher.publish(tasks[:1])  # the first one declares the queue
            broker.answers.clear()
            publishing = threading.Thread(target=dispatcher.publish, args=(tasks,))
            publishing.start()
            site.until(lambda: server.llen(queue) == 201)
            assert publishing.is_alive(), "it waits for the one answer"
            broker.answers.set()
            publishing.join()


def test_idempotency_key_gives_the_same_execution_and_starts_it_once(prefork_site: Site, tmp_path: Path) -> None:
    definition = workflow(task("t", "site.leave_a_mark", params={"folder": str(tmp_path)}))
    ids = {prefork_site.engine.execute_workflow(definition, {"a": 1, "b": 2}, idempotency_key="k") for _ in range(3)}
    ids.add(prefork_site.engine.execute_workflow(definition, {"b": 2, "a": 1}, idempotency_key="k"))
    (execution_id,) = ids
    assert prefork_site.engine.wait(execution_id, 60).status is ExecutionStatus.SUCCESS
    assert prefork_site.engine.execute_workflow(definition, {"a": 1, "b": 2}, idempotency_key="k") == execution_id
    assert len(list(tmp_path.iterdir())) == 1
    other = prefork_site.engine.execute_workflow(workflow(task("t")), idempotency_key="k")
    assert other != execution_id, "keys belong to a workflow"
    assert prefork_site.engine.wait(other, 60).status is ExecutionStatus.SUCCESS


def test_idempotency_key_with_another_input_is_a_conflict_that_names_the_execution(site: Site) -> None:
    definition = workflow(task("t"))
    execution_id = site.engine.execute_workflow(definition, {"a": 1}, idempotency_key="k")
    with pytest.raises(IdempotencyConflict) as caught:
        site.engine.execute_workflow(definition, {"a": 2}, idempotency_key="k")
    assert (caught.value.key, caught.value.execution_id) == ("k", execution_id)
    assert len(site.engine.list_executions()) == 1


def test_idempotency_key_with_another_version_is_a_conflict(site: Site) -> None:
    definition = workflow(task("t"))
    site.engine.execute_workflow(definition, idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        site.engine.execute_workflow({**definition, "version": "2"}, idempotency_key="k")


def test_definition_with_the_same_version_and_other_content_is_a_conflict(site: Site) -> None:
    definition = workflow(task("t"))
    site.engine.execute_workflow(definition)
    with pytest.raises(DefinitionConflict, match="give the changed definition a new version"):
        site.engine.execute_workflow({**definition, "tasks": [task("u")]})
    assert site.engine.execute_workflow({**definition, "version": "2", "tasks": [task("u")]})


def test_registered_definition_runs_by_its_name(prefork_site: Site) -> None:
    first = prefork_site.engine.register(workflow(task("t", "site.add", params={"a": 1})))
    prefork_site.engine.register({**first.model_dump(exclude_defaults=True), "version": "2", "tasks": [task("u")]})
    assert prefork_site.run(first.id).tasks.keys() == {"u"}
    assert prefork_site.run(f"{first.id}@1").results == {"t": 2}
    with pytest.raises(WorkflowNotFound):
        prefork_site.engine.execute_workflow(f"{first.id}@3")


def test_input_that_does_not_fit_records_nothing(site: Site) -> None:
    schema = {"type": "object", "required": ["day"]}
    with pytest.raises(InputError, match="day"):
        site.engine.execute_workflow(workflow(task("t"), input_schema=schema), {})
    assert site.engine.list_executions() == []


def test_doubled_and_stale_messages_run_nothing(busy_site: Site, tmp_path: Path) -> None:
    definition = workflow(
        task("a", "site.leave_a_mark", params={"folder": str(tmp_path)}),
        task("b", "site.leave_a_mark", ("a",), params={"folder": str(tmp_path)}),
    )
    dispatcher = busy_site.engine.installation.dispatcher
    with psycopg.connect(busy_site.settings.database_url) as connection:
        started = busy_site.engine.execute_workflow(definition, connection=connection)
        connection.commit()
    messages = [
        ReadyTask(execution_id=started, task_id=name, epoch=epoch, handler="site.leave_a_mark", timeout=60.0)
        for name in ("b", "a") for epoch in (0, 0, 0, 1, 2)
    ]  # fmt: skip
    dispatcher.publish(messages)
    assert busy_site.engine.wait(started, 60).status is ExecutionStatus.SUCCESS
    dispatcher.publish(messages)
    busy_site.run(workflow(*(task(f"t{n}") for n in range(5))))
    busy_site.until(lambda: dispatcher.waiting() == 0)
    assert sorted(p.name.partition(".")[0] for p in tmp_path.iterdir()) == ["a", "b"]
    assert {t.attempt for t in busy_site.engine.get_execution(started).tasks.values()} == {1}


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_forged_messages_do_nothing_and_the_worker_goes_on(busy_site: Site, tmp_path: Path) -> None:
    done = busy_site.run(workflow(task("t", "site.leave_a_mark", params={"folder": str(tmp_path)})))
    celery, queue, real = busy_site.engine.installation.celery, busy_site.settings.queue, done.execution_id
    bodies: list[tuple[list[Any], dict[str, Any]]] = [
        ([], {}), ([real], {}), ([real, "t"], {}), ([real, "t", "0"], {}), ([real, "t", True], {}), ([real, "t", -1], {}),
        ([real, "t", 2**40], {}), ([real, "t", 1.5], {}), ([real, "t", None], {}), ([None, None, None], {}),
        ([real, "t", 0, "more"], {}), ([{"execution": real}, ["t"], 0], {}), ([real, "t\0", 0], {}), (["\0", "t", 0], {}),
        ([real, "\ud800", 0], {}), ([real, "t' OR true --", 0], {}), (["exec-ffffffffffff", "t", 0], {}),
        ([real, "t", 0, ["t"]], {}), ([real, "t", 0, [["t", 0]]], {}), ([real, "t", 0, ["t", True]], {}),
        ([real, "t", 0, ["t", 0, None, 0]], {}), ([real, "t", 0, ["t", 0, "unknown", 0]], {}),
        ([real, "t", 0, ["t", 0] * 5000], {}), ([real, "t", 0, ["t", 0], [], []], {}),
        ([real, "t", 0, [], [real, "t"]], {}), ([real, "t", 0, [], [real, "t", True]], {}), ([real, "t", 0, None, []], {}),
        ([real, "t", 0, [], [real, "t", 0, "exec-ffffffffffff", "t", 0, real, "unknown", 0]], {}),
        ([real, "t", 0, [], [real, "t", 0] * 5000], {}), ([real, "t", 0, [], [[real], "t", 0]], {}),
        ([real, "unknown", 0], {}), ([real, "t", 0], {"attempt": 7, "self": 1}), ([real * 10_000, "t", 0], {}),
    ]  # fmt: skip
    with celery.connection_for_write() as connection, connection.Producer() as producer:

        def send(body: Any, headers: dict[str, Any], **more: Any) -> None:
            producer.publish(body, routing_key=queue, exchange="", headers=headers, **more)

        for number, (args, kwargs) in enumerate(bodies):
            for name in ("site.leave_a_mark", "no.such.handler"):
                send([args, kwargs, {}], {"lang": "py", "task": name, "id": f"forged-{number}"}, serializer="json")
        good = {"lang": "py", "task": "site.leave_a_mark", "id": "x"}
        on_redis = busy_site.settings.broker_url.startswith("redis")  # AMQP has 64 bits, and no such numbers
        huge, infinite, none = (10**400, float("inf"), float("nan")) if on_redis else (10**18, 10**15, -(10**18))
        for headers in (
            {**good, "id": None}, {**good, "id": 5}, {**good, "timelimit": "soon"}, {**good, "eta": "soon"}, {},
            {**good, "timelimit": [huge, None]}, {**good, "timelimit": [-5, None]}, {**good, "timelimit": [True, None]},
            {**good, "timelimit": [none, None]}, {**good, "timelimit": [infinite, None]}, {**good, "timelimit": [0, 0]},
            {**good, "expires": "soon"}, {**good, "retries": "many"}, {**good, "group": [1]}, {**good, "task": ["a"]},
            {**good, "argsrepr": 5, "origin": 5, "parent_id": 5, "root_id": 5}, {"lang": "py", "task": "debug.noop"},
        ):  # fmt: skip
            send([["exec-ffffffffffff", "t", 0], {}, {}], headers, serializer="json")
            send({"no": "task"}, headers, serializer="json")
        send("not json", {"task": "debug.noop", "id": "x"}, content_type="application/json", content_encoding="utf-8")
        send(
            pickle.dumps(([Bomb(tmp_path / "bomb")], {}, {})), {"lang": "py", "task": "debug.noop", "id": "x"},
            content_type="application/x-python-serialize", content_encoding="binary",
        )  # fmt: skip
    for _ in range(3):
        assert busy_site.run(workflow(*(task(f"t{n}") for n in range(5)))).status is ExecutionStatus.SUCCESS
    busy_site.until(lambda: busy_site.engine.installation.dispatcher.waiting() == 0)
    assert len(list(tmp_path.iterdir())) == 1
    assert busy_site.engine.get_execution(real) == done


def test_submission_with_a_nul_character_is_refused_and_records_nothing(site: Site) -> None:
    with pytest.raises(InputError, match="idempotency_key: has a character that cannot be stored"):
        site.engine.execute_workflow(workflow(task("t")), user_id="ana", idempotency_key="k\0")

    assert site.engine.list_executions() == []
