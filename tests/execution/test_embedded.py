"""The embedded servers, as their holders see them: real servers under a temporary home."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import redis

from pipeline.embedded import EmbeddedServices, Services
from pipeline.errors import BrokerUnavailable, DatabaseUnavailable, ServiceUnavailable
from pipeline.servers import Postgres, Redis

HOLDER = """
import sys
from pathlib import Path
from pipeline.embedded import EmbeddedServices
print(EmbeddedServices(Path(sys.argv[1]), postgres=False).start().broker_url, flush=True)
sys.stdin.read()
"""

FORKING_HOLDER = """
import os, sys
from pathlib import Path
from pipeline.embedded import EmbeddedServices
held = EmbeddedServices(Path(sys.argv[1]), postgres=False)
held.start()
if (child := os.fork()) == 0:
    held.stop()
    os._exit(0)
os.waitpid(child, 0)
print("stopped in the fork", flush=True)
sys.stdin.read()
held.stop()
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    for server in (Postgres(tmp_path / "home"), Redis(tmp_path / "home")):
        server.stop()


def broker(home: Path) -> EmbeddedServices:
    return EmbeddedServices(home, postgres=False)


def pid(home: Path, name: str) -> int:
    """The process that the server itself says it is."""
    file = {"postgres": Postgres, "redis": Redis}[name].pid_file
    return int((home / name / file).read_text().split()[0])


