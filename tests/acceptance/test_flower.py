"""Celery's own tools on our installation: Flower, `inspect`, `worker`."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from config.settings import Settings
from pipeline.app import Installation
from pipeline.local import flower_port_is_free

#: many processes start, and the machine may be busy
pytestmark = pytest.mark.timeout(300)

EMPTY = {"id": "empty", "tasks": [{"id": "a", "handler": "debug.noop"}, {"id": "b", "handler": "debug.noop", "dependencies": ["a"]}]}  # fmt: skip
AUTH = {"Authorization": "Basic " + base64.b64encode(b"ana:open sesame").decode()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(port: int, path: str, headers: dict[str, str] = {}) -> tuple[int, str]:  # noqa: B006
    """Status and text; 0 where nobody listens yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    except OSError:
        return 0, ""
    finally:
        connection.close()


def listening(process: Any, port: int) -> set[str]:
    """Addresses that a process and its children listen on, at a port."""
    root = psutil.Process(process.pid)
    connections = (c for p in (root, *root.children(recursive=True)) for c in p.net_connections("tcp"))
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


def test_up_starts_flower_on_loopback_behind_its_password_and_it_shows_our_tasks(home: Any, eventually: Any) -> None:
    port = free_port()
    settings = {"PIPELINE_FLOWER_PORT": str(port), "PIPELINE_FLOWER_BASIC_AUTH": "ana:open sesame"}
    with home.start("up", **settings) as up:
        assert f"flower   http://127.0.0.1:{port}\n" in home.until_ready(up)
        assert eventually(lambda: get(port, "/api/workers", AUTH)[0] == 200)
        assert get(port, "/api/tasks")[0] == 401
        assert get(port, "/")[0] == 401
        assert listening(up, port) == {"127.0.0.1"}
        seen: dict[str, Any] = {}
        ids: set[str] = set()

        def shown() -> bool:
            """Flower turns the workers' events on when it has seen them, so the first run may be missed."""
            execution = home.json("run", file)["execution_id"]
            ids.update({f"{execution}_a", f"{execution}_b"})
            return eventually(arrived, 3)

        def arrived() -> bool:
            seen.update(json.loads(get(port, "/api/tasks", AUTH)[1]))
            return any(seen[id_]["state"] == "SUCCESS" for id_ in ids & seen.keys())

        file = home.write("empty.yaml", EMPTY)
        assert eventually(shown), seen
        name = next(id_ for id_ in ids if id_ in seen)
        assert seen[name]["name"] == "debug.noop"
        page = get(port, f"/task/{name}", AUTH)
        assert page[0] == 200 and name in page[1]
        ping = home("-A", "pipeline", "inspect", "ping", program=("-m", "celery"))
        assert ping.code == 0 and "pong" in ping.out and "worker-1-" in ping.out
        up.send_signal(signal.SIGTERM)
        up.communicate(timeout=60)
        assert up.returncode == 0


def test_port_of_flower_that_is_taken_or_zero_is_not_free(tmp_path: Path) -> None:
    def free(port: int) -> bool:
        return flower_port_is_free(Installation(Settings(home=tmp_path, flower_port=port), None, "", ""))

    assert not free(0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert not free(taken.getsockname()[1])
    assert free(free_port())


def test_flower_alone_and_celery_worker_work_on_the_installation(cli: Any, site: Any, eventually: Any) -> None:
    port = free_port()
    celery = ("-m", "celery")
    with (
        cli.start("flower", PIPELINE_FLOWER_PORT=str(port)) as flower,
        cli.start("-A", "pipeline", "worker", "--pool", "solo", program=celery) as worker,
    ):
        execution = site.engine.execute_workflow(EMPTY, {})
        assert site.engine.wait(execution, 60).status == "success"
        assert eventually(lambda: get(port, "/workers")[0] == 200)
        assert listening(flower, port) == {"127.0.0.1"}
        assert "pong" in cli("-A", "pipeline", "inspect", "ping", program=celery).out
        for process in (worker, flower):
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
