"""The hub, end to end: huggingface_hub in a process of its own against a hub on 127.0.0.1."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType

import forked
from checkpoint import gguf_files
from gemcut.checkpoint import hub as our_hub
from gemcut.checkpoint import hub_header
from gemcut.checkpoint.gguf_header import read_header
from gemcut.checkpoint.resolve import resolve
from gemcut.errors import CheckpointError, CheckpointNotFoundError
from support import ROOT, hf_model, save_checkpoint, tiny_config

spec = importlib.util.spec_from_file_location("fake_hub", Path(__file__).with_name("fake_hub.py"))
assert spec
assert spec.loader
fake_hub = importlib.util.module_from_spec(spec)
sys.modules["fake_hub"] = fake_hub
spec.loader.exec_module(fake_hub)
FakeHub, Repository = fake_hub.FakeHub, fake_hub.Repository

CLIENT = """
import json, sys
from gemcut.checkpoint.resolve import resolve
from gemcut.errors import GemcutError
if sys.argv[2] == "small-disk":
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
seen = []
try:
    source = resolve(progress=lambda *bytes: seen.append(bytes), **json.loads(sys.argv[1]))
    answer = {"path": str(source.path), "revision": source.revision, "name": source.name, "seen": seen,
              "notice": source.licence_notice, "dtype": source.config().torch_dtype}
    if sys.argv[2] != "no-weights":
        answer["sum"] = {name: float(tensor.double().sum()) for name, tensor in source.tensors()}
        answer["stored"] = str(source.stored_dtype)
except GemcutError as error:
    answer = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(answer))
"""


def ask(home: Path, url: str, mode: str = "", env: dict[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """Call ``resolve`` in a process of its own whose hub is at ``url`` and whose cache is ``home``."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **(env or {})}
    done = forked.run([json.dumps(arguments), mode], env=environment, code=CLIENT)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert "\n" not in answer.get("message", "")
    return answer


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """main: fp32 in shards, with files nobody needs; float16: another commit, one file."""
    base = tmp_path_factory.mktemp("hub")
    main = save_checkpoint(base / "main", hf_model(tiny_config()), max_shard_size="100KB", eos_token_id=[1, 107])
    (main / "chat_template.jinja").write_text("{{ messages }}")
    (main / "additional_chat_templates").mkdir()
    (main / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0].content }}")
    for name in ("README.md", "pytorch_model.bin", "tiny.gguf", "original/model.safetensors", "onnx/config.json"):
        (main / name).parent.mkdir(exist_ok=True)
        (main / name).write_bytes(b"not needed")
    half = save_checkpoint(base / "half", hf_model(tiny_config(), seed=1, dtype=torch.float16))
    return {"main": main, "float16": half}


