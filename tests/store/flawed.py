"""A server that speaks enough of S3, Google Cloud Storage and Azure Blob for a probe, and gets one thing wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
TIME = "Thu, 01 Jan 2026 00:00:00 GMT"


@contextlib.contextmanager
def serve(scheme: str, flaw: str) -> Iterator[str]:
    """Its URL. `flaw`: "conditions", "ranges" or "after", which it ignores. It never looks at checksums."""
    given = {"scheme": scheme, "flaw": flaw, "objects": {}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Flawed", (_Flawed,), given))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}" + ("/alleles" if scheme == "az" else "")
    finally:
        server.shutdown()
        thread.join()


class _Flawed(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    scheme: str
    flaw: str
    objects: ClassVar[dict[str, tuple[bytes, int]]]
    """Name → bytes and version."""

    def _name(self) -> str:
        path = unquote(urlsplit(self.path).path).strip("/").split("/", 2 if self.scheme == "az" else 1)
        return path[-1] if len(path) == (3 if self.scheme == "az" else 2) else ""

    def do_PUT(self) -> None:
        body, name = self.rfile.read(int(self.headers["Content-Length"])), self._name()
        there = str(self.objects[name][1]) if name in self.objects else None
        wanted = self.headers.get("If-Match", "").strip('"') or self.headers.get("x-goog-if-generation-match", "")
        create = self.headers.get("If-None-Match") == "*" or wanted == "0"
        if self.flaw != "conditions" and ((create and there) or (not create and wanted and wanted != there)):
            self._answer(412)
            return
        self.objects[name] = (body, int(there or 1000) + 1)
        self._answer(200, version=self.objects[name][1])

    def do_GET(self) -> None:
        if not (name := self._name()):
            self._list({k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()})
            return
        body, version = self.objects[name]
        if self.flaw == "ranges" or "Range" not in self.headers:
            self._answer(200, body, version=version)
            return
        first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        end = min(last + 1, len(body))
        self._answer(206, body[first:end], version=version, content_range=f"bytes {first}-{end - 1}/{len(body)}")

    def do_DELETE(self) -> None:
        self.objects.pop(self._name(), None)
        self._answer(202 if self.scheme == "az" else 204)

    def do_POST(self) -> None:
        """A batch of deletions of Azure, which a probe does without."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(400)

    def _list(self, query: dict[str, str]) -> None:
        after = "" if self.flaw == "after" else query.get("start-after") or query.get("startFrom", "")
        names = [n for n in sorted(self.objects) if n.startswith(query.get("prefix", "")) and n >= after]
        if self.scheme == "az":
            said = f"<Last-Modified>{TIME}</Last-Modified><Content-Length>1</Content-Length><Etag>1</Etag>"
            said += "<Content-Type>text/plain</Content-Type>"
            blobs = "".join(f"<Blob><Name>{n}</Name><Properties>{said}</Properties></Blob>" for n in names)
            body = f"<EnumerationResults><Blobs>{blobs}</Blobs></EnumerationResults>"
        else:
            said = "<Size>1</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>1</ETag>"
            names = [n for n in names if n != after]
            body = "".join(f"<Contents><Key>{n}</Key>{said}</Contents>" for n in names)
            body = f"<ListBucketResult>{body}</ListBucketResult>"
        self._answer(200, body.encode())

    def _answer(self, status: int, body: bytes = b"", *, version: int = 0, content_range: str = "") -> None:
        self.send_response(status)
        headers = {"ETag": f'"{version}"', "x-goog-generation": str(version), "Last-Modified": TIME}
        headers |= {"Content-Range": content_range} if content_range else {}
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
