"""docker-compose.yml and Dockerfile, as far as they can be held to account without Docker.

Both are read as Docker reads them; the commands of our services run as plain processes, with the environment that
Compose would give them, but for the addresses of servers and the folders.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from psycopg import sql

from config.settings import Settings
from pipeline.cli import parser
from pipeline.engine import WorkflowEngine
from pipeline.states import ExecutionStatus

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {"POSTGRES_PASSWORD": "pass", "FLOWER_BASIC_AUTH": "ana:secret"}
WORKFLOW = {
    "id": "composed",
    "tasks": [
        {"id": "one", "handler": "debug.echo", "params": {"n": 1}},
        {"id": "two", "handler": "debug.echo", "dependencies": ["one"], "params": {"n": "{{ tasks.one.n + 1 }}"}},
    ],
}


class Missing(Exception):
    """A variable that has no default is not set."""


def substituted(text: str, env: Mapping[str, str]) -> str:
    """Compose's own substitution: ${NAME:-default}, ${NAME:?message}, and $$ for a dollar sign."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name, sign, rest = found[1], found[2], found[3]
        if env.get(name):
            return env[name]
        if sign == ":?":
            raise Missing(f"{name}: {rest}")
        assert sign == ":-", found[0]
        return rest or ""

    return re.sub(r"\$\$|\$\{(\w+)(:[-?])?([^}]*)\}", value, text)