@pytest.mark.slow  # a dozen processes
def test_a_repository_end_to_end(tmp_path: Path, branches: dict[str, Path]) -> None:
    repository = Repository(branches)
    with FakeHub({"acme/tiny": repository}) as hub:
        config_only = ask(tmp_path, hub.url, "no-weights", name="acme/tiny", weights=False)
        assert not hub.asked("GET", ".safetensors/") + [p for p in hub.asked("GET", ".safetensors") if "index" not in p]
        offline = {"HF_HUB_OFFLINE": "1"}
        partial = ask(tmp_path, hub.url, env=offline, name="acme/tiny")
        assert partial["error"] == "CheckpointNotFoundError"
        assert "HF_HUB_OFFLINE" in partial["message"]

        answer = ask(tmp_path, hub.url, name="acme/tiny")
        assert answer["revision"] == config_only["revision"] == repository.commit("main")
        assert answer["stored"] == "torch.float32"
        fetched = {path.rsplit("/", 1)[1] for path in hub.asked("GET", "/resolve/")}
        known = {path.name for path in branches["main"].iterdir()} - {"README.md", "pytorch_model.bin"}
        assert fetched <= known | {"short.jinja"}
        assert not any(part in path for path in hub.asked("GET", "/resolve/") for part in ("gguf", "original", "onnx"))
        assert {"config.json", "generation_config.json", "chat_template.jinja", "short.jinja"} <= fetched
        expected = {name: float(value.double().sum()) for name, value in hf_model(tiny_config()).state_dict().items()}
        assert answer["sum"]["embed.weight"] == pytest.approx(expected["model.embed_tokens.weight"])
        assert answer["seen"]
        assert answer["seen"][-1][0] == answer["seen"][-1][1]

        half = ask(tmp_path, hub.url, name="acme/tiny", revision="float16")
        assert half["revision"] == repository.commit("float16") != answer["revision"]
        assert half["stored"] == "torch.float16"

        before = len(hub.requests)
        for options in ({"env": offline}, {"local_files_only": True}):
            again = ask(tmp_path, hub.url, name="acme/tiny", revision="float16", **options)
            assert again["sum"] == half["sum"]
            by_commit = ask(tmp_path, hub.url, name="acme/tiny", revision=answer["revision"], **options)
            assert by_commit["sum"] == answer["sum"]
        assert len(hub.requests) == before


def test_a_push_between_two_requests_cannot_mix_versions(tmp_path: Path, branches: dict[str, Path]) -> None:
    with FakeHub({"acme/tiny": Repository(branches)}) as hub:
        answer = ask(tmp_path, hub.url, name="acme/tiny", cache_dir=str(tmp_path / "elsewhere"))
        assert str(tmp_path / "elsewhere") in answer["path"]
        assert all(answer["revision"] in path for path in hub.asked("GET", "/resolve/"))
        assert len([p for p in hub.asked("GET", "/api/models/acme/tiny") if "/tree/" not in p]) == 1


FACADE = """
import json, sys
from gemcut import AutoTokenizer
from transformers import AutoTokenizer as Theirs
chat = [{"role": "user", "content": "Hello"}]
ours, theirs = (one.from_pretrained("acme/chat") for one in (AutoTokenizer, Theirs))
print(json.dumps([[t.apply_chat_template(chat, chat_template=name, tokenize=False) for name in ("short", None)]
                  for t in (ours, theirs)]))
"""


