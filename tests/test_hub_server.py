"""Models through a Hub: push, pull, pin, offline, damage, and what must not leak; against a server in this process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from torch import nn

from downstream.dense.model import DenseModel
from downstream.llm_evrep.model import EvRep
from gep import export
from gep.hub import GEPModel
from gep.models import FrozenVFM
from gep.pretrained import Pretrained
from tests.hub_models import MODELS, gep
from tests.hub_server import Fault, HubServer, blob_id, hub_server, sha


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with hub_server() as server:
        # The library reads its environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.25)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.25)
        quick = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})  # between its attempts
        monkeypatch.setattr(file_download, "time", quick)
        monkeypatch.setattr(_http, "time", quick)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def published(hub: HubServer, seed: int = 0) -> str:
    """The commit of `gep(seed)` in someone/events."""
    return gep(seed).push_to_hub("someone/events", token=hub.token).rpartition("/")[2]


def same(one: nn.Module, two: nn.Module) -> bool:
    mine, other = one.state_dict(), two.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_pushed_comes_back_bit_for_bit(hub: HubServer, kind: str, tmp_path: Path) -> None:
    model: Pretrained = MODELS[kind]()
    address = model.push_to_hub("someone/thing", token=hub.token, metrics={"top1": 61.25})
    repo = hub.repos["someone/thing"]
    assert address == f"{hub.url}/someone/thing/commit/{repo.refs['main']}"
    sent = repo.commits[repo.refs["main"]]
    model.save_pretrained(tmp_path / "m", metrics={"top1": 61.25}, name="someone/thing")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert sent[name] == (tmp_path / "m" / name).read_bytes()
    assert b"someone/thing" in sent["README.md"] and b"61.25" in sent["README.md"]
    assert hub.asked("PUT /lfs/") and hub.asked("POST .*objects/batch")  # the weights went outside git
    again = type(model).from_pretrained("someone/thing")
    assert same(again, model) and again.config == model.config and not again.training
    if kind == "image":
        teacher = FrozenVFM.from_spec("export:someone/thing")
        assert teacher.classes == ["cat", "dog"] and same(teacher.class_head, model.class_head)
    other = EvRep if kind == "dense" else DenseModel
    with pytest.raises(ValueError, match="was asked for"):
        other.from_pretrained("someone/thing")


def test_a_commit_or_branch_pins_the_weights(hub: HubServer) -> None:
    first, second = published(hub, 0), published(hub, 1)
    gep(2).push_to_hub("someone/events", token=hub.token, branch="wide")
    assert published(hub, 1) == second  # nothing changed, no commit
    assert list(hub.repos["someone/events"].refs) == ["main", "wide"]
    for revision, seed in ((None, 1), ("main", 1), (first, 0), (second, 1), ("wide", 2)):
        assert same(GEPModel.from_pretrained("someone/events", revision=revision), gep(seed)), revision
        if revision:
            assert same(GEPModel.from_pretrained(f"someone/events@{revision}"), gep(seed)), revision
            assert same(GEPModel.from_pretrained(f"someone/events@{revision}", revision=revision), gep(seed))
    with pytest.raises(ValueError, match=r"revision='main' is another one"):
        GEPModel.from_pretrained("someone/events@wide", revision="main")
    with pytest.raises(ValueError, match="after the @"):
        GEPModel.from_pretrained("someone/events@")
    published(hub, 3)
    assert same(GEPModel.from_pretrained("someone/events", revision=first), gep(0))
    assert same(GEPModel.from_pretrained("someone/events"), gep(3))
    with pytest.raises(FileNotFoundError, match=r"someone/events.*RevisionNotFoundError"):
        GEPModel.from_pretrained("someone/events", revision="v9")
    gep(0).push_to_hub("mine", token=hub.token)
    assert same(GEPModel.from_pretrained("tester/mine"), gep(0))
    assert (
        b'from_pretrained("tester/mine")'
        in hub.repos["tester/mine"].commits[hub.repos["tester/mine"].refs["main"]]["README.md"]
    )


def test_without_a_connection_the_cache_serves(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = published(hub)
    with pytest.raises(FileNotFoundError, match="someone/events"):
        GEPModel.from_pretrained("someone/events", local_files_only=True)
    GEPModel.from_pretrained("someone/events")
    before = len(hub.seen)
    for revision in (None, commit):
        assert same(GEPModel.from_pretrained("someone/events", revision=revision, local_files_only=True), gep())
    assert len(hub.seen) == before
    with pytest.raises(FileNotFoundError, match="someone/events"):
        GEPModel.from_pretrained("someone/events", cache_dir=tmp_path / "other", local_files_only=True)
    hub.faults = [Fault(r"(GET|HEAD)", status=503)]  # down
    assert same(GEPModel.from_pretrained("someone/events"), gep())
    hub.faults = [Fault(r"(GET|HEAD)", kind="hang")]
    assert same(GEPModel.from_pretrained("someone/events", revision=commit), gep())


SCRIPT = """
from gep import export
print((export.fetch("someone/events") / "config.json").read_bytes())
try:
    export.fetch("someone/other")
