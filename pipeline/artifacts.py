"""Files that tasks hand to each other: written whole or not at all, known by URL, size and content hash.

An attempt writes under its own folder `<root>/<execution>/<task>/<epoch>/`, so a worker that lost its task can never
replace what another wrote. The root is any fsspec URL; locally a file is written beside its place and renamed, remotely
it is uploaded under a temporary name and moved.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict

from pipeline.errors import ArtifactError


class Artifact(BaseModel):
    """A file that a task wrote."""

    model_config = ConfigDict(frozen=True)

    uri: str
    media_type: str = "application/octet-stream"
    bytes: int
    #: SHA-256 of the content, in hex
    sha256: str


class Dataset(BaseModel):
    """A table that a task wrote, as a Parquet file: what travels between tasks instead of the rows."""

    model_config = ConfigDict(frozen=True)

    uri: str
    format: Literal["parquet"] = "parquet"
    rows: int
    columns: tuple[str, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ArtifactStore:
    """The files of one attempt."""

    #: fsspec URL or local path under which all artifacts live
    root: str
    #: folder of this attempt below the root
    folder: str

    @contextmanager
    def write(self, name: str, media_type: str = "application/octet-stream") -> Iterator[Writing]:
        """Gives a local path to write to; on leaving, the file is put in its place whole and `.artifact` is set.

        Raises:
            ArtifactError: the file cannot be written (disk full, no rights); nothing stays behind.
        """
        if Path(name).name != name or name in ("", ".", ".."):
            raise ArtifactError(f"artifact name {name!r} is not a plain file name")
        filesystem, base = fsspec.core.url_to_fs(self.root)
        target = f"{base.rstrip('/')}/{self.folder}/{name}"
        local = isinstance(filesystem, LocalFileSystem)
        scratch: Path | None = None
        try:
            if local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=Path(target).parent if local else None))
            writing = Writing(path=scratch / name)
            yield writing
            digest, size = _digest(writing.path)
            if local:
                writing.path.replace(target)
            else:
                filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                filesystem.put_file(str(writing.path), target + ".writing")
                filesystem.mv(target + ".writing", target)
        except OSError as exc:
            raise ArtifactError(f"artifact {name!r} cannot be written under {self.root}: {exc}") from exc
        finally:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
        uri = filesystem.unstrip_protocol(target)
        writing.artifact = Artifact(uri=uri, media_type=media_type, bytes=size, sha256=digest)

    @contextmanager
    def read(self, uri: str) -> Iterator[Path]:
        """Gives a local path with the content of an artifact, fetched first where the root is remote.

        Raises:
            ArtifactError: the artifact is not there, or lies outside the root.
        """
        filesystem, base = fsspec.core.url_to_fs(self.root)
        _, path = fsspec.core.url_to_fs(uri)
        root = base.rstrip("/")
        if isinstance(filesystem, LocalFileSystem):
            real = Path(path).resolve()
            if not real.is_relative_to(Path(root).resolve()):
                raise ArtifactError(f"{uri} lies outside the artifacts of this installation ({self.root})")
            if not real.is_file():
                raise ArtifactError(f"artifact {uri} does not exist")
            yield real
            return
        if (
            uri.partition("://")[0] != self.root.partition("://")[0]
            or not path.startswith(root + "/")
            or ".." in path.split("/")
        ):
            raise ArtifactError(f"{uri} lies outside the artifacts of this installation ({self.root})")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.rsplit("/", 1)[1]
            try:
                filesystem.get_file(path, str(copy))
            except OSError as exc:
                raise ArtifactError(f"artifact {uri} cannot be read: {exc}") from exc
            yield copy


@dataclass
class Writing:
    """A file being written: `path` is where to write, `artifact` what it became."""

    path: Path
    artifact: Artifact | None = None

    def dataset(self, *, rows: int, columns: Iterable[str]) -> Dataset:
        """What was written, as a table; only after the `with` block of `write`."""
        if self.artifact is None:
            raise ArtifactError(f"{self.path.name!r} is not written yet: ask for its data set after the with block")
        done = self.artifact
        return Dataset(uri=done.uri, rows=rows, columns=tuple(columns), bytes=done.bytes, sha256=done.sha256)


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())  # the result that names this file is durable: so must the file be
    return digest, path.stat().st_size
