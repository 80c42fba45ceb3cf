"""The documents say what is: their definitions, commands and programs run, and what they show is what comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from config.settings import Settings
from pipeline.cli import parser
from pipeline.embedded import EmbeddedServices
from pipeline.result_store.migrations import upgrade
from pipeline.states import TASK_TRANSITIONS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = [path for path in DOCUMENTS if "```console" in path.read_text("utf-8")]
README = ROOT / "README.md"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that its first line names."""
        found = re.match(r"# ([\w-]+\.(?:yaml|py))\n", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Each command, with the lines that it prints."""
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, *output = part.rstrip("\n").split("\n")
            yield command, output


def blocks(path: Path, *languages: str) -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [Block(language=name, text=text) for name, text in found if name in languages]


def screen(text: str) -> list[str]:
    """What a terminal shows once all of `text` was written to it."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if token == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b"):
            if token.endswith("A"):
                row = max(0, row - int(token[2:-1] or 1))
            elif token == "\x1b[2K":
                lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
    return lines


def plain(lines: list[str]) -> list[str]:
    """Lines without what differs from run to run: ids, durations, and the widths of columns."""
    text = re.sub(r"exec-[0-9a-f]{12}", "exec-*", "\n".join(lines))
    text = re.sub(r" +", " ", re.sub(r" +$", "", text, flags=re.MULTILINE))
    text = re.sub(r"\b\d+\.\d\d$", "N", text, flags=re.MULTILINE)
    return text.strip("\n").split("\n")


@dataclass(frozen=True, kw_only=True)
class Desk:
    """A folder of a user who follows a document, with servers of its own."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, command: str) -> list[str]:
        """What a terminal shows after a command."""
        if command.startswith("export "):
            self.env.update(word.split("=", 1) for word in shlex.split(command)[1:])
            return [""]
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        with subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, cwd=self.folder, env=self.env
        ):
            os.close(slave)
            shown = b""
            with suppress(OSError):  # Linux says so when the last writer has gone
                while chunk := os.read(master, 65_536):
                    shown += chunk
        os.close(master)
        return screen(shown.decode())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Embedded services that stay up from one command to the next."""
    home = tmp_path_factory.mktemp("home")
    with EmbeddedServices(home) as services:
        upgrade(services.database_url)
        yield home


@pytest.fixture(params=RUNNABLE, ids=lambda path: path.name)
def document(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def desk(document: Path, home: Path, tmp_path: Path) -> Desk:
    """The files of a document are there, in the order in which it shows them."""
    for block in blocks(document, "yaml", "python"):
        if block.file:
            (tmp_path / block.file).write_text(block.text, "utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIPELINE_")}
    env = {**kept, "PATH": path, "PIPELINE_HOME": str(home), "PIPELINE_FLOWER_PORT": "0", "TERM": "xterm", "NO_COLOR": "1"}
    return Desk(folder=tmp_path, env=env)


@pytest.mark.timeout(300)
def test_commands_of_a_document_print_what_it_shows_and_its_programs_run(document: Path, desk: Desk) -> None:
    for block in blocks(document, "console"):
        for command, expected in block.commands:
            assert plain(desk.run(command)) == plain(expected), command
    definitions = [block for block in blocks(document, "yaml") if block.file != "wrong.yaml"]
    for number, block in enumerate(definitions):
        (desk.folder / f"block-{number}.yaml").write_text(block.text, "utf-8")
    shown = desk.run("pipeline validate block-*.yaml")
    assert sum("is valid" in line for line in shown) == len(definitions), shown
    program = "\n".join(block.text for block in blocks(document, "python") if block.file is None)
    if not program:
        return
    with (desk.folder / "worker.log").open("wb") as log:
        worker = subprocess.Popen(["pipeline", "worker"], cwd=desk.folder, env=desk.env, stdout=log, stderr=log)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=desk.folder, env=desk.env, capture_output=True, text=True, check=False
        )
    finally:
        worker.terminate()
        try:
            worker.wait(60)
        finally:
            worker.kill()
            worker.wait()
    assert done.returncode == 0, done.stderr + (desk.folder / "worker.log").read_text()
    assert done.stdout.splitlines() == re.findall(r"^ *print\(.*\)  # (.+)$", program, flags=re.MULTILINE)


def test_first_screen_of_the_readme_shows_a_definition_a_command_and_its_result() -> None:
    start = README.read_text("utf-8").split("\n")[:32]
    assert start.index("```yaml") < start.index("```console")
    assert any("success" in line for line in start)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_that_a_document_only_shows_exist(path: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    for block in blocks(path, "sh"):
        for line in block.text.splitlines():
            program, *rest = shlex.split(line, comments=True) or [""]
            if program == "make":
                assert rest[0] in targets, line
            elif program == "pipeline":
                assert parser().parse_args(rest).run, line
            else:
                assert program in ("", "export", "docker", "."), line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_a_document_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" not in target:
            assert (path.parent / file).exists(), target
            assert file or anchor in headings, target
    for file in re.findall(r"`((?:pipeline|handlers|config|tests|docs)/[\w/.-]*)", text):
        assert (ROOT / file).exists(), file
    for file, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert f"def {test}(" in (ROOT / file).read_text("utf-8"), f"{file}::{test}"
    known = {f"PIPELINE_{name.upper()}" for name in Settings.model_fields}
    for name in re.findall(r"PIPELINE_[A-Z_]+", text):
        assert name in known or name.startswith(("PIPELINE_SECRET_", "PIPELINE_CONNECTION_", "PIPELINE_TEST_")), name


def test_statements_of_the_readme_run(home: Path) -> None:
    with EmbeddedServices(home) as services, psycopg.connect(services.database_url) as connection:
        for block in blocks(README, "sql"):
            assert connection.execute(block.text.encode()).description, block.text


def test_picture_of_the_states_shows_every_transition_and_no_other() -> None:
    (picture,) = blocks(README, "mermaid")
    shown = set(re.findall(r"(\w+) --> (\w+)", picture.text))
    assert shown == {(a.value, b.value) for a, targets in TASK_TRANSITIONS.items() for b in targets}


def test_every_command_stands_in_the_table_of_the_readme() -> None:
    table = README.read_text("utf-8").partition("## Operate")[2].partition("Exit codes")[0]
    verbs = {name.split()[0] for name in re.findall(r"`([a-z ]+)`", table)}
    (commands,) = (action.choices for action in parser()._actions if action.dest == "command")
    assert verbs == set(commands or ())