except FileNotFoundError as error:
    print("none:", error)
"""


def test_the_environment_is_obeyed(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = published(hub)
    config = str(hub.repos["someone/events"].commits[commit]["config.json"])
    hub.private = True
    place = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    environment = {**os.environ, **place, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    config_there, missing = done.stdout.splitlines()
    assert config_there == config and missing.startswith("none: someone/other is no folder")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.seen)
    for revision in (None, commit):
        again = GEPModel.from_pretrained("someone/events", revision=revision, cache_dir=tmp_path / "home" / "hub")
        assert same(again, gep())
    with pytest.raises(FileNotFoundError, match="someone/other.*HF_HUB_OFFLINE"):
        GEPModel.from_pretrained("someone/other")
    assert len(hub.seen) == before


def test_slow_and_broken_off_answers_are_awaited(hub: HubServer) -> None:
    published(hub)
    hub.faults = [Fault("GET /lfs/", kind="drip", times=1)]
    assert same(GEPModel.from_pretrained("someone/events"), gep())
    hub.faults = [Fault("GET /lfs/", kind="cut", times=2), Fault("GET /lfs/", kind="hang", times=1)]
    assert same(GEPModel.from_pretrained("someone/events", force_download=True), gep())
    assert len(hub.asked("GET /lfs/")) == 1 + 4


@pytest.mark.parametrize(
    "fault, word",
    [
        (Fault("GET /lfs/", kind="cut"), "someone/events"),
        (Fault("GET /lfs/", kind="hang"), "someone/events"),
        (Fault("GET /lfs/", status=500), "500"),
        (Fault("GET /lfs/", status=401), "401"),
        (Fault("HEAD .*/model.safetensors", status=500), "500"),
        (Fault("HEAD .*/config.json", status=404), "404"),
        (Fault("GET /api/models", status=500), "500"),
        (Fault("GET /api/models", status=401), "401"),
        (Fault("GET /api/models", status=404), "404"),
        (Fault("GET /api/models", kind="cut"), "someone/events"),
        (Fault("GET /api/models", kind="wrong"), "someone/events"),
    ],
    ids=lambda value: f"{value.route} {value.kind} {value.status}" if isinstance(value, Fault) else "",
)
def test_a_failing_hub_is_one_error(
    hub: HubServer, fault: Fault, word: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    published(hub)
    hub.faults, hub.private = [fault], True
    if fault.kind == "cut":
        fault.times = 8
    caplog.set_level(logging.DEBUG)
    with pytest.raises(FileNotFoundError, match="someone/events") as error:
        GEPModel.from_pretrained("someone/events", token=hub.token)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert hub.token not in str(error.value) + caplog.text and error.value.__cause__ is None
    hub.faults = []
    assert same(GEPModel.from_pretrained("someone/events", token=hub.token), gep())  # what came is no hindrance


@pytest.mark.parametrize("route", ["GET /lfs/", "GET .*/config.json"])
def test_another_content_than_stated_is_refused_until_it_comes_whole(hub: HubServer, route: str) -> None:
    published(hub)
    hub.faults = [Fault(route, kind="wrong")]
    for _ in range(2):  # from the cache no more than from the server
        with pytest.raises(ValueError, match="is damaged.*force_download"):
            GEPModel.from_pretrained("someone/events")
    hub.faults = []
    assert same(GEPModel.from_pretrained("someone/events", force_download=True), gep())


def test_a_cache_that_was_damaged_later_is_noticed(hub: HubServer, tmp_path: Path) -> None:
    published(hub)
    GEPModel.from_pretrained("someone/events")
    (link,) = (tmp_path / "cache").rglob("model.safetensors")
    blob = link.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors of someone/events is damaged"):
        GEPModel.from_pretrained("someone/events", local_files_only=True)
    assert link.name == "model.safetensors" and blob.name == sha(gep_bytes(hub))


def gep_bytes(hub: HubServer) -> bytes:
    repo = hub.repos["someone/events"]
    return repo.commits[repo.refs["main"]]["model.safetensors"]


def test_the_hash_of_small_files_is_gits(hub: HubServer, tmp_path: Path) -> None:
    published(hub)
    GEPModel.from_pretrained("someone/events")
    (link,) = (tmp_path / "cache").rglob("config.json")
    assert link.resolve().name == blob_id(link.read_bytes())


def test_names_that_lead_out_write_nothing(hub: HubServer, tmp_path: Path) -> None:
    published(hub)
    outside = tmp_path / "outside"
    outside.mkdir()
    hub.listed = ["../x", "../../../../x", f"{outside}/config.json", "a/../../config.json", "..\\config.json", "/x"]
    hub.listed += ["sub/config.json", "evil.pkl", "modeling.py", "pytorch_model.bin"]
    assert same(GEPModel.from_pretrained("someone/events"), gep())
    assert not files(outside)
    assert {name for name in files(tmp_path) if not name.startswith("cache/")} == set()
    (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
    assert files(snapshot) == ["README.md", "config.json", "model.safetensors"]
    assert b"evil" not in b"".join(path.read_bytes() for path in snapshot.iterdir())
    assert not hub.asked("evil|modeling|pytorch_model|sub/")


def test_the_token_stays_with_the_hub(hub: HubServer, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    hub.private = True
    published(hub)
    model = GEPModel.from_pretrained("someone/events", token=hub.token)
    elsewhere = [given for request, given in hub.seen if request.startswith(("GET /lfs/", "PUT /lfs/"))]
    assert len(elsewhere) == 2 and not any(elsewhere)
    model.save_pretrained(tmp_path / "m")
    repo = hub.repos["someone/events"]
    written = b"".join(data for commit in repo.commits.values() for data in commit.values())
    written += b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert hub.token.encode() not in written and hub.token not in caplog.text + repr(model) + str(model.config)


@pytest.mark.parametrize(
    "fault, word",
    [
        (Fault("POST /api/repos/create", status=500), "500"),
        (Fault("POST .*/preupload/", status=403), "403"),
        (Fault("POST .*objects/batch", status=500), "500"),
        (Fault("PUT /lfs/", status=403), "403"),
        (Fault("POST .*/lfs-verify", status=404), "404"),
        (Fault("POST .*/commit/", status=500), "500"),
        (Fault("POST .*/commit/", kind="cut"), "someone/events"),
    ],
    ids=lambda value: f"{value.route} {value.kind} {value.status}" if isinstance(value, Fault) else "",
)
def test_a_push_that_fails_is_one_error_and_no_commit(
    hub: HubServer, fault: Fault, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    published(hub, 0)
    before = dict(hub.repos["someone/events"].refs)
    hub.faults = [fault]
    caplog.set_level(logging.DEBUG)
    with pytest.raises(OSError, match="someone/events could not be pushed") as error:
        gep(1).push_to_hub("someone/events", token=hub.token)
    told = str(error.value)
    assert word in told and "\n" not in told and hub.token not in told + caplog.text and "signedsigned" not in told
    if fault.kind == "status":
        assert hub.repos["someone/events"].refs == before
    hub.faults = []
    published(hub, 1)
    assert same(GEPModel.from_pretrained("someone/events"), gep(1))


def test_a_wrong_token_and_no_token_are_refused(hub: HubServer) -> None:
    for token in ("hf_anotherone1234", False):
        with pytest.raises(OSError, match="401") as error:
            gep().push_to_hub("someone/events", token=token)
        assert "anotherone" not in str(error.value)
    assert not hub.repos
    published(hub)
    hub.private = True
    with pytest.raises(FileNotFoundError, match="someone/events") as refused:
        GEPModel.from_pretrained("someone/events", token="plainsecret")
    assert "plainsecret" not in str(refused.value)


def test_a_hostile_config_from_the_hub_is_one_error(hub: HubServer) -> None:
    published(hub)
    repo = hub.repos["someone/events"]
    text = repo.commits[repo.refs["main"]]["config.json"].decode()
    for bad, word in (
        (text.replace('"in_chans": 2', '"in_chans": 1000000000'), r"config\.encoder\.in_chans = 1000000000"),
        ("[" * 100_000, "valid JSON"),
        (
            text.replace("nano", "vit_giant_patch14_dinov2").replace(" 36", " 42"),
            "does not fit the model of its config",
        ),
    ):
        repo.commit("main", {"config.json": bad.encode()})
        with pytest.raises(ValueError, match=word):
            GEPModel.from_pretrained("someone/events")


def test_messages_lose_their_secrets() -> None:
    said = "PUT https://me:pw@hub.example/x?X-Amz-Signature=abc: Bearer qwerty; hf_abcdefgh,\n my-token, ok? yes"
    told = export.reason(ValueError(said), "my-token")
    assert told == "ValueError: PUT https://***@hub.example/x *** ***, ***, ok? yes"
