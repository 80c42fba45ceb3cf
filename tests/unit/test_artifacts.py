"""Files between tasks: whole or not at all, and never outside their root."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from pipeline import ArtifactError, ArtifactStore

FOLDER = "exec-1/clean/1"


@pytest.fixture(params=["path", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """Each kind of root: a path, a local URL, and a remote one."""
    root = {
        "path": str(tmp_path / "artifacts"), "file": f"file://{tmp_path}/artifacts", "memory": f"memory://{uuid4().hex}",
    }[request.param]  # fmt: skip
    return ArtifactStore(root=root, folder=FOLDER)


def files(store: ArtifactStore) -> list[str]:
    """Everything that lies under the root."""
    filesystem, base = fsspec.core.url_to_fs(store.root)
    return sorted(filesystem.find(base)) if filesystem.exists(base) else []


def test_written_file_is_read_back_by_its_uri_with_size_and_digest(store: ArtifactStore) -> None:
    with store.write("page.html", "text/html") as writing:
        writing.path.write_bytes(b"<p>")
    done = writing.artifact
    assert done is not None
    assert (done.media_type, done.bytes, done.sha256) == ("text/html", 3, hashlib.sha256(b"<p>").hexdigest())
    assert "://" in done.uri and done.uri.endswith(f"{FOLDER}/page.html")
    with store.read(done.uri) as path:
        assert path.read_bytes() == b"<p>"
    assert len(files(store)) == 1


def test_data_set_is_known_only_after_it_was_written(store: ArtifactStore) -> None:
    with store.write("data.parquet") as writing:
        with pytest.raises(ArtifactError, match="not written yet"):
            writing.dataset(rows=1, columns=["a"])
        writing.path.write_bytes(b"PAR1")
    data = writing.dataset(rows=1, columns=["a", "b"])
    assert (data.rows, data.columns, data.bytes, data.format) == (1, ("a", "b"), 4, "parquet")


def test_failure_while_writing_leaves_nothing(store: ArtifactStore) -> None:
    with pytest.raises(RuntimeError, match="half way"), store.write("data.bin") as writing:
        writing.path.write_bytes(b"half")
        raise RuntimeError("half way")
    assert writing.artifact is None
    assert files(store) == []


def test_nothing_written_is_an_error_that_leaves_nothing(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactError, match=r"'data\.bin' cannot be written under"), store.write("data.bin"):
        pass
    assert files(store) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_full_disk_is_an_artifact_error_that_leaves_nothing(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactError, match="No space left"), store.write("data.bin") as writing:
        writing.path.write_bytes(b"half")
        with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
            full.write(b"x")
    assert files(store) == []


def test_written_again_by_the_same_attempt_is_replaced_whole(store: ArtifactStore) -> None:
    for content in (b"first", b"2"):
        with store.write("data.bin") as writing:
            writing.path.write_bytes(content)
    assert writing.artifact is not None
    with store.read(writing.artifact.uri) as path:
        assert path.read_bytes() == b"2"
    assert len(files(store)) == 1


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "../x"])
def test_name_that_is_no_plain_file_name_is_refused(store: ArtifactStore, name: str) -> None:
    with pytest.raises(ArtifactError, match="is not a plain file name"), store.write(name):
        pytest.fail("was let in")


def test_artifact_that_is_not_there_is_an_error(store: ArtifactStore) -> None:
    with store.write("data.bin") as writing:
        writing.path.write_bytes(b"x")
    assert writing.artifact is not None
    with pytest.raises(ArtifactError), store.read(writing.artifact.uri + ".gone"):
        pytest.fail("was found")


@pytest.mark.parametrize("outside", ["/etc/passwd", "file:///etc/passwd", "{root}/../outside.txt", "{root}-beside/x", "{root}"])
def test_reading_outside_the_root_is_refused(store: ArtifactStore, tmp_path: Path, outside: str) -> None:
    (tmp_path / "outside.txt").write_text("x")
    (tmp_path / "artifacts-beside").mkdir()
    (tmp_path / "artifacts-beside" / "x").write_text("x")
    with store.write("data.bin") as writing:
        writing.path.write_bytes(b"x")
    with pytest.raises(ArtifactError), store.read(outside.format(root=store.root)):
        pytest.fail("was let out")


def test_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(root=str(tmp_path / "artifacts"), folder=FOLDER)
    with store.write("data.bin") as writing:
        writing.path.write_bytes(b"x")
    link = tmp_path / "artifacts" / FOLDER / "link"
    (tmp_path / "outside.txt").write_text("x")
    link.symlink_to(tmp_path / "outside.txt")
    with pytest.raises(ArtifactError, match="outside the artifacts"), store.read(str(link)):
        pytest.fail("was let out")


def test_root_that_cannot_be_written_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("a file")
    store = ArtifactStore(root=str(tmp_path / "artifacts"), folder=FOLDER)
    with pytest.raises(ArtifactError, match="cannot be written under"), store.write("x") as writing:
        writing.path.write_bytes(b"x")
    assert os.listdir(tmp_path) == ["artifacts"]  # noqa: PTH208
