"""A peer is only a short cut: one that lies or hangs costs a moment, and the store's bytes are served."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from allele.protocol.packed import encode_packed
from tests.rollout.rollout_parts import Service, StoredPopulation, call, random_adapter

Start = Callable[..., Service]


class Peer:
    """Answers every digest with `data`, after `seconds`."""

    def __init__(self) -> None:
        self.data = b""
        self.seconds = 0.0
        self.asked = 0
        peer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["digests"]
                peer.asked += 1
                time.sleep(peer.seconds)
                body = bytes(encode_packed(dict.fromkeys(wanted, peer.data)))
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    found = Peer()
    yield found
    found.close()


@pytest.mark.parametrize("how", ["lies", "hangs"])
def test_the_stores_bytes_are_served_whatever_the_peer_says(
    gateway: Start, population: StoredPopulation, peer: Peer, how: str
) -> None:
    right, wrong = random_adapter(1), random_adapter(2)
    version = population.commit({"a": right, "b": wrong})
    peer.data, peer.seconds = wrong, 0.0 if how == "lies" else 10.0
    service = gateway(peer=peer.url)
    a, b = service.generate([("a", 1, (3, 2)), ("b", 1, (3, 2))], version=version, temperature=1e-6)
    assert peer.asked == 1
    assert a.error is None and b.error is None and a.completion != b.completion
    metrics = call(f"{service.internal}/metrics").body.decode()
    from_peer = 1 if how == "lies" else 0  # what it says of b is the truth
    assert f'allele_gateway_reads_total{{place="store"}} {2 - from_peer}.0' in metrics
    alone = gateway().generate([("a", 1, (3, 2))], version=version, temperature=1e-6)[0]
    assert alone.completion == a.completion
