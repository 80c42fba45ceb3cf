"""Tables from files and to files, within the folders and URL schemes that the site allows."""
# ruff: noqa: S608 - SQL is put together here: names are quoted, values bound, the connection locked

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec

from handlers import tables
from pipeline import Artifact, Context, Dataset, Fail, Refused, handler

Format = Literal["csv", "jsonl", "parquet"]

FORMATS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
MEDIA_TYPES: dict[Format, str] = {"csv": "text/csv", "jsonl": "application/jsonl", "parquet": tables.PARQUET}
TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_ ,()]*")


class Written(Artifact):
    """A file that was written for others."""

    rows: int


@handler("files.read", retry_on=tables.PASSING)
def read(
    path: str,
    format: Format | None = None,  # noqa: A002 - what definitions call it
    delimiter: str | None = None,
    header: bool | None = None,
    nulls: Sequence[str] = ("",),
    columns: Mapping[str, str] | None = None,
    select: Sequence[str] = (),
    *,
    context: Context,
) -> Dataset:
    """Read a CSV, JSON Lines or Parquet file (also .gz, or .zip with one file in it) into a data set.

    Args:
        path: a path below PIPELINE_FILE_ROOTS, a URL of an allowed scheme, or package://NAME/FILE.
        format: from the suffix where not given.
        delimiter: of CSV; found in the file where not given.
        header: whether the first line of CSV names the columns; found in the file where not given.
        nulls: texts of CSV that mean NULL.
        columns: DuckDB types by column, as `{zip: VARCHAR}`; those of other columns are found in the whole file.
        select: columns to keep, in this order; all where empty.
    """
    types = dict(columns or {})
    if wrong := [text for text in types.values() if not TYPE.fullmatch(text)]:
        raise Fail(f"columns: {wrong[0]!r} is not a type, as VARCHAR, BIGINT, DOUBLE, DATE or DECIMAL(10, 2)")
    kept = ", ".join(map(tables.quoted, select)) or "*"
    with _source(path, context) as file, _explained(path):
        options: dict[str, Any] = {}
        casts = ""
        kind = format or _format(file.name)
        if kind == "csv":
            # the whole file is sampled: a type found in its first rows may not hold in the last
            options = {"sample_size": -1, "nullstr": list(nulls), "max_line_size": 16 << 20}
            options |= {"types": types} if types else {}
            options |= {"header": header} if header is not None else {}
            options |= {"delim": delimiter} if delimiter else {}
        else:
            cast = (f"CAST({tables.quoted(n)} AS {t}) AS {tables.quoted(n)}" for n, t in types.items())
            casts = f" REPLACE ({', '.join(cast)})" if types else ""
            options = {"format": "newline_delimited", "sample_size": -1} if kind == "jsonl" else {}
        function = {"csv": "read_csv", "jsonl": "read_json", "parquet": "read_parquet"}[kind]
        given = "".join(f", {name} = {tables.literal(value)}" for name, value in options.items())
        sql = f"SELECT {kept} FROM (SELECT *{casts} FROM {function}({tables.literal(file)}{given}))"
        return tables.save(context, sql, {}, {}, [file])


@handler("files.write", retry_on=tables.PASSING)
def write(
    data: Dataset,
    path: str,
    format: Format | None = None,  # noqa: A002 - what definitions call it
    overwrite: bool = False,
    *,
    context: Context,
) -> Written:
    """Write a data set to a file outside the artifacts, whole or not at all.

    An existing file is kept unless `overwrite` says otherwise; one with the very same content counts as written, so
    that a repeated attempt succeeds.
    """
    kind = format or _format(path)
    with tempfile.TemporaryDirectory(prefix="files-write-") as folder, _explained(path):
        # the suffix makes DuckDB compress
        made = Path(folder) / ("made.gz" if path.endswith(".gz") else "made")
        how = {"csv": "FORMAT csv, HEADER true", "jsonl": "FORMAT json", "parquet": "FORMAT parquet, COMPRESSION zstd"}
        packed = ", COMPRESSION gzip" if made.suffix and kind != "parquet" else ""
        with tables.connected(context, {"data": data}, [made]) as connection:
            connection.execute(f"COPY data TO {tables.literal(made)} ({how[kind]}{packed})")
        digest = _digest(made)
        size = made.stat().st_size
        uri = _put(made, digest, path, overwrite, context)
    return Written(uri=uri, media_type=MEDIA_TYPES[kind], bytes=size, sha256=digest, rows=data.rows)


def _format(name: str) -> Format:
    path = PurePosixPath(name)
    suffix = PurePosixPath(path.stem).suffix if path.suffix in (".gz", ".zip") else path.suffix
    if suffix not in FORMATS:
        raise Fail(f"{name}: the suffix tells no format; give format: csv, jsonl or parquet")
    return FORMATS[suffix]


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except Fail as exc:
        raise Fail(f"{path}: {exc}") from exc


