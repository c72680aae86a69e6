"""A Google Cloud Storage for tests: fake-gcs-server behind a front that speaks the XML API with authentication.

obstore and deltalake speak the XML API only. fake-gcs-server 1.56.1 keeps objects, generations and preconditions as
the JSON API has them; of the XML API it ignores `x-goog-if-generation-match`, has no multipart uploads, lists without
pages, and it lets anybody in. The front does these four and leaves the rest to the server.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import itertools
import json
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

ACCOUNT = "trainer@alleles.iam.gserviceaccount.com"
PAGE = 100
"""Objects of a page, fewer than the real 1000 so that tests see more than one."""

_KEPT = ("ETag", "Last-Modified", "Content-Range", "Content-Type", "X-Goog-Generation")


@dataclasses.dataclass
class Gatekeeper:
    """Who may come in: the service account by tokens that it signs itself, and whoever has a token of `tokens`."""

    key: rsa.RSAPrivateKey = dataclasses.field(default_factory=lambda: new_key())
    tokens: set[str] = dataclasses.field(default_factory=set)

    def admits(self, header: str) -> bool:
        token = header.removeprefix("Bearer").strip()
        if token in self.tokens:
            return True
        try:
            claims, _, signature = token.rpartition(".")
            self.key.public_key().verify(_decoded(signature), claims.encode(), padding.PKCS1v15(), hashes.SHA256())
            return bool(json.loads(_decoded(claims.partition(".")[2]))["iss"] == ACCOUNT)
        except (InvalidSignature, ValueError, KeyError):
            return False


def new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def account_key(key: rsa.RSAPrivateKey) -> str:
    """The JSON that Google gives out for a service account."""
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private = key.private_bytes(*form).decode()
    return json.dumps(
        {"type": "service_account", "client_email": ACCOUNT, "private_key": private, "private_key_id": "1"}
    )


@contextlib.contextmanager
def front(port: int, gatekeeper: Gatekeeper) -> Iterator[str]:
    """URL of a front before the fake-gcs-server at a port of this machine."""
    uploads: dict[str, dict[int, bytes]] = {}
    given = {"port": port, "gatekeeper": gatekeeper, "uploads": uploads, "ids": itertools.count(1)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Front", (_Front,), given))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Front(BaseHTTPRequestHandler):
    """One connection of a client, and one to the server."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    port: int
    gatekeeper: Gatekeeper
    uploads: dict[str, dict[int, bytes]]
    ids: Iterator[int]

    def setup(self) -> None:
        super().setup()
        self.server_side = http.client.HTTPConnection("127.0.0.1", self.port)

    def finish(self) -> None:
        self.server_side.close()
        super().finish()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        bucket, _, key = parts.path.strip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        try:
            if not self.gatekeeper.admits(self.headers.get("Authorization", "")):
                raise _Refused(401, "AuthenticationRequired")
            if key:
                self._object(bucket, unquote(key), query, body)
            else:
                self._list(bucket, query)
        except _Refused as e:
            prolog = "<?xml version='1.0' encoding='UTF-8'?>"
            self._answer(e.status, f"{prolog}<Error><Code>{e.code}</Code><Message>{e.code}</Message></Error>")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _object(self, bucket: str, key: str, query: Mapping[str, str], body: bytes) -> None:
        if self.command in ("GET", "HEAD"):
            self._read(bucket, key)
        elif self.command == "PUT" and "uploadId" in query:
            self.uploads[query["uploadId"]][int(query["partNumber"])] = body
            self._answer(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        elif self.command == "PUT":
            self._answer(200, headers=self._write(bucket, key, body))
        elif self.command == "POST" and "uploads" in query:
            upload = f"upload-{next(self.ids)}"
            self.uploads[upload] = {}
            self._answer(200, _xml("InitiateMultipartUploadResult", UploadId=upload))
        elif self.command == "POST":
            parts = self.uploads.pop(query["uploadId"])
            numbers = [int(n.text or "") for n in ElementTree.fromstring(body).iter("PartNumber")]
            headers = self._write(bucket, key, b"".join(parts[n] for n in numbers))
            self._answer(200, _xml("CompleteMultipartUploadResult", ETag=headers["ETag"]), headers)
        elif "uploadId" in query:
            self.uploads.pop(query["uploadId"], None)
            self._answer(204)
        else:
            self._json("DELETE", f"/storage/v1/b/{bucket}/o/{_quoted(key)}", missing="NoSuchKey")
            self._answer(204)

    def _read(self, bucket: str, key: str) -> None:
        wanted = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
        path = f"/download/storage/v1/b/{bucket}/o/{_quoted(key)}?alt=media"
        self.server_side.request(self.command, path, headers=wanted)
        answer = self.server_side.getresponse()
        data = answer.read()
        if answer.status >= 400:
            raise _Refused(answer.status, "NoSuchKey" if answer.status == 404 else "InvalidRange")
        headers = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
        size = int(answer.headers["Content-Length"]) if self.command == "HEAD" else None
        self._answer(answer.status, data, headers, size=size)

    def _write(self, bucket: str, key: str, body: bytes) -> dict[str, str]:
        """Headers that say what was made."""
        declared = self.headers.get("Content-MD5")
        if declared and declared != base64.b64encode(hashlib.md5(body).digest()).decode():
            raise _Refused(400, "BadDigest")
        query = {"uploadType": "media", "name": key}
        if generation := self.headers.get("x-goog-if-generation-match"):
            query["ifGenerationMatch"] = generation
        path = f"/upload/storage/v1/b/{bucket}/o?{urlencode(query)}"
        made = self._json("POST", path, body, missing="NoSuchBucket")
        return {"ETag": f'"{made["etag"]}"', "x-goog-generation": made["generation"]}

    def _list(self, bucket: str, query: Mapping[str, str]) -> None:
        asked = {"prefix": query.get("prefix", ""), "delimiter": query.get("delimiter", ""), "maxResults": str(PAGE)}
        asked |= {"pageToken": token} if (token := query.get("continuation-token")) else {}
        asked |= {"startOffset": after} if (after := query.get("start-after")) else {}
        found = self._json("GET", f"/storage/v1/b/{bucket}/o?{urlencode(asked)}", missing="NoSuchBucket")
        items = [i for i in found.get("items", ()) if i["name"] != after]
        self._answer(
            200,
            "<ListBucketResult>"
            + "".join(
                _xml("Contents", Key=i["name"], Size=i["size"], LastModified=i["updated"], ETag=i["etag"])
                for i in items
            )
            + "".join(_xml("CommonPrefixes", Prefix=p) for p in found.get("prefixes", ()))
            + _xml("", NextContinuationToken=found.get("nextPageToken", ""))
            + "</ListBucketResult>",
        )

    def _json(self, method: str, path: str, body: bytes = b"", *, missing: str) -> dict[str, Any]:
        self.server_side.request(method, path, body, {"Content-Type": "application/octet-stream"})
        answer = self.server_side.getresponse()
        data = answer.read()
        if answer.status >= 400:
            codes = {404: missing, 412: "PreconditionFailed"}
            raise _Refused(answer.status, codes.get(answer.status, data.decode(errors="replace")))
        return json.loads(data) if data.strip() else {}  # type: ignore[no-any-return]

    def _answer(
        self, status: int, body: str | bytes = b"", headers: Mapping[str, str] | None = None, *, size: int | None = None
    ) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _xml(tag: str, **fields: str) -> str:
    inside = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items() if value)
    return f"<{tag}>{inside}</{tag}>" if tag else inside


def _quoted(key: str) -> str:
    return quote(key, safe="")


def _decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
