"""DISPATCH: record an execution with all its tasks, then publish the tasks that are ready as one group.

Nothing is published before its commit, and nothing is lost where publishing fails: recovery publishes what is due.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from celery import Celery, Task
from celery.exceptions import Ignore
from kombu.entity import Queue
from kombu.exceptions import KombuError, OperationalError
from pydantic_core import to_jsonable_python

from pipeline.compiler import CompiledWorkflow, compile_workflow
from pipeline.definition import RetryPolicy, TaskDefinition, WorkflowDefinition
from pipeline.errors import BrokerUnavailable, IdempotencyConflict
from pipeline.result_store.rows import Created, NewExecution, ReadyTask
from pipeline.result_store.store import ResultStore

log = logging.getLogger(__name__)

#: headers of a Celery message that repeat what the store knows, or that only canvas and stamping use
_IDLE_HEADERS = ("stamps", "replaced_task_nesting")

#: bytes of a message for names and epochs of tasks, as the store's `share` counts them too; the rest of 1 KiB is what
#: Celery and kombu say in each, with a queue's name of up to 64 characters
_NAMES_BYTES = 330
#: tasks that a message may name beside its first: more than 1 KiB holds
_MOST_OTHERS = 120

#: bytes of inputs that one statement records
_MOST_BYTES = 8 * 2**20

_RETRIES = RetryPolicy()
#: seconds that a message waits which a worker at its end gives back
_MOMENT = 0.2


class Dispatcher:
    """Creates executions and publishes tasks.

    Args:
        store: where executions are recorded.
        celery: the app whose broker the messages go to.
        hard_limit: seconds after a task's timeout at which its attendant gives up; Celery kills after twice that.
    """

    def __init__(self, store: ResultStore, celery: Celery, *, hard_limit: float) -> None:
        self.store, self.celery, self.hard_limit = store, celery, hard_limit
        #: the last execution of ours that got a message of its own; empty: there was none
        self._leader = ""

    def register(self, definition: WorkflowDefinition, *, store: ResultStore | None = None) -> int:
        """Record a valid definition and what it compiles to; returns its key.

        Raises:
            DefinitionConflict: its id and version are registered with other content.
        """
        compiled = compile_workflow(definition)
        return (store or self.store).register(
            workflow_id=definition.id, version=definition.version, digest=definition.digest,
            definition=definition.to_json(), tasks=plan_tasks(definition, compiled),
            headers=[{"number": h.number, "tasks": h.tasks, "bodies": h.bodies, "slots": h.slots} for h in compiled.headers],
        )  # fmt: skip

    def create(
        self, definition: WorkflowDefinition, input_data: Mapping[str, Any], *, definition_id: int | None = None,
        user_id: str | None = None, idempotency_key: str | None = None, store: ResultStore | None = None,
    ) -> Created:  # fmt: skip
        """Record an execution, in the caller's transaction where `store` is within one; nothing is published.

        Raises:
            IdempotencyConflict: the key belongs to an execution with another definition or input.
            DefinitionConflict: the definition's id and version are registered with other content.
        """
        store = store or self.store
        if definition_id is None:
            definition_id = self.register(definition, store=store)
        new = partial(
            NewExecution, input_data=input_data, input_digest=_digest(input_data)[0], idempotency_key=idempotency_key
        )
        create = partial(
            store.create_executions, definition_id=definition_id, user_id=user_id, variables=definition.variables,
            timeout=definition.timeout, queue_timeout=definition.queue_timeout,
            leader=self._leader if store is self.store else None,
        )  # fmt: skip
        while not (made := create([new(execution_id=_fresh_id())])):  # another execution of this day has the id
            continue
        (created,) = made
        if not created.same_work:
            raise IdempotencyConflict(idempotency_key or "", created.execution_id)
        if store is self.store and created.ready:
            self._leader = created.execution_id
        return created

    def create_many(
        self, definition: WorkflowDefinition, inputs: Sequence[Mapping[str, Any]], *, definition_id: int | None = None,
        user_id: str | None = None, idempotency_keys: Sequence[str | None], store: ResultStore | None = None,
    ) -> list[Created]:  # fmt: skip
        """Record an execution for each input, all or none; as `create` else."""
        store = store or self.store
        found: dict[int, Created] = {}
        with store.link.transaction():
            if definition_id is None:
                definition_id = self.register(definition, store=store)
            # in the order of keys, so that two callers with the same ones wait for each other in one direction only
            in_order = sorted(range(len(inputs)), key=lambda n: idempotency_keys[n] or "")
            while missing := [n for n in in_order if n not in found]:
                work, size = list[NewExecution](), 0
                for n in missing:
                    digest, length = _digest(inputs[n])
                    if work and size + length > _MOST_BYTES:
                        break
                    size += length
                    work.append(
                        NewExecution(
                            execution_id=_fresh_id(), input_data=inputs[n], input_digest=digest,
                            idempotency_key=idempotency_keys[n],
                        )
                    )  # fmt: skip
                created = store.create_executions(
                    work, definition_id=definition_id, user_id=user_id, variables=definition.variables,
                    timeout=definition.timeout, queue_timeout=definition.queue_timeout,
                )  # fmt: skip
                found |= {missing[one.number - 1]: one for one in created}
            for n, one in found.items():
                if not one.same_work:
                    raise IdempotencyConflict(idempotency_keys[n] or "", one.execution_id)
        return [found[n] for n in range(len(inputs))]

    def publish(self, ready: Sequence[ReadyTask]) -> None:
        """Publish tasks as one group: on Redis in one round trip.

        Raises:
            BrokerUnavailable: some or none of the messages were taken; recovery publishes those that are missing.
        """
        if not ready:
            return
        queue = self._queue
        try:
            with self.celery.producer_or_acquire() as producer, producer.batch():
                producer.maybe_declare(queue)
                for task, others in _messages(ready):
                    body, headers, properties = self._message(task, others)
                    producer.publish(  # by the default exchange: on Redis any other costs a look-up for each message
                        body, routing_key=queue.name, exchange="",
                        serializer="json", headers=headers, delivery_mode=2, **properties,
                    )  # fmt: skip
        except self.broker_errors as exc:
            raise _unavailable(exc) from exc

    def try_publish(self, ready: Sequence[ReadyTask]) -> bool:
        """Publish where the broker is there; False, and a line in the log, where recovery has to do it."""
        try:
            self.publish(ready)
        except BrokerUnavailable as exc:
            log.warning("%s; recovery publishes %d %s once it is back", exc, len(ready), "task" if len(ready) == 1 else "tasks")
            return False
        return True

    def give_back(self, execution_id: str, task_id: str, epoch: int, task: Task) -> None:
        """Publish a message again that came to a worker which is about to end, after a moment for it to do so."""
        hard_limit, _ = task.request.timelimit or (None, None)
        timeout = max(0.0, (hard_limit or 0.0) - 2 * self.hard_limit)
        time.sleep(_MOMENT)
        self.try_publish([
            ReadyTask(execution_id=execution_id, task_id=task_id, epoch=epoch, handler=task.name, timeout=timeout)
        ])  # fmt: skip

    def waiting(self) -> int:
        """How many messages the broker holds that no worker has taken yet.

        Raises:
            BrokerUnavailable: it cannot be asked.
        """
        try:
            with self.celery.connection_or_acquire() as connection:
                return int(self._queue.bind(connection.default_channel).queue_declare().message_count)
        except self.broker_errors as exc:
            raise _unavailable(exc) from exc

    def ask_workers(
        self, nodes: Sequence[str] | None = None, *, timeout: float, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """The workers of this installation that answer within `timeout` seconds; returns once all of `nodes` did.

        Raises:
            BrokerUnavailable: they cannot be asked.
        """
        try:
            return list(self.celery.control.ping(nodes, timeout=timeout, **({} if limit is None else {"limit": limit})))
        except self.broker_errors as exc:
            raise _unavailable(exc) from exc

    @property
    def _queue(self) -> Queue:
        queue: Queue = self.celery.amqp.queues[self.celery.conf.task_default_queue]
        return queue

    @cached_property
    def broker_errors(self) -> tuple[type[BaseException], ...]:
        """What is raised where the broker cannot be reached."""
        transport = self.celery.connection_for_write()
        return (OperationalError, KombuError, OSError, *transport.connection_errors, *transport.channel_errors)

    def _message(self, task: ReadyTask, others: Sequence[ReadyTask]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """A Celery message of less than 1 KiB, also for the longest names, whatever the workflow's size."""
        args: tuple[Any, ...] = (task.execution_id, task.task_id, task.epoch)
        if others:
            beside = [other for other in others if other.execution_id == task.execution_id]
            args = (*args, [value for other in beside for value in (other.task_id, other.epoch)])
            if elsewhere := [other for other in others if other.execution_id != task.execution_id]:
                args = (*args, [v for other in elsewhere for v in (other.execution_id, other.task_id, other.epoch)])
        timeout = max(t.timeout for t in (task, *others))
        headers, properties, body, _ = self.celery.amqp.create_task_message(
            f"{task.execution_id}_{task.task_id}", task.handler, args,
            argsrepr=f"epoch {task.epoch}", kwargsrepr="", ignore_result=True,  # the id says the rest
            time_limit=timeout + 2 * self.hard_limit, root_id=task.execution_id, origin="pipeline",
        )  # fmt: skip
        body = (*body[:2], {})  # what canvas needs: four times nothing
        said = {k: v for k, v in headers.items() if v is not None and k not in _IDLE_HEADERS}
        return body, said, properties


