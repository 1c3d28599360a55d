"""Names on the hub, against a server on this machine that answers as the hub does."""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from checkpoint_files import HUB_FORMS, published, same, write_hub_folder
from huggingface_hub import constants

from mpt import MptConfig, MptForCausalLM
from mpt.hub import is_hub_name, local_path
from trainer.data import find_tokenizer

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves `folder`/REPOSITORY/REVISION; keeps what it sent, and wants a token for private/..."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.sent: list[str] = []
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.server.asked += 1
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[0] == "api"
        owner, name, _, revision, *rest = parts[2:] if api else parts
        revision = next((branch for branch, commit in COMMITS.items() if commit == revision), revision)
        repository = self.server.folder / owner / name
        if owner == "private" and self.headers.get("Authorization") != "Bearer secret":
            return self.fail(401, "GatedRepo" if name == "gated" else "RepoNotFound")
        if not repository.is_dir():
            return self.fail(404, "RepoNotFound")
        if revision not in COMMITS or not (repository / revision).is_dir():
            return self.fail(404, "RevisionNotFound")
        files = sorted(path.name for path in (repository / revision).iterdir())
        if api:
            hashes = {file: hashlib.sha1((repository / revision / file).read_bytes()).hexdigest() for file in files}
            tree = [
                {"type": "file", "path": f, "oid": hashes[f], "size": (repository / revision / f).stat().st_size}
                for f in files
            ]
            info = {"id": f"{owner}/{name}", "sha": COMMITS[revision], "siblings": [{"rfilename": f} for f in files]}
            return self.send(json.dumps(tree if "tree" in parts else info).encode(), revision, body)
        if rest[0] not in files:
            return self.fail(404, "EntryNotFound", revision)
        if body:
            self.server.sent.append(rest[0])
        return self.send((repository / revision / rest[0]).read_bytes(), revision, body)

    def fail(self, code: int, kind: str, revision: str = "main") -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", kind)
        self.send_header("X-Repo-Commit", COMMITS[revision])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, data: bytes, revision: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMITS[revision])
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "served").mkdir()
    with Hub(tmp_path / "served") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("form", HUB_FORMS)
def test_a_model_by_its_name(hub: Hub, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Only what is needed is downloaded, once; then it loads offline."""
    model = published()
    write_hub_folder(hub.folder / "mosaicml/tiny" / "main", model.state_dict(), form)
    other = "safetensors" if form.startswith("bin") else "bin"
    (hub.folder / "mosaicml/tiny/main" / f"flax_model.{other}").write_bytes(b"another framework's")
    if other == "bin":
        write_hub_folder(hub.folder / "mosaicml/tiny" / "main", model.state_dict(), form.replace("safetensors", "bin"))
    assert MptConfig.from_pretrained("mosaicml/tiny") == model.config
    assert hub.sent == ["config.json"]
    assert same(MptForCausalLM.from_pretrained("mosaicml/tiny"), model)
    kinds = {Path(name).suffix for name in hub.sent}
    assert kinds <= {".json", f".{form.split()[0]}"} and len(hub.sent) == len(set(hub.sent)), hub.sent
    assert sum(not name.endswith(".json") for name in hub.sent) == (2 if form.endswith("shards") else 1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = list(hub.sent)
    assert same(MptForCausalLM.from_pretrained("mosaicml/tiny"), model) and hub.sent == before


def test_a_revision(hub: Hub) -> None:
    models = {"main": published(), "v1": published()}
    for revision, model in models.items():
        write_hub_folder(hub.folder / "mosaicml/tiny" / revision, model.state_dict(), "safetensors")
    assert same(MptForCausalLM.from_pretrained("mosaicml/tiny", revision="v1"), models["v1"])
    assert same(MptForCausalLM.from_pretrained("mosaicml/tiny", revision=COMMITS["main"]), models["main"])
    with pytest.raises(ValueError, match=r"revision v2 of mosaicml/tiny does not exist on the hub"):
        MptForCausalLM.from_pretrained("mosaicml/tiny", revision="v2")


def test_a_token_opens_what_is_private(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = published()
    for name in ("hidden", "gated"):
        write_hub_folder(hub.folder / "private" / name / "main", model.state_dict(), "safetensors")
    with pytest.raises(
        ValueError, match=r"private/hidden is neither a path here nor a model on the hub that you can see"
    ):
        MptForCausalLM.from_pretrained("private/hidden")
    with pytest.raises(ValueError, match=r"private/gated is gated on the hub: .*HF_TOKEN"):
        MptForCausalLM.from_pretrained("private/gated")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert same(MptForCausalLM.from_pretrained("private/hidden"), model)


def test_a_hub_out_of_reach_is_told_at_once(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.shutdown()
    hub.server_close()
    library = logging.getLogger("huggingface_hub")
    before, library.propagate = library.propagate, True
    start = time.monotonic()
    try:
        with pytest.raises(ValueError, match=r"mosaicml/tiny is not a path here, .*the hub cannot be reached"):
            MptConfig.from_pretrained("mosaicml/tiny")
        with pytest.raises(ValueError, match=r"could not be had from the hub \(.*\); give a local folder"):
            find_tokenizer("mosaicml/tiny")
    finally:
        library.propagate = before
    assert time.monotonic() - start < 5 and not caplog.records


def test_what_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"runs/mpt-tny is neither a path here nor a model on the hub"):
        MptForCausalLM.from_pretrained("runs/mpt-tny")
    (hub.folder / "mosaicml/empty/main").mkdir(parents=True)
    (hub.folder / "mosaicml/empty/main/config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"mosaicml/empty has no model\.safetensors or pytorch_model\.bin, whole or in"
    ):
        MptForCausalLM.from_pretrained("mosaicml/empty")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    advice = r"HF_HUB_OFFLINE is set: run `hf download mosaicml/mpt-7b --local-dir FOLDER` .* and give its path"
    for load in (MptForCausalLM.from_pretrained, MptConfig.from_pretrained):
        with pytest.raises(ValueError, match=advice):
            load("mosaicml/mpt-7b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(
        ValueError, match=r"mosaicml/mpt-7b is not a path here, .* and the hub cannot be reached \(.*\): run"
    ):
        MptForCausalLM.from_pretrained("mosaicml/mpt-7b")


def test_a_path_that_is_here_comes_first(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mosaicml/mpt-7b").mkdir(parents=True)
    assert local_path("mosaicml/mpt-7b") == Path("mosaicml/mpt-7b") and not hub.sent
    for path in ("./mosaicml/mpt-9b", "/mosaicml/mpt-9b", "mosaicml", "a/b/c", "../b", "a/..", "runs/naïve", ""):
        assert not is_hub_name(path), path
    assert is_hub_name("anybody/mpt-9b")
    assert not is_hub_name("mosaicml/mpt-9b")
    with pytest.raises(
        ValueError, match=r"mosaicml/mpt-9b does not exist \(a path, as there is a folder mosaicml here"
    ):
        local_path("mosaicml/mpt-9b")
    assert not hub.asked