def runs(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(number: int) -> None:
    process = psutil.Process(number)
    process.kill()
    while runs(number):  # the kernel ends it; pytest's timeout ends this
        os.sched_yield()


def psql(services: Services, statement: str) -> str:
    program = Postgres(Path()).program().with_name("psql")
    command = [str(program), "--no-psqlrc", "-Atc", statement, services.database_url]
    return subprocess.check_output(command, text=True).strip()


def client(services: Services) -> redis.Redis:
    return redis.Redis.from_url(services.broker_url, decode_responses=True)


def test_start_cold_gives_servers_that_answer_and_stop_ends_them_and_restart_keeps_the_data(home: Path) -> None:
    held = EmbeddedServices(home)
    first = held.start()
    names = ["TimeZone", "server_encoding", "max_connections", "fsync", "listen_addresses"]
    settings = psql(first, "SELECT " + "||' '||".join(f"current_setting('{name}')" for name in names))
    assert settings == "UTC UTF8 200 on 127.0.0.1"
    psql(first, "CREATE TABLE kept AS SELECT 'è' AS word")
    with client(first) as connection:
        assert connection.ping()
        assert connection.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert connection.config_get("bind") == {"bind": "127.0.0.1"}
        assert connection.config_get("protected-mode") == {"protected-mode": "yes"}
        connection.lpush("kept", "hint")
    numbers = [pid(home, name) for name in ("postgres", "redis")]
    # Ctrl-C goes to the processes of the terminal's session
    assert os.getsid(0) not in map(os.getsid, numbers)
    held.stop()
    assert not any(map(runs, numbers))
    held.stop()

    with EmbeddedServices(home) as second:
        assert second == first
        assert psql(second, "SELECT word FROM kept") == "è"
        with client(second) as connection:
            assert connection.lrange("kept", 0, -1) == ["hint"]


def test_start_again_by_the_same_holder_gives_the_same_servers(home: Path) -> None:
    held = broker(home)
    assert held.start() == held.start()
    number = pid(home, "redis")
    held.stop()
    assert not runs(number)


def test_stop_by_one_of_two_holders_leaves_the_servers_and_by_the_last_ends_them(home: Path) -> None:
    one, other = broker(home), broker(home)
    assert one.start() == other.start()
    number = pid(home, "redis")
    one.stop()
    assert runs(number)
    other.stop()
    assert not runs(number)


def test_start_by_many_holders_at_once_gives_all_the_same_server(home: Path) -> None:
    holders = [broker(home) for _ in range(6)]
    with ThreadPoolExecutor(len(holders)) as pool:
        assert len(set(pool.map(lambda held: held.start(), holders))) == 1
    number = pid(home, "redis")
    for held in holders[1:]:
        held.stop()
    assert runs(number)
    holders[0].stop()
    assert not runs(number)


def test_killed_holder_leaves_servers_that_the_next_adopts_and_stops(home: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        address = holder.stdout.readline().strip()
        number = pid(home, "redis")
        held = broker(home)
        held.start()
        held.stop()
        assert runs(number), "another process holds it"
        holder.kill()
    assert runs(number)
    with broker(home) as services:
        assert services.broker_url == address
        assert pid(home, "redis") == number
    assert not runs(number)


def test_stop_in_a_fork_leaves_the_servers_to_its_parent(home: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORKING_HOLDER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "stopped in the fork\n"
        number = pid(home, "redis")
        assert runs(number)
    assert holder.returncode == 0
    assert not runs(number), "the parent stopped it"


def test_start_after_a_server_died_starts_it_again_at_its_address(home: Path) -> None:
    with EmbeddedServices(home) as services:
        numbers = [pid(home, "postgres"), pid(home, "redis")]
        psql(services, "CREATE TABLE kept AS SELECT 1 AS number")
        for number in numbers:
            kill(number)
        with EmbeddedServices(home) as again:
            assert again == services
            assert psql(again, "SELECT number FROM kept") == "1"
            assert pid(home, "postgres") not in numbers
            assert pid(home, "redis") not in numbers


@pytest.mark.parametrize(("name", "other"), [("postgres", "redis"), ("redis", "postgres")])
def test_start_with_a_pid_file_whose_number_is_another_programs_now_starts_the_server(
    home: Path, name: str, other: str
) -> None:
    with EmbeddedServices(home) as services:
        number, others = pid(home, name), pid(home, other)
        kill(number)
        file = home / name / {"postgres": Postgres, "redis": Redis}[name].pid_file
        file.write_text(file.read_text().replace(str(number), str(others), 1))
        with EmbeddedServices(home) as again:
            assert again == services
            assert pid(home, name) not in (number, others)
            assert runs(pid(home, name))
            assert pid(home, other) == others


def test_start_where_another_home_answers_at_the_recorded_port_takes_another(home: Path, tmp_path: Path) -> None:
    with broker(tmp_path / "other") as other:
        home.mkdir()
        (home / "services.json").write_text((tmp_path / "other/services.json").read_text())
        with broker(home) as services:
            assert services.broker_url != other.broker_url
            assert pid(home, "redis") != pid(tmp_path / "other", "redis")
            assert services.broker_url.split(":")[-1] == f"{Redis(home).ensure(None)}/0"


def test_start_with_an_unreadable_record_finds_the_running_server(home: Path) -> None:
    with broker(home) as services:
        (home / "services.json").write_text("[half")
        with broker(home) as again:
            assert again == services


def test_start_after_a_setup_that_was_cut_short_does_it_again(home: Path) -> None:
    (home / "postgres.new").mkdir(parents=True)
    (home / "postgres.new/PG_VERSION").write_text("18\n")
    with EmbeddedServices(home, redis=False) as services:
        assert psql(services, "SELECT current_database()") == "pipeline"
        assert services.broker_url == ""


def test_start_under_a_very_long_and_odd_path_works(tmp_path: Path) -> None:
    home = tmp_path / ('it\'s "a" $HOME ' * 10) / ("è" * 60)
    with EmbeddedServices(home) as services:
        assert psql(services, "SELECT 1") == "1"
        with client(services) as connection:
            assert connection.ping()


def test_start_of_postgres_that_fails_quotes_its_log_and_leaves_nothing_behind(home: Path) -> None:
    (home / "postgres").mkdir(parents=True, mode=0o700)
    with pytest.raises(DatabaseUnavailable) as raised:
        EmbeddedServices(home).start()
    assert str(home / "postgres.log") in str(raised.value)
    assert "postgresql.conf" in str(raised.value)
    assert Redis(home).find() is None


def test_start_of_redis_that_fails_quotes_its_log(home: Path) -> None:
    (home / "redis/appendonlydir").mkdir(parents=True)
    (home / "redis/appendonlydir/appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(BrokerUnavailable) as raised:
        broker(home).start()
    assert str(home / "redis.log") in str(raised.value)
    assert "manifest" in str(raised.value)


def test_start_under_a_home_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceUnavailable, match="file/home"):
        EmbeddedServices(tmp_path / "file/home").start()


def test_stop_by_a_signal_to_the_server_itself_does_not_disturb_the_holder(home: Path) -> None:
    held = broker(home)
    services = held.start()
    number = pid(home, "redis")
    os.kill(number, signal.SIGTERM)
    while runs(number):
        os.sched_yield()
    held.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(services.broker_url.split(":")[-1].removesuffix("/0"))))
