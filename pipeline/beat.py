"""RECOVER, for those who run Celery beat: `celery -A pipeline beat -S pipeline.beat:RecoveryScheduler`."""

from __future__ import annotations

import logging
from typing import Any

from celery.beat import Scheduler

from pipeline.errors import DatabaseUnavailable

log = logging.getLogger(__name__)


class RecoveryScheduler(Scheduler):  # type: ignore[misc]
    """A beat scheduler whose tick is one look of recovery, besides whatever else beat has to send."""

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """One look; returns the seconds until the next."""
        installation = self.app.installation
        try:
            installation.recovery.run_once()
        except DatabaseUnavailable as exc:
            log.warning("recovery waits: %s", exc)
        return float(min(super().tick(*args, **kwargs), installation.settings.sweep))