def _split(url: str, context: Context) -> tuple[str, str]:
    """Scheme and rest of a path or URL that the site allows."""
    scheme, rest = url.split("://", 1) if "://" in url else ("file", url)
    allowed = context.settings.get("file_schemes", ())
    if scheme not in allowed or "::" in url or "\0" in url:
        raise Refused(
            f"{url}: files.* may use the schemes {', '.join(allowed) or '(none)'};"
            " PIPELINE_FILE_SCHEMES names those that this site allows"
        )
    return scheme, rest


@contextmanager
def _source(url: str, context: Context) -> Iterator[Path]:
    """A local file with the content of what the URL names, unpacked where it is a zip."""
    scheme, rest = _split(url, context)
    with tempfile.TemporaryDirectory(prefix="files-read-") as folder:
        if scheme == "file":
            file = _below_roots(rest, context)
            if not file.is_file():
                raise FileNotFoundError(f"{url} is not a file: there is none at {file}")
            yield _unzipped(file, folder)
        elif scheme == "package":
            with as_file(_resource(rest, context)) as file:
                yield _unzipped(file, folder)
        else:
            filesystem, remote = _remote(url)
            file = Path(folder) / PurePosixPath(remote).name
            filesystem.get_file(remote, str(file))
            yield _unzipped(file, folder)


def _unzipped(file: Path, folder: str) -> Path:
    if file.suffix != ".zip":
        return file
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise Fail(f"{file.name} holds {len(members)} files; a zip that is read as a table must hold exactly one")
        unpacked = Path(folder) / "unpacked" / (PurePosixPath(members[0].filename).name or "member")
        unpacked.parent.mkdir()
        with archive.open(members[0]) as packed, unpacked.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    return unpacked


def _below_roots(text: str, context: Context) -> Path:
    """The real place of a local path: symlinks are followed before it is held against the allowed folders.

    A relative path is one below the first root where it exists, else below the first root.
    """
    names = (*context.settings.get("file_roots", ()), context.settings.get("artifacts_root", ""))
    roots = [Path(name.removeprefix("file://")).resolve() for name in names if _is_local(name)]
    if not Path(text).is_absolute() and not context.settings.get("file_roots"):
        raise Refused(
            f"{text} is a relative path, and no folder is open to files.*: PIPELINE_FILE_ROOTS names those that are,"
            " as PIPELINE_FILE_ROOTS=$PWD"
        )
    places = [root / text for root in roots]
    real = next((place for place in places if place.exists()), places[0] if places else Path(text)).resolve()
    if not any(real.is_relative_to(root) for root in roots):
        raise Refused(f"{text} lies outside the folders that files.* may use; PIPELINE_FILE_ROOTS names them")
    return real


def _is_local(root: str) -> bool:
    return bool(root) and ("://" not in root or root.startswith("file://"))


def _resource(rest: str, context: Context) -> Traversable:
    """A data file of an installed package, found without importing the package."""
    package, _, name = rest.partition("/")
    if package not in context.settings.get("data_packages", ()):
        raise Refused(f"package://{rest}: PIPELINE_DATA_PACKAGES does not name {package!r}")
    parts = name.split("/")
    spec = importlib.util.find_spec(package)
    reader = getattr(spec.loader, "get_resource_reader", lambda _: None)(package) if spec else None
    if reader is None:
        raise Fail(f"package://{rest}: package {package!r} is not installed")
    if any(part in ("", ".", "..") for part in parts) or not (found := reader.files().joinpath(*parts)).is_file():
        raise Fail(f"package://{rest}: package {package!r} has no file {name!r}")
    resource: Traversable = found
    return resource


def _remote(url: str) -> tuple[Any, str]:
    try:
        filesystem, remote = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as exc:
        raise Fail(f"{url}: {exc}") from exc
    return filesystem, str(remote)


def _put(made: Path, digest: str, url: str, overwrite: bool, context: Context) -> str:
    """Puts a finished file in its place at once; returns the URL of the place."""
    scheme, rest = _split(url, context)
    if scheme == "package":
        raise Refused(f"{url}: the data files of packages are read only")
    if scheme != "file":
        filesystem, remote = _remote(url)
        if not overwrite and filesystem.exists(remote):
            with filesystem.open(remote, "rb") as stream:
                same = hashlib.file_digest(stream, "sha256").hexdigest() == digest
            if not same:
                raise Fail(f"{url} exists with other content; overwrite: true replaces it")
            return url
        filesystem.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
        filesystem.put_file(str(made), remote + ".writing")
        filesystem.mv(remote + ".writing", remote)
        return url
    target = _below_roots(rest, context)
    artifacts = context.settings.get("artifacts_root", "")
    if overwrite and _is_local(artifacts) and target.is_relative_to(Path(artifacts.removeprefix("file://")).resolve()):
        raise Refused(f"{url}: artifacts never change; write below one of PIPELINE_FILE_ROOTS")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as folder:
        beside = Path(folder) / target.name
        shutil.copyfile(made, beside)
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        if overwrite:
            beside.replace(target)
        else:
            try:
                os.link(beside, target)  # unlike a rename, it fails where the name is taken
            except FileExistsError:
                if not target.is_file() or _digest(target) != digest:
                    raise Fail(f"{url} exists with other content; overwrite: true replaces it") from None
    return target.as_uri()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
