"""Answers every GET with 200, as a role that is ready; with 503 while a test has made the file UNREADY."""

from __future__ import annotations

import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

UNREADY = "/tmp/unready"


class _Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if os.path.exists(UNREADY) else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def serve(flag: str) -> None:
    """`flag` names the argument with host:port. The first process of a container has no default answer to SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    port = sys.argv[sys.argv.index(flag) + 1].rpartition(":")[2]
    ThreadingHTTPServer(("0.0.0.0", int(port)), _Ready).serve_forever()