def _digest(input_data: Mapping[str, Any]) -> tuple[str, int]:
    """Of the canonical JSON: its digest and its length in bytes."""
    text = json.dumps(input_data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return hashlib.sha256(text).hexdigest(), len(text)


def _fresh_id() -> str:
    """`exec-`, the day since 1970 in four hexadecimal digits, and eight random ones: the store keeps a day's together."""
    return f"exec-{int(time.time() // 86_400):04x}{secrets.token_hex(4)}"


def _unavailable(exc: BaseException) -> BrokerUnavailable:
    return BrokerUnavailable(f"the broker cannot be reached: {exc.__cause__ or exc}; look at PIPELINE_BROKER_URL")


def plan_tasks(definition: WorkflowDefinition, compiled: CompiledWorkflow) -> list[dict[str, Any]]:
    """What the store keeps of each task of a compiled workflow; what is empty, or says the same again, is left out."""
    return [_plan_of(definition.by_id[task_id], number, compiled) for number, task_id in enumerate(compiled.order)]


def _plan_of(task: TaskDefinition, number: int, compiled: CompiledWorkflow) -> dict[str, Any]:
    plan: dict[str, Any] = {"task_id": task.id, "number": number, "handler": task.handler, "timeout": task.timeout}
    if task.dependencies:
        plan["dependencies"] = task.dependencies
    if (waits_for := compiled.dependencies[task.id]) != task.dependencies:
        plan["waits_for"] = waits_for
    if task.id in compiled.releases:
        plan["releases"] = compiled.releases[task.id]
    if task.id in compiled.memberships:
        plan["headers"] = compiled.memberships[task.id]
    if task.id in compiled.slots:
        plan["slots"] = compiled.slots[task.id]
    if task.params:
        text = json.dumps(to_jsonable_python(task.params, inf_nan_mode="constants"), sort_keys=True)
        plan["params"] = json.loads(text)  # in the order of the canonical JSON
    if task.retry_policy != _RETRIES:
        plan["retry_policy"] = task.retry_policy.model_dump(mode="json", exclude_defaults=True)
    return plan


@dataclass(frozen=True, kw_only=True)
class Message:
    """What a message says: these tasks may be ready."""

    execution_id: str
    task_id: str
    epoch: int
    #: further tasks with the same handler: execution, id and epoch of each
    others: tuple[tuple[str, str, int], ...] = ()


def read_message(args: tuple[Any, ...]) -> Message:
    """A message's arguments.

    Raises:
        Ignore: it is not one of ours.
    """
    match tuple(args):
        case (str(execution_id), str(task_id), int(epoch), *rest) if len(rest) < 3:
            beside, elsewhere = (*rest, [], [])[:2]
            if _is_flat(beside, 2) and _is_flat(elsewhere, 3):
                others = (
                    *((execution_id, *pair) for pair in zip(beside[::2], beside[1::2], strict=True)),
                    *zip(elsewhere[::3], elsewhere[1::3], elsewhere[2::3], strict=True),
                )
                named = ((execution_id, task_id, epoch), *others)
                if all(_is_name(of) and _is_name(task) and _is_epoch(number) for of, task, number in named):
                    return Message(execution_id=execution_id, task_id=task_id, epoch=epoch, others=others)
    raise Ignore


def _is_flat(values: Any, each: int) -> bool:
    return isinstance(values, list) and len(values) % each == 0 and len(values) <= each * _MOST_OTHERS


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and "\0" not in value


def _is_epoch(value: Any) -> bool:
    return isinstance(value, int) and value is not True and value is not False and 0 <= value < 2**31 - 1


def _messages(ready: Iterable[ReadyTask]) -> Iterator[tuple[ReadyTask, Sequence[ReadyTask]]]:
    """Tasks that share a message, the first of them apart. The store allows for size; epochs of three digits may not fit."""
    by_leader: dict[tuple[str, str], list[ReadyTask]] = {}
    for task in ready:
        by_leader.setdefault((task.led_in or task.execution_id, task.led_by or task.task_id), []).append(task)
    for tasks in by_leader.values():
        first, others, room = tasks[0], list[ReadyTask](), _room(tasks[0])
        for task in tasks[1:]:
            room -= len(f'"{task.task_id}", {task.epoch}, ')
            if task.execution_id != first.execution_id:
                room -= len(f'"{task.execution_id}", ')
            if room < 0:
                yield first, others
                first, others, room = task, [], _room(task)
            else:
                others.append(task)
        yield first, others


def _room(first: ReadyTask) -> float:
    """Bytes that a message has for others, before base64 makes four of three; its first task's id stands there often."""
    return (_NAMES_BYTES - 3.5 * len(first.task_id) - len(first.handler)) * 0.74
