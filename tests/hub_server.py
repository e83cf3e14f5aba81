"""A small Hub on this machine: the HTTP interface that `huggingface_hub` pushes to and loads from, all bytes kept."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


OWNER = "tester"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Request:
    """What a client sent, without its authorization."""

    method: str
    path: str
    headers: str
    body: bytes


@dataclass(frozen=True)
class Commit:
    """A state of a repository: every file of it, and what the commit said."""

    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """Repositories by name, and everything that was ever sent.

    Args:
        token: whoever writes must show it.
    """

    token: str
    endpoint: str = ""
    repos: dict[str, list[Commit]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    requests: list[Request] = field(default_factory=list)

    def files(self, repo: str) -> dict[str, bytes]:
        """The files of a repository as they are now."""
        return self.repos[repo][-1].files

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> Commit:
        """Apply one commit, sent as lines of JSON."""
        files = dict(self.files(repo))
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = f"{value['summary']}\n{value['description']}"
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                raise ValueError(f"this Hub knows no {line['key']}")
        return self._keep(repo, message, files)

    def create(self, repo: str, private: bool) -> bool:
        """Make an empty repository; False if there is one."""
        if repo in self.repos:
            return False
        self.repos[repo], self.private[repo] = [], private
        self._keep(repo, "initial commit\n", {".gitattributes": b"*.safetensors filter=lfs diff=lfs -text\n"})
        return True

    def _keep(self, repo: str, message: str, files: dict[str, bytes]) -> Commit:
        sha = hashlib.sha1(f"{repo} {len(self.repos[repo])}".encode()).hexdigest()
        self.repos[repo].append(Commit(sha, message, files))
        return self.repos[repo][-1]

    def at(self, repo: str, revision: str) -> Commit | None:
        """A commit by its hash; `main` is the last one."""
        commits = self.repos.get(repo, [])
        if revision == "main":
            return commits[-1] if commits else None
        return next((commit for commit in commits if commit.sha == revision), None)


@contextmanager
def running_hub(token: str) -> Iterator[Hub]:
    """Serve a Hub on a free port of the loopback interface."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request after the other; `routes` say who answers what."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *args: Any) -> None:
        """Stay quiet."""

    def _answer(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        shown = [f"{name}: {value}" for name, value in self.headers.items() if name.lower() != "authorization"]
        self.hub.requests.append(Request(self.command, self.path, "\n".join(shown), body))
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in method.split():
                if "POST" in method and self.headers["authorization"] != f"Bearer {self.hub.token}":
                    self._send(401, b"{}")
                else:
                    answer(self, body, **match.groupdict())
                return
        self._send(404, b"{}")

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization'] or OWNER}/{asked['name']}"
        new = self.hub.create(repo, asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.endpoint}/{repo}"}, 200 if new else 409)

    def validate(self, body: bytes) -> None:
        front = json.loads(body)["content"].split("---\n")[1]
        wrong = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no mapping"}]
        self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".pt", ".bin", ".pth")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def large(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, b"")
            return
        self.hub.large[oid] = body
        self._send(200, b"")

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        commit = self.hub.commit(repo, [json.loads(line) for line in body.splitlines()])
        self._json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit.sha}", "commitOid": commit.sha})

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        commit = self.hub.at(repo, revision or "main")
        if commit is None:
            self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
            return
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self._json({"id": repo, "sha": commit.sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        commit = self.hub.at(repo, revision)
        if commit is None or folder:
            self._send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
            return
        self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(commit.files.items())
            ]
        )

    def file(self, body: bytes, repo: str, revision: str, path: str) -> None:
        commit = self.hub.at(repo, revision)
        if commit is None:
            self._send(404, b"", **{"X-Error-Code": "RepoNotFound"})
        elif path not in commit.files:
            self._send(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha})
        else:
            content = commit.files[path]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(200, content, **{"ETag": tag, "X-Repo-Commit": commit.sha})


_ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.large),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", _Handler.tree),
    ("GET HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.file),
)
