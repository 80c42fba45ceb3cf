"""RECORD: the processes that run tasks, and what recovery needs to know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from pipeline.result_store import rows
from pipeline.result_store.door import Count, Door


@dataclass(frozen=True, kw_only=True)
class _Worker:
    worker_id: int


@dataclass(frozen=True, kw_only=True)
class _Id:
    execution_id: str


@dataclass(frozen=True, kw_only=True)
class _Flag:
    expired: bool


class Fleet(Door):
    """Workers, and what is left when they are gone."""

    def start_worker(self, *, name: str, pid: int, lease: float, handlers: Sequence[str] = ()) -> int:
        """A new incarnation, with the handlers that it knows; returns its id."""
        found = self._one(
            "start_worker", _Worker, worker_name=name, pid=pid, handlers=list(handlers), lease=timedelta(seconds=lease)
        )
        assert found is not None  # an INSERT returns its row
        return found.worker_id

    def renew_worker(
        self, worker_id: int, lease: float, slow: Iterable[str] | None = None, quick: Iterable[str] | None = None
    ) -> bool:
        """Renew the lease and say whose runs are long or short; False: the incarnation is not known any more."""
        found = self._one(
            "renew_worker", _Worker, worker_id=worker_id, lease=timedelta(seconds=lease),
            slow=None if slow is None else sorted(slow), quick=None if quick is None else sorted(quick),
        )  # fmt: skip
        return found is not None

    def renew_workers(self, name: str, pids: Sequence[int], lease: float) -> int:
        """Renew the leases that run of a worker's processes; returns how many those were."""
        return len(
            self._all("renew_workers", _Worker, worker_name=name, pids=list(pids), lease=timedelta(seconds=lease))
        )

    def end_worker(self, worker_id: int) -> None:
        """Give the lease back."""
        self._one("end_worker", _Worker, worker_id=worker_id)

    def live_workers(self, *, after: int) -> int:
        """How many incarnations made after `after` have a lease that runs."""
        return self._all("live_workers", Count, after=after)[0].count

    def newest_worker(self) -> int:
        """The last incarnation that was made; 0 where there was none."""
        return self._all("newest_worker", Count)[0].count

    def forget_workers(self, age: float) -> None:
        """Delete incarnations whose lease ran out more than `age` seconds ago."""
        self._all("forget_workers", Count, age=timedelta(seconds=age))

    def running_on(self, worker_id: int, age: float) -> list[rows.Running]:
        """What an incarnation is said to run."""
        return self._all("running_on", rows.Running, worker_id=worker_id, age=timedelta(seconds=age))

    # recovery

    def recovery_work(self) -> rows.Work:
        """Which kinds of recovery have something to do."""
        found = self._one("recovery_work", rows.Work)
        assert found is not None  # a SELECT of EXISTS returns one row
        return found

    def lost_attempts(self, limit: int) -> list[rows.Attempt]:
        """Running tasks whose worker's lease ran out."""
        return self._all("lost_attempts", rows.Attempt, limit=limit)

    def overdue_attempts(self, limit: int) -> list[rows.Attempt]:
        """Running tasks that even the hard limit did not end."""
        return self._all("overdue_attempts", rows.Attempt, limit=limit)

    def expire_executions(self, limit: int) -> int:
        """End open executions whose time is up; returns how many."""
        overdue = self._all("expired_executions", _Id, limit=limit)
        expired = (self._one("expire_execution", _Flag, execution_id=row.execution_id) for row in overdue)
        return sum(1 for row in expired if row is not None and row.expired)

    def close_overdue(self, limit: int) -> int:
        """End executions that were left to be closed by a worker that has not done so; returns how many."""
        return self._all("close_overdue", Count, limit=limit)[0].count

    def count_published(self) -> int:
        """How many messages the broker should hold."""
        return self._all("count_published", Count)[0].count

    def take_due(self, limit: int, *, first_only: bool) -> tuple[rows.ReadyTask, ...]:
        """Tasks whose message is to be published (again)."""
        return tuple(self._all("take_due", rows.ReadyTask, limit=limit, first_only=first_only, grace=self.grace))