@pytest.mark.slow  # the real tokenizer, twice
def test_additional_chat_templates_are_fetched_and_taken_by_name(tmp_path: Path) -> None:
    repository = save_checkpoint(tmp_path / "chat", hf_model(tiny_config()), tokenizer=True)
    (repository / "additional_chat_templates").mkdir()
    (repository / "additional_chat_templates" / "short.jinja").write_text("<{{ messages[0].content }}>")
    (repository / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    with FakeHub({"acme/chat": Repository({"main": repository})}) as hub:
        environment |= {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", FACADE], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads(done.stdout.splitlines()[-1])
    assert ours == theirs == ["<Hello>", "[Hello]"]


@pytest.mark.slow
def test_gated_repositories_say_what_to_do(tmp_path: Path, branches: dict[str, Path]) -> None:
    with FakeHub({"google/gemma-2-27b-it": Repository(branches, gated_for="hf_good")}) as hub:
        page = f"{hub.url}/google/gemma-2-27b-it"
        without = ask(tmp_path, hub.url, name="27b-it")
        assert without["error"] == "GatedRepositoryError"
        assert f"accept the licence on {page}" in without["message"]
        assert "hf auth login" in without["message"]
        assert "HF_TOKEN" in without["message"]
        refused = ask(tmp_path, hub.url, name="gemma-2-27b-it", token="hf_other")
        assert refused["error"] == "GatedRepositoryError"
        assert "this token's account has no access" in refused["message"]
        assert page in refused["message"]
        assert "hf_other" not in refused["message"]
        granted = ask(tmp_path, hub.url, name="google/gemma-2-27b-it", env={"HF_TOKEN": "hf_good"})
        assert granted["name"] == "google/gemma-2-27b-it"
        assert "Gemma Terms of Use" in granted["notice"]
        assert not [path for _, path, _ in hub.requests if "telemetry" in path]


@pytest.mark.slow
def test_names_the_hub_does_not_have(tmp_path: Path, branches: dict[str, Path]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("hello")
    with FakeHub({"acme/tiny": Repository(branches), "acme/empty": Repository({"main": empty})}) as hub:
        unknown = ask(tmp_path, hub.url, name="acme/nothing")
        assert unknown["error"] == "CheckpointNotFoundError"
        assert "the hub has no repository acme/nothing" in unknown["message"]
        revision = ask(tmp_path, hub.url, name="acme/tiny", revision="float8")
        assert revision["error"] == "CheckpointNotFoundError"
        assert "acme/tiny has no revision 'float8'" in revision["message"]
        nothing = ask(tmp_path, hub.url, name="acme/empty")
        assert nothing["error"] == "CheckpointNotFoundError"
        assert "does not hold config.json" in nothing["message"]
        invalid = ask(tmp_path, hub.url, name="acme/..")
        assert invalid["error"] == "CheckpointNotFoundError"


@pytest.mark.slow
def test_nothing_cached_and_nobody_there(tmp_path: Path) -> None:
    offline = ask(tmp_path, "http://127.0.0.1:9", env={"HF_HUB_OFFLINE": "1"}, name="2b-it")
    assert offline["error"] == "CheckpointNotFoundError"
    assert "google/gemma-2-2b-it is not complete in the cache and going online is switched off" in offline["message"]
    down = ask(tmp_path, "http://127.0.0.1:9", name="2b-it")
    assert down["error"] == "CheckpointError"
    assert "cannot reach http://127.0.0.1:9" in down["message"]


@pytest.mark.slow
def test_a_broken_connection_resumes(tmp_path: Path) -> None:
    """huggingface_hub keeps what it has in steps of 10 MiB, so the file must be larger than that."""
    model = save_checkpoint(tmp_path / "large", hf_model(tiny_config(vocab_size=120_000)))
    with FakeHub({"acme/large": Repository({"main": model})}, cut_after=11 << 20) as hub:
        answer = ask(tmp_path, hub.url, name="acme/large")
        assert answer["stored"] == "torch.float32"
        ranges = [headers["range"] for method, path, headers in hub.requests if "range" in headers and method == "GET"]
        assert ranges[0] == f"bytes={10 << 20}-"
        hub.cut_after = 1000  # never enough for a step
        broken = ask(tmp_path / "other", hub.url, name="acme/large")
        assert broken["error"] == "CheckpointError"
        assert "downloading acme/large failed" in broken["message"]
        assert "try again: finished files are kept" in broken["message"]
        assert not list((tmp_path / "other").rglob("model.safetensors"))


@pytest.mark.slow
def test_a_full_disk_while_downloading(tmp_path: Path, branches: dict[str, Path]) -> None:
    with FakeHub({"acme/tiny": Repository({"main": branches["float16"]})}) as hub:
        answer = ask(tmp_path, hub.url, "small-disk", name="acme/tiny")
        assert answer["error"] == "CheckpointError"
        assert "no space left in" in answer["message"]
        assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))
        assert "sum" in ask(tmp_path, hub.url, name="acme/tiny")


@pytest.mark.parametrize(
    "name", ["gemma-9", "", " ", "a/b/c", "./missing", "x.gguf", "acme/x.gguf", "nul\0byte", "x" * 5000, "a b/c"]
)
def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError) as caught:
        resolve(name)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "short", ["2b", "2b-it", "9b", "9b-it", "27b", "27b-it", "gemma-2-27b-it", "gemma-2-2b", "27B-IT"]
)
def test_short_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, short: str) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(our_hub, "download", lambda repo, **_: (asked.append(repo), (tmp_path, "0" * 40))[1])
    source = resolve(short)
    assert asked == ["google/gemma-2-" + short.lower().removeprefix("gemma-2-")]
    assert source.licence_notice


