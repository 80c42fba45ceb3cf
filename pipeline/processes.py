"""The commands that are, or look after, long-running processes; each returns whether all went well, errors are raised."""

from __future__ import annotations

import os
import signal
import sys
import threading
from argparse import Namespace

from pipeline.app import Installation
from pipeline.display import say
from pipeline.errors import SettingsError
from pipeline.local import Workers, flower_port_is_free
from pipeline.pulse import Pulse
from pipeline.result_store.migrations import migrations, require_current, upgrade, version


def up(arguments: Namespace) -> bool:
    """Run everything on this machine until a signal comes."""
    with Installation.open() as installation:
        require_current(installation.database_url)
        installation.dispatcher.waiting()  # without a broker nothing would ever be ready
        settings = installation.settings
        flower_on = not arguments.no_flower and flower_port_is_free(installation)
        if not flower_on and not arguments.no_flower and settings.flower_port:
            say(f"Flower is not started: port {settings.flower_port} is taken; PIPELINE_FLOWER_PORT names another")
        concurrency = arguments.concurrency or settings.concurrency
        with Workers(
            installation, workers=arguments.workers, concurrency=concurrency, flower=flower_on, catch_signals=True
        ) as workers:
            workers.await_answers()
            if workers.alive:
                print(f"postgres {_without_password(installation.database_url)}")
                print(f"broker   {_without_password(installation.broker_url)}")
                print(f"logs     {workers.log_folder}")
                if flower_on:
                    print(f"flower   http://{settings.flower_address}:{settings.flower_port}")
                print("ready", flush=True)
            workers.join()
    return True


def worker(arguments: Namespace) -> bool:
    """Run one Celery worker."""
    with Installation.open() as installation:
        require_current(installation.database_url)
        settings = installation.settings
        installation.worker_app.worker_main([
            "worker", "--hostname", f"{arguments.name}@%h", "--pool", arguments.pool or settings.pool,
            "--concurrency", str(arguments.concurrency or settings.concurrency), "--loglevel", settings.log_level,
            "--without-gossip", "--without-mingle",
        ])  # fmt: skip
    return True


def scheduler(arguments: Namespace) -> bool:
    """Look after what was lost, until a signal comes or standard input ends."""
    stop = threading.Event()
    # Not by an exception: it would come between any two instructions, and some code swallows whatever it is.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Installation.open() as installation:
        if arguments.beside:
            name, _, pid = arguments.beside.rpartition(":")
            pulse = Pulse(store=installation.store, name=name, pid=int(pid), lease=installation.settings.lease)
            threading.Thread(target=_set_at_eof, args=(stop,), daemon=True).start()
            threading.Thread(target=pulse.run, args=(stop,), daemon=True).start()
        else:  # beside a worker, which has looked, the database may be away for a while
            require_current(installation.database_url)
        if installation.retention is not None:
            threading.Thread(target=installation.retention.run, args=(stop,), daemon=True).start()
        installation.recovery.run(stop, installation.settings.sweep)
    return True


def _set_at_eof(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not `sys.stdin`: its buffer's lock would be missed at the interpreter's end
        pass
    stop.set()


def flower(arguments: Namespace) -> bool:
    """Run Flower."""
    with Installation.open() as installation:
        settings = installation.settings
        if settings.flower_port and not flower_port_is_free(installation):
            raise SettingsError(f"port {settings.flower_port} is taken: PIPELINE_FLOWER_PORT names another")
        auth = [f"--basic-auth={','.join(settings.flower_basic_auth)}"] if settings.flower_basic_auth else []
        installation.worker_app.start([
            "flower", f"--address={settings.flower_address}", f"--port={settings.flower_port}", "--max-tasks=20000", *auth,
        ])  # fmt: skip
    return True


def db(arguments: Namespace) -> bool:
    """Show or upgrade the schema."""
    with Installation.open() as installation:
        url, wanted = installation.database_url, migrations()[-1].version
        if arguments.action == "upgrade":
            for step in upgrade(url):
                print(f"upgraded to {step.version} ({step.name})")
        print(f"schema version {version(url)}, this code needs {wanted}")
        require_current(url)
    return True


def collect_garbage(arguments: Namespace) -> bool:
    """Forget old executions now."""
    with Installation.open() as installation:
        require_current(installation.database_url)
        retention = installation.retention
        if retention is None:
            raise SettingsError("executions are kept for ever: PIPELINE_RETENTION_DAYS says for how long else")
        forgotten = 0
        while done := retention.run_once():
            forgotten += done
        print(f"{forgotten} executions forgotten")
    return True


def _without_password(url: str) -> str:
    head, _, tail = url.partition("://")
    credentials, at, place = tail.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return f"{head}://{user}{':***' if colon else ''}{at}{place}"
