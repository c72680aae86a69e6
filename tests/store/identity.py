"""What a platform gives to pods for their identity: tokens that expire, from Google's metadata server and from
Microsoft's login, and the certificate that the latter insists on."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import ipaddress
import json
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Answer = Callable[[str, dict[str, str]], dict[str, Any] | str | None]
"""Path and form of a request → JSON, or a text as it is; None: refused."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Of this machine's loopback address, signed by itself."""

    cert: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "store tests")])
        begin = datetime.now(UTC) - timedelta(days=1)
        builder = x509.CertificateBuilder(name, name, key.public_key(), 1, begin, begin + timedelta(days=2))
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        signed = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
        made = cls(folder / "cert.pem", folder / "key.pem")
        made.cert.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        made.key.write_bytes(key.private_bytes(*form))
        return made


@contextlib.contextmanager
def answering(answer: Answer, certificate: Certificate | None = None) -> Iterator[str]:
    """Host and port of a server that answers with JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            path, _, query = self.path.partition("?")
            found = answer(path, {name: values[0] for name, values in parse_qs(f"{query}&{body}").items()})
            data = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(400 if found is None else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.cert, certificate.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def storage_token(expires: datetime) -> str:
    """What Microsoft gives for Azure's storage; Azurite looks at everything but the signature."""
    claims = {
        "aud": "https://storage.azure.com",
        "iss": "https://sts.windows.net/ab1f708d-50f6-404c-a006-d71b2ac7a606/",
        "iat": int(time.time()) - 10,
        "nbf": int(time.time()) - 10,
        "exp": int(expires.timestamp()),
    }
    return ".".join([_encoded(b'{"alg":"RS256","typ":"JWT"}'), _encoded(json.dumps(claims).encode()), _encoded(b"-")])


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
