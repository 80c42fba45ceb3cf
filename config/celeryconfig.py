"""Celery's settings that do not depend on the installation, each with its reason."""

from __future__ import annotations

from typing import Any

# Messages are data: pickle would let whoever writes to the broker run code.
task_serializer = "json"
result_serializer = "json"
accept_content = ["json"]

# A message is a hint; the store's lease brings a lost task back, not the broker's redelivery.
task_acks_late = False
task_reject_on_worker_lost = False
# The store records everything; Celery's own results would be a second truth.
task_ignore_result = True
task_store_errors_even_if_ignored = True
# On Redis a worker fetches for idle processes only (the app says so, as it knows the broker). Elsewhere a message stuck in one
# worker behind a long task is published again by recovery; more would only delay that.
worker_prefetch_multiplier = 1
# Only tasks with late acks are cancelled, and there are none: this silences the warning at every reconnection.
worker_cancel_long_running_tasks_on_connection_loss = True
# Our own rows say when a task started.
task_track_started = False
result_extended = False
# Flower turns events on while it watches; workers that nobody watches send none.
worker_send_task_events = False
task_send_sent_event = False
# A killed child is reported at once, so that its task is taken back at once.
worker_lost_wait = 1.0
# Handlers leak; a child that is replaced now and then leaks for a bounded time.
worker_max_tasks_per_child = 10_000
worker_proc_alive_timeout = 60
# The queue is declared with its type; any other name is a mistake.
task_create_missing_queues = False
worker_disable_rate_limits = True
# Workers outlive the broker's restarts.
broker_connection_retry_on_startup = True
broker_connection_max_retries = None
# Flower asks nine things at once, and each question holds one connection while it waits for another.
broker_pool_limit = 32
# Whoever publishes must not hang on a dead broker: recovery publishes later.
task_publish_retry = False
enable_utc = True
timezone = "UTC"
worker_hijack_root_logger = True
worker_redirect_stdouts = False
worker_log_format = "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"
worker_task_log_format = worker_log_format

REDIS_TRANSPORT: dict[str, Any] = {
    # No copies of what a worker has fetched: they cost two round trips for each message, and recovery publishes again what
    # is lost with a worker.
    "ack_emulation": False,
    "socket_connect_timeout": 3,
    # BRPOP blocks for shorter; a half-open connection is noticed.
    "socket_timeout": 30,
    "socket_keepalive": True,
    "health_check_interval": 10,
    # kombu tries for ever by itself.
    "max_retries": 1,
    "interval_start": 0,
    "interval_step": 0.1,
}
AMQP_TRANSPORT: dict[str, Any] = {
    # A publish that the broker did not take must fail.
    "confirm_publish": True,
    "max_retries": 1,
    "interval_start": 0,
    "interval_step": 0.1,
}
