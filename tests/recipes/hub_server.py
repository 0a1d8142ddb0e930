"""A hub in this process: what huggingface_hub asks of it to make a repository, to commit a folder and to fetch."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "s" * 34
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Repositories by name, each with its visibility and its files; and what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        path = self.path.partition("?")[0]
        name = path.removeprefix("/api/models/").removesuffix("/revision/main")
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/whoami-v2":
            self._answer({"type": "user", "name": "me", "orgs": []})
        elif name.endswith(("/tree/main", f"/tree/{COMMIT}")):
            there = self.server.files.items()
            self._answer([{"type": "file", "path": p, "size": len(b), "oid": _oid(b)} for p, b in there])
        elif f"/resolve/{COMMIT}/" in path:
            content = self.server.files[path.partition(f"/resolve/{COMMIT}/")[2]]
            headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT}
            self._send(content, 200, headers, "application/octet-stream")
        elif name in self.server.private:
            self._answer({"id": name, "modelId": name, "private": self.server.private[name], "sha": COMMIT})
        else:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.private[f"{asked['organization']}/{asked['name']}"] = asked.get("visibility") == "private"
            self._answer({"url": f"{self.server.url}/{asked['organization']}/{asked['name']}"})
        elif self.server.broken:
            self._answer({"error": f"token {TOKEN} has no room left"}, 403)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            mode = {True: "lfs", False: "regular"}
            files = [one["path"] for one in json.loads(body)["files"]]
            told = [{"path": f, "uploadMode": mode[f.endswith(".safetensors")], "shouldIgnore": False} for f in files]
            self._answer({"files": told})
        elif self.path.endswith("/info/lfs/objects/batch"):
            parts = [{**one, "actions": {"upload": {"href": f"{self.server.url}/put/{one['oid']}?signed=1"}}}
                     for one in json.loads(body)["objects"]]  # fmt: skip
            self._answer({"transfer": "basic", "objects": parts}, kind="application/vnd.git-lfs+json")
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.large[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del self.server.files[value["path"]]
            self._answer({"commitUrl": f"{self.server.url}/org/law/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._answer({"success": True})

    def do_PUT(self) -> None:
        oid = self.path.removeprefix("/put/").partition("?")[0]
        self.server.large[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({})

    def _answer(
        self, value: object, code: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        self._send(json.dumps(value).encode(), code, headers or {}, kind)

    def _send(self, body: bytes, code: int, headers: dict[str, str], kind: str) -> None:
        self.send_response(code)
        for name, text in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub for a while."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
