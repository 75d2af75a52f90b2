"""A stand-in for the Hugging Face hub: repositories in memory behind an HTTP server on this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

Files = dict[str, bytes]


class Hub:
    """The hub's state.

    Args:
        address: of its server.
        commits: repository -> its commits' files, the newest last; a commit's name is its number in 40 digits.
        asked: paths of all requests.
    """

    def __init__(self, address: str = "") -> None:
        self.address = address
        self.commits: dict[str, list[Files]] = {}
        self.asked: list[str] = []

    def commit(self, repo: str, files: dict[str, str | bytes]) -> str:
        """Add files to a repository, which is made where it is not there; returns the commit's name."""
        commits = self.commits.setdefault(repo, [])
        before = commits[-1] if commits else {}
        new = {name: each.encode() if isinstance(each, str) else each for name, each in files.items()}
        commits.append({**before, **new})
        return self.name(repo)

    def name(self, repo: str) -> str:
        return f"{len(self.commits[repo]):040d}"

    def find(self, repo: str, revision: str) -> tuple[str, Files] | None:
        if repo not in self.commits:
            return None
        name = self.name(repo) if revision == "main" else revision
        if not name.isdigit() or not 0 < int(name) <= len(self.commits[repo]):
            return None
        return name, self.commits[repo][int(name) - 1]


def lead_to(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's huggingface_hub ask that server, and keep what it brings in a folder."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._get()

        def do_GET(self) -> None:
            self._get()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            if path == "/api/repos/create":
                made = json.loads(body)
                repo = "/".join(filter(None, (made.get("organization"), made["name"])))
                hub.commits.setdefault(repo, [{}])
                self._json({"url": f"{hub.address}/{repo}", "id": repo})
            elif path == "/api/validate-yaml":  # of a model card's head
                self._json({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in json.loads(body)["files"]
                ]
                self._json({"files": files})
            elif "/commit/" in path:
                repo = path.removeprefix("/api/models/").partition("/commit/")[0]
                lines = [json.loads(line) for line in body.splitlines()]
                files = [each["value"] for each in lines if each["key"] == "file"]
                name = hub.commit(repo, {each["path"]: base64.b64decode(each["content"]) for each in files})
                self._json({"commitUrl": f"{hub.address}/{repo}/commit/{name}", "commitOid": name})
            else:
                self._answer(404, b"{}")

        def _get(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            if path.startswith("/api/models/"):
                kind = "tree" if "/tree/" in path else "revision"
                repo, _, revision = path.removeprefix("/api/models/").partition(f"/{kind}/")
                found = hub.find(repo, revision or "main")
                if found is None:
                    code = "RevisionNotFound" if repo in hub.commits else "RepoNotFound"
                    self._answer(404, b"{}", {"X-Error-Code": code})
                elif kind == "tree":
                    files = found[1].items()
                    self._json([{"type": "file", "path": name, "oid": "", "size": len(each)} for name, each in files])
                else:
                    siblings = [{"rfilename": each} for each in found[1]]
                    self._json({"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings, "private": False})
                return
            repo, _, rest = path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            found = hub.find(repo, revision)
            if found is None or file not in found[1]:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"})
                return
            name, files = found
            etag = hashlib.sha256(files[file]).hexdigest()
            self._answer(200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": name})

        def _json(self, value: object) -> None:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