def composed(env: Mapping[str, str] = REQUIRED) -> dict[str, Any]:
    def filled(value: Any) -> Any:
        match value:
            case str():
                return substituted(value, env)
            case dict():
                return {key: filled(item) for key, item in value.items()}
            case list():
                return [filled(item) for item in value]
            case _:
                return value

    found: dict[str, Any] = filled(yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8")))
    return found


COMPOSE = composed()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


def dockerfile() -> list[tuple[str, str]]:
    """Instructions with their arguments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


@pytest.mark.parametrize("name", REQUIRED)
def test_compose_without_a_password_refuses_to_start(name: str) -> None:
    with pytest.raises(Missing, match=name):
        composed({key: value for key, value in REQUIRED.items() if key != name})


def test_services_are_the_servers_a_migration_and_ours() -> None:
    assert set(SERVICES) == {"postgres", "redis", "rabbitmq", "migrate", "worker", "scheduler", "flower"}
    assert set(OURS) == {"migrate", "worker", "scheduler", "flower"}
    assert SERVICES["rabbitmq"]["profiles"] == ["rabbitmq"]
    assert not any("profiles" in service for name, service in SERVICES.items() if name != "rabbitmq")


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_pinned_watched_restarted_and_keeps_its_data(name: str) -> None:
    service = SERVICES[name]
    image, _, tag = service["image"].partition(":")
    assert tag, f"{image} without a tag is latest"
    assert tag != "latest"
    if name == "migrate":
        assert service["restart"] == "no"
        return
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"]
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    volumes = [volume.partition(":")[0] for volume in service["volumes"]]
    assert volumes
    assert set(volumes) <= set(COMPOSE["volumes"])


def test_worker_can_be_scaled() -> None:
    assert not {"container_name", "ports", "hostname"} & set(SERVICES["worker"])


def test_only_flower_is_published_and_only_to_this_host() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(published) == ["flower"]
    assert all(port.startswith("127.0.0.1:") for port in published["flower"])


def test_ours_start_after_the_migration_and_it_after_postgres() -> None:
    for name in set(OURS) - {"migrate"}:
        assert OURS[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert OURS[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
        assert OURS[name]["depends_on"]["rabbitmq"]["required"] is False
    assert OURS["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_grace_of_the_worker_is_longer_than_its_drain() -> None:
    drain = Settings.from_env(SERVICES["worker"]["environment"]).drain
    found = re.fullmatch(r"(\d+)(s|m)", SERVICES["worker"]["stop_grace_period"])
    assert found
    assert int(found[1]) * {"s": 1, "m": 60}[found[2]] > drain + 10


@pytest.mark.parametrize("name", OURS)
def test_environment_of_ours_is_of_settings_that_can_be_used(name: str) -> None:
    environment: dict[str, str] = OURS[name]["environment"]
    known = {f"PIPELINE_{field.upper()}" for field in Settings.model_fields} | {"PGPASSWORD"}
    assert set(environment) <= known
    settings = Settings.from_env(environment)
    assert settings.recovery_beside is False
    assert settings.database_url == "postgresql://pipeline@postgres:5432/pipeline"
    assert settings.broker_url == "redis://redis:6379/0"
    assert parser().parse_args(OURS[name]["command"]).run


def test_broker_of_the_profile_is_the_one_that_its_comment_names() -> None:
    found = re.search(r"PIPELINE_BROKER_URL=(\S+) ", (ROOT / "docker-compose.yml").read_text("utf-8"))
    assert found
    settings = Settings.from_env(composed({**REQUIRED, "PIPELINE_BROKER_URL": found[1]})["services"]["worker"]["environment"])
    user, password = (SERVICES["rabbitmq"]["environment"][f"RABBITMQ_DEFAULT_{n}"] for n in ("USER", "PASS"))
    assert settings.broker_url == f"amqp://{user}:{password}@rabbitmq:5672//"


def test_dockerfile_ends_as_an_ordinary_user_and_runs_pipeline() -> None:
    lines = dockerfile()
    users = [rest for name, rest in lines if name == "USER"]
    assert users[-1] not in ("root", "0")
    assert f" {users[-1]} " in next(rest for name, rest in lines if name == "RUN" and "useradd" in rest) + " "
    assert [rest for name, rest in lines if name == "ENTRYPOINT"] == ['["pipeline"]']


def test_dockerfile_copies_what_is_there_and_what_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    sources = [
        source
        for name, rest in dockerfile()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in kept, source
    assert all((ROOT / name).exists() for name in kept)


def test_dockerfile_pins_its_base_and_what_it_installs() -> None:
    bases = {rest.split()[0] for name, rest in dockerfile() if name == "FROM"}
    assert bases == {"python:3.12-slim"}
    installs = [rest for name, rest in dockerfile() if name == "RUN" and "pip install" in rest]
    assert all("--constraint constraints.txt" in rest and "--no-cache-dir" in rest for rest in installs)


class Host:
    """Where the services run as plain processes, with what stands in for the network and the volumes."""

    def __init__(self, database_url: str, broker_url: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.translated = {
            "PIPELINE_DATABASE_URL": database_url, "PIPELINE_BROKER_URL": broker_url, "PIPELINE_HOME": str(folder),
            "PIPELINE_ARTIFACTS_URL": str(folder / "artifacts"), "PIPELINE_QUEUE": f"test-{secrets.token_hex(4)}",
            "PIPELINE_FLOWER_PORT": str(self.port), "HOSTNAME": socket.gethostname(),
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        }  # fmt: skip

    def env(self, name: str) -> dict[str, str]:
        return {**OURS[name]["environment"], **self.translated}

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["pipeline", *OURS[name]["command"]], env=self.env(name), cwd=self.folder, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield
            assert process.poll() is None, (self.folder / f"{name}.log").read_text()
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def healthy(self, name: str) -> bool:
        kind, *words = OURS[name]["healthcheck"]["test"]
        command = ["/bin/sh", "-c", *words] if kind == "CMD-SHELL" else list(words)
        command = [word.replace("127.0.0.1:5555", f"127.0.0.1:{self.port}") for word in command]
        done = subprocess.run(command, env=self.env(name), cwd=self.folder, capture_output=True, check=False)
        return done.returncode == 0

    def flower(self, credentials: str = "") -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/workers")
        if credentials:
            request.add_header("Authorization", f"Basic {base64.b64encode(credentials.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code


def until(condition: Callable[[], bool], folder: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in folder.glob("*.log"))
            pytest.fail(f"did not happen within {seconds:g} s\n{logs}")
        time.sleep(0.1)


@pytest.fixture
def empty_database_url(servers: Any) -> Iterator[str]:
    """A database without the schema."""
    name = f"chordal_test_{secrets.token_hex(4)}"
    with psycopg.connect(servers.database_url, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield f"{servers.database_url.rpartition('/')[0]}/{name}"
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.mark.timeout(300)
def test_commands_and_health_checks_of_ours_work_together(
    empty_database_url: str, servers: Any, tmp_path: Path
) -> None:
    host = Host(empty_database_url, servers.broker_url, tmp_path)
    assert not host.healthy("scheduler"), "the database has no schema yet"
    migrate = ["pipeline", *OURS["migrate"]["command"]]
    done = subprocess.run(migrate, env=host.env("migrate"), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not host.healthy("worker"), "no worker is there yet"
    with ExitStack() as stack:
        for name in ("scheduler", "worker", "flower"):
            stack.enter_context(host.running(name))
        engine = stack.enter_context(WorkflowEngine(settings=Settings.from_env(host.env("worker"))))
        execution = engine.wait(engine.execute_workflow(WORKFLOW), timeout=90)
        assert execution.status is ExecutionStatus.SUCCESS
        assert execution.results["two"]["n"] == 2
        for name in ("scheduler", "worker", "flower"):
            until(lambda name=name: host.healthy(name), tmp_path)  # type: ignore[misc]
        assert host.flower() == 401
        assert host.flower("ana:wrong") == 401
        assert host.flower(REQUIRED["FLOWER_BASIC_AUTH"]) == 200


def test_shell_of_the_health_checks_is_one_that_the_image_has() -> None:
    for name, service in OURS.items():
        if "healthcheck" in service and service["healthcheck"]["test"][0] == "CMD-SHELL":
            program = shlex.split(service["healthcheck"]["test"][1])[0]
            assert program in ("celery", "pipeline", "python"), name
