"""An HTTP server in this process that answers the Hugging Face Hub's routes, and misbehaves as told.

The routes are those that huggingface_hub uses to make a repository, commit to it (small files in the commit, weights
by git-lfs) and download a snapshot: https://huggingface.co/docs/hub/api and the git-lfs batch API.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What the server does in place of an answer, for the requests that `route` matches."""

    route: str
    """pattern found in "METHOD /path" """
    kind: str = "status"
    """status, hang (says nothing), cut (closes within the body), drip (slowly, but whole), wrong (another content)"""
    status: int = 500
    times: int = 10**6
    """how often, then it answers"""


@dataclass
class Repo:
    """Commits (id -> path -> content) and refs (branch -> id)."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Mapping[str, bytes]) -> str:
        """Add a commit with these files changed; its id."""
        parent = self.refs.get(branch, "")
        after = {**self.commits.get(parent, {}), **files}
        stated = parent + json.dumps({path: sha(data) for path, data in after.items()})
        self.refs[branch] = hashlib.sha1(stated.encode()).hexdigest()
        self.commits[self.refs[branch]] = after
        return self.refs[branch]


class HubServer(ThreadingHTTPServer):
    """See the module; `url` is what HF_ENDPOINT is set to."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.url = token, f"http://127.0.0.1:{self.server_address[1]}"
        self.cdn = f"http://localhost:{self.server_address[1]}"  # another host, to which no token belongs
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.private = False
        self.listed: list[str] = []
        """further names in every file list, with no files behind them but b"evil" """
        self.seen: list[tuple[str, str | None]] = []
        """"METHOD /path" and the Authorization header of every request"""
        self.lock, self.closing = threading.Lock(), threading.Event()

    def fault(self, request: str) -> Fault | None:
        """The fault for a request, used up by it."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.route, request):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, pattern: str) -> list[str]:
        """The requests so far that match."""
        return [request for request, _ in self.seen if re.search(pattern, request)]


@contextmanager
def hub_server(token: str = "hf_secretsecretsecret") -> Iterator[HubServer]:
    """A running server; its threads end with the block."""
    server = HubServer(token)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def sha(data: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def blob_id(data: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str) -> bool:
    """Whether the Hub keeps a file outside git."""
    return path.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        self.place, self.body = unquote(urlsplit(self.path).path), self._read()
        request, fault = f"{self.command} {self.place}", None
        self.server.seen.append((request, self.headers.get("Authorization")))
        self.bad = fault = self.server.fault(request)
        if fault is not None and fault.kind == "hang":
            self.server.closing.wait(20)
            self.close_connection = True
        elif fault is not None and fault.kind == "status":
            self._refuse(fault.status, f"no, {self.headers.get('Authorization')}")  # a server that tells what it got
        elif not self._allowed():
            self._refuse(401, "Invalid username or password.", "RepoNotFound")
        else:
            self._route()

    def _route(self) -> None:
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {self.place}"):
                return answer(self, *found.groups())
        self._refuse(404, f"no such route {self.command} {self.place}")

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _allowed(self) -> bool:
        given = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        reads = self.command in ("GET", "HEAD") and not self.place.startswith("/api/whoami")
        signed = self.place.startswith("/lfs/")  # such an address is a secret itself
        return given or signed or (reads and not self.server.private)

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        kind = "" if self.bad is None else self.bad.kind
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "wrong":
            data = bytes(len(data) - 1) + b"!"
        if kind == "cut":
            data = data[: len(data) // 2]
            self.close_connection = True
        for start in range(0, len(data), step := max(1, len(data) // 20) if kind == "drip" else 2**20):
            self.wfile.write(data[start : start + step])
            self.wfile.flush()
            time.sleep(0.02 if kind == "drip" else 0)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json")

    def _refuse(self, status: int, words: str, code: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        self._send(json.dumps({"error": words}).encode(), status, Content_Type="application/json", **headers)

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision; None = refused already."""
        repo = self.server.repos.get(name)
        if repo is None:
            return self._refuse(404, "Repository not found", "RepoNotFound")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, {**repo.commits[commit], **dict.fromkeys(self.server.listed, b"evil")}

    def _whoami(self) -> None:
        self._json({"type": "user", "name": "tester", "orgs": []})

    def _yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        if name in self.server.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
        self.server.repos[name] = Repo()
        self.server.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.server.url}/{name}", "name": name})

    def _branch(self, name: str, branch: str) -> None:
        repo = self.server.repos[name]
        if branch in repo.refs:
            return self._refuse(409, "Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self._json({})

    def _info(self, name: str, revision: str | None) -> None:
        if found := self._files(name, revision or "main"):
            siblings = [{"rfilename": path} for path in found[1]]
            self._json(
                {"id": name, "modelId": name, "sha": found[0], "siblings": siblings, "private": False, "tags": []}
            )

    def _tree(self, name: str, revision: str) -> None:
        if found := self._files(name, revision):
            entries = []
            for path, data in found[1].items():
                entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
                if is_lfs(path):
                    entry["lfs"] = {"oid": sha(data), "size": len(data), "pointerSize": 134}
                entries.append(entry)
            self._json(entries)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if not (found := self._files(name, revision)):
            return
        commit, files = found
        if path not in files:
            return self._refuse(404, "Entry not found", "EntryNotFound")
        data = files[path]
        if not is_lfs(path):
            return self._send(data, X_Repo_Commit=commit, ETag=f'"{blob_id(data)}"')
        self.server.lfs[sha(data)] = data
        self._send(
            b"",
            302,
            Location=f"{self.server.cdn}/lfs/{sha(data)}?X-Amz-Signature=signedsigned",
            X_Repo_Commit=commit,
            X_Linked_ETag=f'"{sha(data)}"',
            X_Linked_Size=str(len(data)),
        )

    def _stored(self, oid: str) -> None:
        data, wanted = self.server.lfs[oid], re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(data)
        start = int(wanted[1])
        self._send(data[start:], 206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")

    def _preupload(self, name: str, revision: str) -> None:
        if found := self._files(name, revision):
            answers = []
            for file in json.loads(self.body)["files"]:
                path, there = file["path"], found[1].get(file["path"])
                mode = "lfs" if is_lfs(path) else "regular"
                known = None if there is None else sha(there) if is_lfs(path) else blob_id(there)
                answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
            self._json({"files": answers})

    def _batch(self, name: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.lfs:
                place = {"href": f"{self.server.url}/lfs/{asked['oid']}?X-Amz-Signature=signedsigned"}
                answer["actions"] = {"upload": place, "verify": {"href": f"{self.server.url}/{name}/lfs-verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if sha(self.body) != oid:
            return self._refuse(400, "BadDigest")
        self.server.lfs[oid] = self.body
        self._send(b"")

    def _verify(self, name: str) -> None:
        oid = json.loads(self.body)["oid"]
        self._json({}, 200 if oid in self.server.lfs else 404)

    def _commit(self, name: str, revision: str) -> None:
        if not self._files(name, revision):
            return
        files: dict[str, bytes] = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
        commit = self.server.repos[name].commit(revision, files)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})


_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", _Handler._whoami),
    (r"POST /api/validate-yaml", _Handler._yaml),
    (r"POST /api/repos/create", _Handler._create),
    (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", _Handler._branch),
    (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", _Handler._info),
    (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)/?", _Handler._tree),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", _Handler._preupload),
    (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", _Handler._commit),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler._batch),
    (r"POST /([^/]+/[^/]+)/lfs-verify", _Handler._verify),
    (r"PUT /lfs/(\w+)", _Handler._put),
    (r"GET /lfs/(\w+)", _Handler._stored),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler._resolve),
]