@pytest.mark.slow  # six processes
def test_a_repository_of_gguf_files(tmp_path: Path) -> None:
    """It lists its files, and gives one by name or by quantization; a split one with all its parts."""
    folder = tmp_path / "repo"
    (folder / "f32").mkdir(parents=True)
    model = gguf_files.tiny(2)
    gguf_files.write(folder / "f32" / "tiny-f32.gguf", model, gguf_files.metadata(model), split_max_tensors=30)
    gguf_files.write(folder / "tiny-F16.gguf", model, gguf_files.metadata(model), kind=GGMLQuantizationType.F16)
    (folder / "mmproj-tiny.gguf").write_bytes(b"not needed")
    with FakeHub({"acme/tiny-gguf": Repository({"main": folder})}) as hub:
        listed = ask(tmp_path / "home", hub.url, name="acme/tiny-gguf", weights=False)
        assert listed["error"] == "CheckpointNotFoundError"
        assert "holds 2 GGUF files and no safetensors checkpoint; choose one: " in listed["message"]
        assert listed["message"].endswith("acme/tiny-gguf:f32, acme/tiny-gguf:F16")
        half = ask(tmp_path / "home", hub.url, name="acme/tiny-gguf:tiny-F16.gguf")
        assert half["path"].endswith("tiny-F16.gguf")
        assert not [path for path in hub.asked("GET", "/resolve/") if "f32" in path or "mmproj" in path]
        whole = ask(tmp_path / "home", hub.url, name="acme/tiny-gguf:f32")
        expected = model.model.embed_tokens.weight.double().sum().item()
        assert whole["sum"]["embed.weight"] == pytest.approx(expected)
        again = ask(tmp_path / "home", hub.url, env={"HF_HUB_OFFLINE": "1"}, name="acme/tiny-gguf:f32")
        assert again == {**whole, "seen": again["seen"]}
        wrong = ask(tmp_path / "home", hub.url, name="acme/tiny-gguf:Q4_K_M")
        assert "acme/tiny-gguf holds no Q4_K_M; choose one" in wrong["message"]


@pytest.fixture(scope="module")
def large_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one F32 file in two parts, of 10 and 14 MB."""
    folder = tmp_path_factory.mktemp("large") / "repo"
    folder.mkdir()
    model = gguf_files.tiny(2, hidden_size=64, intermediate_size=8192)
    gguf_files.write(folder / "x-f32.gguf", model, gguf_files.metadata(model), split_max_tensors=24)
    assert [path.stat().st_size > 9 << 20 for path in sorted(folder.iterdir())] == [True, True]
    return folder


@pytest.mark.slow  # six processes
@pytest.mark.parametrize("ranges", [True, False])
def test_a_plan_of_a_gguf_file_fetches_its_header(large_gguf: Path, tmp_path: Path, ranges: bool) -> None:
    """Of each part the first 8 MiB, in which its header ends. A server that knows no ranges begins to send all."""
    parts = {path.name: path.stat().st_size for path in large_gguf.iterdir()}
    here = planned(tmp_path / "home", "", str(large_gguf / min(parts)))
    with FakeHub({"acme/large": Repository({"main": large_gguf})}, ranges=ranges) as hub:
        there = planned(tmp_path / "home", hub.url, "acme/large:F32")
        assert there["plans"] == here["plans"]
        assert there["config_from"] == "acme/large:F32 on the hub"
        assert hub.sent == {name: min(size, 8 << 20) if ranges else size for name, size in parts.items()}
        header = ask(tmp_path / "home", hub.url, "no-weights", name="acme/large:F32", weights=False)
        assert header["revision"] == hub.repositories["acme/large"].commit("main")
        assert not Path(header["path"]).exists()  # gone with its process
        refused = ask(tmp_path / "home", hub.url, name="acme/large:F32", weights=False)
        assert "the header alone was fetched" in refused["message"]
        if not ranges:
            return
        whole = ask(tmp_path / "home", hub.url, name="acme/large:F32")
        assert len(whole["sum"]) == 4 * 11 + 2
        hub.sent.clear()
        again = planned(tmp_path / "home", hub.url, "acme/large:F32")  # from the cache now
        assert again["plans"] == here["plans"]
        assert again["config_from"] == whole["path"]
        assert sum(hub.sent.values()) == 0


def planned(home: Path, url: str, name: str) -> dict[str, Any]:
    """``gemcut plan NAME --json`` for 1 GB, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    done = forked.run(["plan", name, "--json", "--memory", "1GB"], env=environment, module="gemcut")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("first", [24, 300, 5_000, 20_000, 1 << 20])
