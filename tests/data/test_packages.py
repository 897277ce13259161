"""Packages of PyPI and Debian: fetched by the real pip and apt-get from archives that lie here, unpacked, read."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from gemcut.data.packages import Package, _members, _wanted, fetch
from gemcut.data.recipe import read_recipe
from gemcut.errors import DataError, ParameterError, RecipeError

from ..cli.conftest import Cli, cli  # noqa: F401
from .corpus import flow, run, sentences, write_recipe

apt = pytest.mark.skipif(
    not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="needs apt-get and dpkg-deb, of Debian"
)
RECIPE = """
[[source]]
name = "letters"
package = "pypi:invented-letters==1.5"
reader = "text"
paths = ["letters/*.txt"]
licence = "CC0-1.0"
"""


def write_wheel(folder: Path, name: str = "invented_letters", version: str = "1.5") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("letters/a.txt", sentences(1))
        wheel.writestr("letters/b.txt", sentences(2))
        wheel.writestr("letters/code.py", "raise SystemExit('run')\n")
        wheel.writestr("../outside.txt", sentences(3))
        wheel.writestr("/absolute.txt", sentences(4))
        wheel.writestr(f"{info}/LICENSE", "free")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def write_deb(folder: Path, name: str = "invented-book", version: str = "2:1.0-3") -> Path:
    """A package as dpkg-deb makes it, with a link out of it."""
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: Nobody <a@example.com>\n"
    (tree / "DEBIAN" / "control").write_text(control + "Description: invented\n")
    (tree / "DEBIAN" / "postinst").write_text("#!/bin/sh\ntouch /tmp/never-run\n")
    (tree / "DEBIAN" / "postinst").chmod(0o755)
    book = tree / "usr" / "share" / "book"
    book.mkdir(parents=True)
    (book / "one.txt").write_text(sentences(5))
    (book / "picture.png").write_bytes(b"png")
    (book / "link.txt").symlink_to("/etc/passwd")
    (tree / "usr" / "share" / "doc").mkdir()
    (tree / "usr" / "share" / "doc" / "copyright").write_text("free")
    path = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, path], check=True, capture_output=True)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip looks into a folder of this test alone."""
    monkeypatch.setenv("GEMCUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    write_wheel(tmp_path / "wheels")
    return tmp_path


def names(package: Package) -> list[str]:
    return sorted(p.relative_to(package.files).as_posix() for p in package.files.rglob("*") if p.is_file())


@pytest.mark.slow
def test_from_nothing_to_documents_with_two_commands(here: Path, cli: Cli) -> None:  # noqa: F811
    recipe = write_recipe(here, RECIPE)
    missing = cli("data", "run", recipe, here / "out")
    assert missing.code == 2
    assert f"letters: pypi:invented-letters==1.5 is not here; run: gemcut data fetch {recipe}" in missing.err
    fetched = cli("data", "fetch", recipe)
    assert fetched.code == 0
    assert "pypi:invented-letters 1.5" in fetched.out
    package = Package.parse("pypi:invented-letters==1.5")
    assert names(package) == ["invented_letters-1.5.dist-info/LICENSE", "letters/a.txt", "letters/b.txt"]
    assert not list(here.rglob("outside.txt"))
    assert "was here" in cli("data", "fetch", recipe).out
    done = cli("data", "run", recipe, here / "out", "--json")
    report = json.loads(done.out)
    assert report["totals"]["documents_out"] == 2
    wheel = hashlib.sha256((here / "wheels" / "invented_letters-1.5-py3-none-any.whl").read_bytes()).hexdigest()
    assert report["sources"]["letters"]["package"] == {
        "package": "pypi:invented-letters==1.5", "version": "1.5", "sha256": wheel
    }  # fmt: skip
    assert report["licences"] == {"CC0-1.0": len(sentences(1)) + len(sentences(2))}


@pytest.mark.slow
def test_what_pip_cannot_bring(here: Path, cli: Cli) -> None:  # noqa: F811
    """The others are fetched all the same; one line for each that is not."""
    other = RECIPE.replace('"letters"', '"more"', 1).replace("1.5", "9.9")
    found = cli("data", "fetch", write_recipe(here, other + RECIPE))
    assert found.code == 2
    assert "pip did not bring pypi:invented-letters==9.9 (ERROR: No matching distribution found" in found.err
    assert len(found.err.strip().splitlines()) == 1
    assert "invented-letters 1.5" in found.out
    assert not list((here / "cache").rglob("*.unfinished"))


@apt
@pytest.mark.slow
def test_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get with a repository in a folder, and all of its state beside it."""
    monkeypatch.setenv("GEMCUT_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "repository"
    repository.mkdir()
    deb = write_deb(tmp_path)
    shutil.copy(deb, repository / "book.deb")
    data = (repository / "book.deb").read_bytes()
    index = "Package: invented-book\nVersion: 2:1.0-3\nArchitecture: all\nMaintainer: Nobody\nFilename: ./book.deb\n"
    index += f"Size: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\nDescription: invented\n"
    (repository / "Packages").write_text(index)
    for name in ("lists/partial", "cache/archives/partial", "etc"):
        (tmp_path / "apt" / name).mkdir(parents=True)
    (tmp_path / "apt" / "sources.list").write_text(f"deb [trusted=yes] file:{repository} ./\n")
    (tmp_path / "apt" / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/apt/sources.list";\nDir::Etc::sourceparts "-";\n'
        f'Dir::State::lists "{tmp_path}/apt/lists";\nDir::Cache "{tmp_path}/apt/cache";\nAPT::Sandbox::User "root";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt" / "apt.conf"))
    updated = subprocess.run(["apt-get", "update"], capture_output=True, text=True)
    if updated.returncode:
        pytest.skip(f"apt-get cannot be used here: {updated.stderr.splitlines()[-1:]}")
    package = Package.parse("debian:invented-book")
    found = fetch(package, ["usr/share/book"])
    assert (found.version, found.new) == ("2:1.0-3", True)
    assert names(package) == ["usr/share/book/one.txt", "usr/share/book/picture.png", "usr/share/doc/copyright"]
    assert (package.files / "usr/share/book/one.txt").read_text() == sentences(5)
    assert not fetch(package, ["usr/share/book"]).new
    assert not Path("/tmp/never-run").exists()
    with pytest.raises(DataError, match=r"apt-get did not bring debian:not-there \(E: .*\); try `apt-get upd"):
        fetch(Package.parse("debian:not-there"), ["usr"])


@pytest.mark.slow
def test_archives_that_are_damaged(here: Path) -> None:
    wheel = here / "wheels" / "invented_letters-1.5-py3-none-any.whl"
    whole = wheel.read_bytes()
    position = whole.index(sentences(2)[:40].encode())
    wheel.write_bytes(whole[: position + 5] + b"?" + whole[position + 6 :])
    with pytest.raises(DataError, match=r"letters-1.5-py3-none-any.whl is damaged \(.*CRC.*\); fetch it again"):
        fetch(Package.parse("pypi:invented-letters==1.5"), ["letters"])
    assert not [path for path in (here / "cache").rglob("*") if path.is_file()]


@apt
def test_a_broken_deb_and_links(tmp_path: Path) -> None:
    deb = write_deb(tmp_path)
    inside = [name for name, *_ in _members(deb)]
    assert inside == ["usr/share/book/one.txt", "usr/share/book/picture.png", "usr/share/doc/copyright"]
    broken = tmp_path / "broken.deb"
    broken.write_bytes(deb.read_bytes()[:300])
    with pytest.raises(tarfile.TarError):
        list(_members(broken))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pypi:a==1.0", "pypi:a==1.0"),
        ("debian:abc", "debian:abc"),
        ("debian:abc=1:2.0-3", "debian:abc=1:2.0-3"),
        ("pypi:a", None),
        ("pypi:a>=1", None),
        ("npm:a", None),
        ("pypi:--index-url==1", None),
        ("debian:-o=x", None),
        ("debian:a b", None),
        ("debian:../x", None),
    ],
)
def test_names_of_packages(text: str, shown: str | None) -> None:
    """Nothing that a client would take for an option, or that leads out of the cache."""
    if shown is not None:
        assert str(Package.parse(text)) == shown
    else:
        with pytest.raises(ParameterError, match="package is"):
            Package.parse(text)


def test_paths_stay_in_the_package(tmp_path: Path) -> None:
    for path in ("../x", "/etc/passwd", "a/../../x", "s3://x/y", "~/x"):
        text = RECIPE.replace("letters/*.txt", path)
        with pytest.raises(RecipeError, match="with a package they are below its folder"):
            read_recipe(write_recipe(tmp_path, text))


def test_patterns() -> None:
    wanted = {
        "a/b.txt": ("a", "a/", "a/*.txt", "**/*.txt", "a/**/*.txt", "*"),
        "a/b/c/d.txt": ("a", "a/**/*.txt", "**/d.txt", "a/b"),
    }
    for name, patterns in wanted.items():
        assert all(_wanted(name, [pattern]) for pattern in patterns)
    assert not _wanted("a/b.png", ["a/*.txt"])
    assert not _wanted("ab/c.txt", ["a"])


READER = """
def letters(data, name):
    for text in data.decode().split("---"):
        yield {"text": text, "id": name + text[:3], "licence": "MIT"} if name.startswith("b") else text

def breaks(data, name):
    yield "one text"
    raise ValueError("broken")

def wrong(data, name):
    yield {"body": "text"}

def few(data):
    yield ""
"""
OWN = """
[[source]]
name = "own"
reader = "mine.py:{}"
paths = ["files/*"]
licence = "CC0-1.0"
"""


def test_a_reader_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(READER)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.bin").write_text("first---second")
    (tmp_path / "files" / "b.bin.gz").write_bytes(gzip.compress(b"third---\x00"))
    report = run(write_recipe(tmp_path, OWN.format("letters")), tmp_path / "out")
    assert flow(report, "read", "own")["dropped"] == {"NUL characters": {"documents": 1, "bytes": 1}}
    assert report["licences"] == {"CC0-1.0": len("firstsecond"), "MIT": len("third")}
    report = run(write_recipe(tmp_path, OWN.format("breaks")), tmp_path / "out2")
    assert flow(report, "read", "own")["documents_out"] == 2
    assert list(flow(report, "read", "own")["dropped"]) == ["raised ValueError: the rest of the file is lost"]
    with pytest.raises(DataError, match=r"the reader wrong gave \{'body': 'text'\}; expected a text, or keys of text"):
        run(write_recipe(tmp_path, OWN.format("wrong")), tmp_path / "out3")
    with pytest.raises(RecipeError, match=r"few of .* cannot be called with \(data, name\)"):
        read_recipe(write_recipe(tmp_path, OWN.format("few")))
    with pytest.raises(RecipeError, match="unknown key 'text_key'"):
        read_recipe(write_recipe(tmp_path, OWN.format("letters") + 'text_key = "x"\n'))
