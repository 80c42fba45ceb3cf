"""RECOVER: publish what a crash left unpublished, and take tasks from workers that are gone. It never runs a task.

Any number of these may look at once: each step is a guarded update.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.dispatch import Dispatcher
from pipeline.errors import BrokerUnavailable, DatabaseUnavailable
from pipeline.result_store.rows import Attempt
from pipeline.result_store.store import ResultStore

log = logging.getLogger(__name__)

#: rows that one step takes at a time
_LIMIT = 500


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What one look did."""

    published: int = 0
    lost: int = 0
    expired: int = 0
    closed: int = 0


class Recovery:
    """Looks after what nobody else will.

    Args:
        waiting: how many messages the broker holds for our queue.
        lease: seconds without heartbeat after which a worker counts as lost. A look that follows a time without
            contact to the store waits that long before it declares anyone lost: nobody could renew either.
        sweep: seconds between two looks.
    """

    def __init__(
        self, store: ResultStore, dispatcher: Dispatcher, *, waiting: Callable[[], int], lease: float,
        sweep: float = 0.0, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.store, self.dispatcher, self.waiting, self.lease, self.clock = store, dispatcher, waiting, lease, clock
        self._longest_gap = max(lease / 3, 3 * sweep)
        self._last_contact = clock()
        self._outage_ended = float("-inf")

    def run_once(self) -> Recovered:
        """One look: a single indexed query where there is nothing to do.

        Raises:
            DatabaseUnavailable: the store cannot be reached.
        """
        work = self.store.recovery_work()
        self._contact()
        lost = expired = published = closed = 0
        if work.closing:
            closed = self.store.close_overdue(_LIMIT)
        if work.expired:
            expired = self.store.expire_executions(_LIMIT)
        if work.lost:
            lost += self._end(self.store.lost_attempts(_LIMIT), "its worker was lost: no heartbeat within the lease")
        if work.overdue:
            lost += self._end(self.store.overdue_attempts(_LIMIT), "it ran on past its hard limit")
        if work.due or lost:
            published = self._publish()
        return Recovered(published=published, lost=lost, expired=expired, closed=closed)

    def run(self, stop: threading.Event, every: float) -> None:
        """Look every `every` seconds until `stop` is set; an outage is logged once and waited out."""
        down = False
        while not stop.wait(every):
            try:
                done = self.run_once()
            except DatabaseUnavailable as exc:
                if not down:
                    log.warning("recovery waits: %s", exc)
                down = True
                continue
            if down:
                log.warning("recovery goes on")
                down = False
            if done != Recovered():
                log.info("recovered: %s", done)

    def _contact(self) -> bool:
        """Take note that the store has answered; false where workers had no time yet to renew or record after an outage.

        Asked after each answer: a server that stands still gives the answer to the moment of its end.
        """
        now = self.clock()
        if now - self._last_contact > self._longest_gap:
            self._outage_ended = now
        self._last_contact = now
        return now - self._outage_ended > self.lease

    def _end(self, attempts: list[Attempt], message: str) -> int:
        count = 0
        for attempt in attempts:
            if not self._contact():
                break
            log.warning("task %s of %s: %s", attempt.task_id, attempt.execution_id, message)
            ended = self.store.end(attempt, "lost", error_type="WorkerLost", error_message=message)
            count += ended.outcome == "done"
        return count

    def _publish(self) -> int:
        """Publish what is due for the first time; of what was published before, as many as the broker lacks, oldest first.

        What workers fetched and have not claimed is lacking too: behind a long task, it goes to another worker so.
        """
        try:
            held = self.waiting()  # asked first: what is claimed meanwhile only makes the difference smaller
            missing = self.store.count_published() - held
        except BrokerUnavailable as exc:
            log.warning("%s", exc)
            return 0
        ready = self.store.take_due(_LIMIT, first_only=True)
        if missing > 0:
            ready += self.store.take_due(min(missing, _LIMIT), first_only=False)
        return len(ready) if self.dispatcher.try_publish(ready) else 0
