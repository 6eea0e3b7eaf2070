"""The little of the Hugging Face Hub's HTTP interface that reading a data set needs, over a local directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    repositories: dict[str, Path]
    log: list[tuple[str, str, int]]  # method, path, bytes of content that were sent
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        wanted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body=True, wanted=wanted)

    def _answer(self, body: bool, wanted: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        repository = self.repositories.get((api or file).group(1)) if api or file else None
        if repository is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif api:
            self._send(200, json.dumps(self._describe(api, repository, wanted)).encode(), {}, body)
        elif (repository / file.group(2)).is_file():
            self._file(repository / file.group(2), body)
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)

    def _describe(self, api: re.Match, repository: Path, wanted: bytes) -> Any:
        files = [p for p in sorted(repository.rglob("*")) if p.is_file()]
        entries = {
            p.relative_to(repository).as_posix(): {
                "type": "file",
                "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                "size": p.stat().st_size,
                "path": p.relative_to(repository).as_posix(),
            }
            for p in files
        }
        for path in list(entries):
            for parent in Path(path).parents:
                if str(parent) != ".":
                    folder = parent.as_posix()
                    entries.setdefault(folder, {"type": "directory", "oid": COMMIT, "size": 0, "path": folder})
        if api.group(2) == "tree":
            under = (api.group(4) or "").strip("/")
            return [e for name, e in entries.items() if not under or name.startswith(under + "/")]
        if api.group(2) == "paths-info":
            paths = json.loads(wanted).get("paths", [])
            return [entries[p.strip("/")] for p in paths if p.strip("/") in entries]
        siblings = [{"rfilename": name} for name, e in entries.items() if e["type"] == "file"]
        name = api.group(1)
        return {"_id": "0", "id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    def _file(self, path: Path, body: bool) -> None:
        data, status, headers = path.read_bytes(), 200, {}
        headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        headers["X-Repo-Commit"] = COMMIT
        headers["Accept-Ranges"] = "bytes"
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part:
            first, last = int(part.group(1)), min(int(part.group(2) or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(status, data, headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.log.append((self.command, unquote(self.path), len(data) if body else 0))
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextlib.contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
    """``(endpoint, log of requests)`` of a Hub that has these data sets."""
    log: list[tuple[str, str, int]] = []
    handler = type("Hub", (_Hub,), {"repositories": repositories, "log": log})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
