"""EXECUTE, several tasks in a row: what one message brings, and what each success releases, in one thread.

A message may name more tasks than one; and who completes a task claims the next in the same round trip. Both are only
short cuts: a task is claimed, run and recorded as if it had come alone. A turn lasts a moment. What it has not come to
soon gets messages of its own, so that slow tasks hold nothing up that another worker could run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from celery.app.task import Context
from celery.exceptions import Ignore

from pipeline.attendant import Attendant
from pipeline.dispatch import Dispatcher, Message, read_message
from pipeline.errors import DatabaseUnavailable
from pipeline.events import Reporter
from pipeline.result_store.rows import NOTHING, Claim, Ended, Follow, ReadyTask

log = logging.getLogger(__name__)

#: seconds that tasks wait behind a running one before they get messages of their own
_PATIENCE = 0.05
#: seconds after which a turn takes nothing on; less than Celery's time limit leaves beyond a timeout
_LONGEST = 0.5


@dataclass(frozen=True, kw_only=True)
class Step:
    """One task of a turn, as a message of its own would have named it."""

    execution_id: str
    task_id: str
    epoch: int
    handler: str


class Turn:
    """The tasks that one thread runs one after another.

    Args:
        handler: of the tasks that the message names.
        message: names them; the first runs at once.
        room: longest timeout in seconds that the message's time limit covers.
        scatter: gives tasks of an execution messages of their own; called from any thread.
        close: ends executions of which every task has succeeded; called from any thread.
    """

    def __init__(
        self, *, handler: str, message: Message, room: float, scatter: Callable[[str, dict[str, int]], None],
        close: Callable[[Sequence[str]], None],
    ) -> None:  # fmt: skip
        self._room, self._scatter, self._close = room, scatter, close
        named = ((message.execution_id, message.task_id, message.epoch), *message.others)
        self._waiting = deque(
            Step(execution_id=execution, task_id=task, epoch=epoch, handler=handler) for execution, task, epoch in named
        )
        #: the task that runs now
        self.step = self._waiting.popleft()
        self._began = time.monotonic()
        self._ends = self._began + _LONGEST
        self._claim: Claim | None = None
        #: what was released by a success that may not be on disk yet
        self._unsure: set[Step] = set()
        #: executions that came to their end and share the wait for the disk, and when the first of them did
        self._closing: tuple[str, ...] = ()
        self._ended = 0.0
        #: set where nothing more is to run in it
        self.over = False

    def claim_of(self, message: Message) -> Claim | None:
        """The claim of a task where it was made together with the end of the one before."""
        claim = self._claim
        if claim is None or (claim.execution_id, claim.task_id, claim.epoch - 1) != (
            message.execution_id, message.task_id, message.epoch,
        ):  # fmt: skip
            return None
        self._claim = None
        return claim

    def lead(self, executions: Iterable[str], first: Step | None = None) -> None:
        """Take on the tasks of other executions that share a message, the present one's or `first`'s, and are not named there."""
        step = first or self.step
        self._waiting.extend(replace(step, execution_id=execution_id, epoch=0) for execution_id in executions)

    def follow(self, known: Container[str] = ()) -> Follow:
        """What may be claimed together with the end of the present task; `known`: executions whose state is at hand."""
        closing, now = self._closing, time.monotonic()
        if self.over or now > self._ends:
            return replace(NOTHING, closing=closing)
        long_ago = bool(closing) and now > self._ended + _PATIENCE
        try:
            step = self._waiting[0]
        except IndexError:
            return Follow(room=self._room, closing=closing, durable=long_ago)
        return Follow(
            room=self._room, execution_id=step.execution_id, task_id=step.task_id, epoch=step.epoch, handler=step.handler,
            durable=long_ago or step in self._unsure, with_state=step.execution_id not in known, closing=closing,
        )  # fmt: skip

    def go_on(self, ended: Ended) -> tuple[ReadyTask, ...]:
        """Take what was claimed, those that share its message, and what is to be kept; returns what is to be published."""
        self._claim, self._began = ended.next, time.monotonic()
        if ended.durable and ended.outcome == "done":  # what is stale wrote nothing, and waited for nothing
            self._unsure.clear()
        if ended.closing is not None:
            self._ended = self._ended if self._closing else self._began
            self._closing = tuple(ended.closing)
        claim = self._claim
        if claim is None:
            return ended.ready
        step = _step_of(claim)
        with suppress(ValueError, IndexError):  # given away meanwhile
            self._waiting.remove(step)
        self.lead(claim.leads or (), step)
        left, kept = list[ReadyTask](), list[Step]()
        for r in ended.ready:
            if ended.kept or (r.execution_id, r.led_by) == (claim.execution_id, claim.task_id):
                kept.append(Step(execution_id=r.execution_id, task_id=r.task_id, epoch=r.epoch, handler=r.handler))
            else:
                left.append(r)
        if ended.kept:
            self._unsure.update(() if ended.durable else kept)
            self._waiting.extend(kept)
        else:
            self._waiting.extendleft(reversed(kept))  # an execution that has begun goes before others
        return tuple(left)

    def next(self) -> Step | None:
        """The task to run now; None: the turn is over, and what still waited was given away."""
        self._began = time.monotonic()
        if self._claim is not None:
            self.step = _step_of(self._claim)
            return self.step
        step: Step | None = None
        with suppress(IndexError):
            step = self._waiting.popleft()  # first of all: who looks after it may give it away at any moment
        if step is None or self.over or self._began > self._ends or step in self._unsure:
            if step is not None:
                self._waiting.appendleft(step)
            self.give_away()
            return None
        self.step = step
        return step

    def look(self) -> float | None:
        """Give away what has waited for too long; returns the moment of the next look, None where nothing waits."""
        moment = self._began + _PATIENCE
        if (self._waiting or self._closing) and time.monotonic() >= moment:
            self.give_away()
        return moment if self._waiting or self._closing else None

    def give_away(self) -> None:
        """Give what waits messages of its own, and end what has come to its end."""
        closing, self._closing = self._closing, ()
        if closing:
            self._close(closing)
        given: dict[str, dict[str, int]] = {}
        while True:
            try:
                step = self._waiting.popleft()
            except IndexError:
                break
            given.setdefault(step.execution_id, {})[step.task_id] = step.epoch
        for execution_id, tasks in given.items():
            self._scatter(execution_id, tasks)


def _step_of(claim: Claim) -> Step:
    return Step(execution_id=claim.execution_id, task_id=claim.task_id, epoch=claim.epoch - 1, handler=claim.handler)


class Turns:
    """The turns of this process, one in each thread that runs tasks.

    Args:
        dispatcher: publishes what is given away.
        attendant: looks after what waits, and knows whether the worker is about to end.
        reporter: says what happens to tasks without a message of their own.
    """

    def __init__(self, dispatcher: Dispatcher, attendant: Attendant, reporter: Reporter) -> None:
        self._dispatcher, self._attendant, self._reporter = dispatcher, attendant, reporter
        self._local = threading.local()

    @property
    def current(self) -> Turn | None:
        """The turn of this thread; None outside of a worker."""
        turn: Turn | None = getattr(self._local, "turn", None)
        return turn

    def tracer(self, handler: str, trace: Callable[..., Any]) -> Callable[..., Any]:
        """Celery's tracer of a task, made to go on with the rest of the turn.

        Each further task goes through its own tracer, so that Celery's signals and logs know it as any other.
        """

        def run(uuid: str, args: Any, kwargs: Any, request: dict[str, Any]) -> Any:
            turn = self._turn(handler, args, request)
            if turn is None:
                return trace(uuid, args, kwargs, request)
            self._local.turn = turn
            try:
                answer = trace(uuid, args, kwargs, request)
                self._reporter.ended(uuid, answer, alone=True)
                own = None
                while (step := turn.next()) is not None:
                    own = own or {**request, "headers": Context(request).headers or {}}  # looked for once, and not by Celery each time
                    self._follow(step, own)
                return answer
            finally:
                self._local.turn = None
                turn.give_away()

        return run

    def read(self, args: tuple[Any, ...]) -> Message:
        """What a message's arguments say of the task to run; in a turn that is known already.

        Raises:
            Ignore: they are not ours.
        """
        turn = self.current
        if turn is None:
            return read_message(args)
        return Message(execution_id=turn.step.execution_id, task_id=turn.step.task_id, epoch=turn.step.epoch)

    def watch(self, turn: Turn) -> None:
        """See to it that nothing waits for long."""
        if (moment := turn.look()) is not None:
            self._attendant.remind(moment, turn.look)

    def _turn(self, handler: str, args: Any, request: dict[str, Any]) -> Turn | None:
        try:
            message = read_message(args)
        except Ignore:  # the task's body drops it
            log.warning("a message of the wrong form was dropped")
            return None
        hard_limit, _ = request.get("timelimit") or (None, None)
        turn = Turn(
            handler=handler, message=message, scatter=self._scatter, close=self._close,
            room=max(0.0, (hard_limit or 0.0) - 2 * self._dispatcher.hard_limit),
        )  # fmt: skip
        self.watch(turn)
        return turn

    def _follow(self, step: Step, request: dict[str, Any]) -> None:
        uuid, args = f"{step.execution_id}_{step.task_id}", (step.execution_id, step.task_id, step.epoch)
        own = {
            **request, "headers": dict(request["headers"]), "id": uuid, "task": step.handler, "args": args,
            "argsrepr": f"epoch {step.epoch}", "root_id": step.execution_id,
        }  # fmt: skip
        self._reporter.started(uuid, step.handler, own)
        answer = self._dispatcher.celery.tasks[step.handler].tracer(uuid, args, {}, own)
        self._reporter.ended(uuid, answer, alone=False)

    def _close(self, executions: Sequence[str]) -> None:
        try:
            self._attendant.store.close_executions(executions)
        except DatabaseUnavailable as exc:  # recovery ends them
            log.warning("%s", exc)

    def _scatter(self, execution_id: str, tasks: dict[str, int]) -> None:
        try:
            ready = self._attendant.store.scatter(execution_id, tasks)
        except DatabaseUnavailable as exc:  # recovery finds them
            log.warning("%s", exc)
        else:
            self._dispatcher.try_publish(ready)