def test_a_header_is_fetched_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """However little is asked for first, the header comes out as that of the whole file, and little else is asked."""
    model = gguf_files.tiny(2, hidden_size=64)
    path = gguf_files.write(tmp_path / "x.gguf", model, gguf_files.metadata(model))
    data = path.read_bytes()
    sent = 0

    def slices(url: str, headers: dict[str, str], start: int, stop: int) -> tuple[bytes, int]:
        nonlocal sent
        sent = max(sent, stop)
        return data[start:stop], len(data)

    monkeypatch.setattr(hub_header, "_FIRST", first)
    monkeypatch.setattr(hub_header, "_range", slices)
    hub_header.fetch_headers(lambda name: name, {}, ["x.gguf"], tmp_path / "to")
    found, whole = read_header(tmp_path / "to" / "x.gguf"), read_header(path)
    end = min(tensor.offset for tensor in whole.tensors.values())
    assert found.digest == whole.digest
    assert {n: (t.shape, t.offset) for n, t in found.tensors.items()} == {
        n: (t.shape, t.offset) for n, t in whole.tensors.items()
    }
    assert sent <= max(first, 2 * end)
    config = resolve(tmp_path / "to" / "x.gguf").config()
    assert config == resolve(path).config()


def test_a_mirror_without_ranges_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte from its beginning, whatever part is asked for: the part comes, and the rest is not waited for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
            with contextlib.suppress(OSError):  # the reader leaves
                for _ in range(1 << 24):
                    self.wfile.write(bytes(range(256)) * 256)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/x.gguf"
            found, size = hub_header._range(url, {}, 300, 70_000)
        finally:
            server.shutdown()
    assert size == 1 << 40
    assert found == (bytes(range(256)) * 300)[300:70_000]


def test_a_damaged_header_on_the_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no more downloaded than it takes to see that."""
    model = gguf_files.tiny(2, hidden_size=64)
    data = gguf_files.write(tmp_path / "x.gguf", model, gguf_files.metadata(model)).read_bytes()
    monkeypatch.setattr(hub_header, "_FIRST", 2_000)
    for broken, message in (
        (b"<html>" + data, "is not a GGUF file"),
        (data[:8] + b"\xff" * 16 + data[24:], "is a damaged GGUF file"),
        (data[:24] + (1 << 40).to_bytes(8, "little") + data[32:], "is a damaged GGUF file"),
        (data[:3_000], "is a damaged GGUF file"),
    ):
        asked: list[int] = []

        def slices(url: str, headers: object, start: int, stop: int) -> tuple[bytes, int]:
            asked.append(stop)  # noqa: B023
            return broken[start:stop], len(broken)  # noqa: B023

        monkeypatch.setattr(hub_header, "_range", slices)
        with pytest.raises(CheckpointError, match=message):
            hub_header.fetch_headers(lambda name: name, {}, ["x.gguf"], tmp_path / "to")
        assert len(asked) <= 2
