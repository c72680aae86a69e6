"""An HTTP proxy before a real S3 server that counts requests, and kills, breaks, delays or loses them by rules.

It runs as a process of its own (`python -m tests.store.proxy UPSTREAM`), as a client that keeps Python's lock while it
waits for an answer would wait for ever for a proxy in its own process. The Host header is forwarded as it came: what a
client signed for the proxy's address is what the server verifies. `Proxy` is the side of a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

CONTROL = "/proxy-control/"
WRITES = frozenset({"PUT", "POST", "DELETE"})
"""Every POST of S3 here starts or ends a multipart upload, or deletes."""

_LOGGED = 200_000
"""Newest requests that are remembered."""

_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "expect", "upgrade", "te", "trailer"})

Action = Literal[
    "pass",  # only count
    "kill",  # SIGKILL `pid`; the request does not reach the server
    "kill-after",  # SIGKILL `pid` when the server has done it, before the reply
    "stop",  # SIGSTOP `pid` when the server has done it; the reply waits in its socket
    "hold",  # the request stays here until the rule is removed, then goes on
    "delay",  # by `seconds`, then goes on
    "answer",  # `status` instead of the server
    "answer-after",  # `status` instead of the server's reply: it was done
    "reset",  # connection reset, the request does not reach the server
    "lose-reply",  # connection reset when the server has done it
    "reset-reply",  # connection reset in the middle of the reply
    "truncate",  # half the body under the Content-Length of the whole, then an orderly end
    "flip",  # one bit of the body, at the share `at` of it
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Requests whose path and query match, from the `nth` of them on, `times` of them (0: all), or a share of those."""

    action: Action
    path: str = ""
    """Regular expression, searched in path and query."""
    methods: tuple[str, ...] = ()
    """Empty: all."""
    nth: int = 1
    times: int = 1
    share: float = 1.0
    seed: int = 0
    status: int = 503
    seconds: float = 0.0
    pid: int = 0
    at: float = 0.5


@dataclasses.dataclass
class _Armed:
    rule: Rule
    random: random.Random
    removed: asyncio.Event
    seen: int = 0
    hits: int = 0

    def takes(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it."""
        rule = self.rule
        if (rule.methods and method not in rule.methods) or not re.search(rule.path, path):
            return False
        self.seen += 1
        due = self.seen >= rule.nth and (not rule.times or self.hits < rule.times)
        if rule.action == "pass" or not due or (rule.share < 1 and self.random.random() >= rule.share):
            return False
        self.hits += 1
        return True


class _Broken(Exception):
    """The connection to the client ends here."""


class _Server:
    def __init__(self, upstream: str, session: ClientSession) -> None:
        self._upstream = upstream
        self._session = session
        self._rules: dict[int, _Armed] = {}
        self._added = 0
        self._log: deque[tuple[str, str, int]] = deque(maxlen=_LOGGED)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path.startswith(CONTROL):
            return web.json_response(self._control(request.path, await request.read()))
        path = request.raw_path
        armed = [a for a in self._rules.values() if a.takes(request.method, path)]
        try:
            return await self._serve(request, armed[0] if armed else None)
        except (_Broken, ClientError, ConnectionError) as e:
            self._log.append((request.method, path, 0))
            _reset(request)
            raise ConnectionResetError("ended by the proxy") from e

    def _control(self, path: str, body: bytes) -> object:
        match path.removeprefix(CONTROL), json.loads(body):
            case "add", fields:
                self._added += 1
                rule = Rule(**fields)
                self._rules[self._added] = _Armed(rule, random.Random(rule.seed), asyncio.Event())
                return self._added
            case "count", number:
                return [self._rules[number].seen, self._rules[number].hits]
            case "remove", number:
                self._rules[number].removed.set()
                armed = self._rules.pop(number)
                return [armed.seen, armed.hits]
            case "log", pattern:
                return [line for line in self._log if re.search(pattern, line[1])]
        raise ValueError(f"no such control: {path}")

    async def _serve(self, request: web.BaseRequest, armed: _Armed | None) -> web.StreamResponse:
        rule = armed.rule if armed else Rule(action="pass")
        match rule.action:
            case "kill":
                os.kill(rule.pid, signal.SIGKILL)
                raise _Broken
            case "hold" if armed:
                await armed.removed.wait()
            case "delay":
                await asyncio.sleep(rule.seconds)
            case "answer":
                await request.read()
                return self._answer(request, rule.status)
            case "reset":
                raise _Broken
        async with self._forward(request) as reply:
            match rule.action:
                case "kill-after":
                    await reply.read()
                    os.kill(rule.pid, signal.SIGKILL)
                    raise _Broken
                case "stop":
                    os.kill(rule.pid, signal.SIGSTOP)
                case "answer-after":
                    await reply.read()
                    return self._answer(request, rule.status)
                case "lose-reply":
                    await reply.read()
                    raise _Broken
            return await self._reply(request, reply, rule)

    @contextlib.asynccontextmanager
    async def _forward(self, request: web.BaseRequest) -> AsyncIterator[ClientResponse]:
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP]
        url = URL(self._upstream + request.raw_path, encoded=True)
        body = request.content if request.can_read_body else None
        async with self._session.request(
            request.method, url, headers=headers, data=body, allow_redirects=False
        ) as reply:
            yield reply

    async def _reply(self, request: web.BaseRequest, reply: ClientResponse, rule: Rule) -> web.StreamResponse:
        headers = [(k, v) for k, v in reply.headers.items() if k.lower() not in _HOP_BY_HOP]
        out = web.StreamResponse(status=reply.status, reason=reply.reason)
        out.headers.extend(headers)
        await out.prepare(request)
        stop, sent = int(rule.at * (reply.content_length or 0)), 0
        async for chunk in reply.content.iter_any():
            if rule.action in ("truncate", "reset-reply") and sent + len(chunk) > stop:
                await out.write(chunk[: stop - sent])
                if rule.action == "truncate" and request.transport is not None:
                    request.transport.close()
                raise _Broken
            if rule.action == "flip" and sent <= stop < sent + len(chunk):
                at = stop - sent
                chunk = chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]
            await out.write(chunk)
            sent += len(chunk)
        await out.write_eof()
        self._log.append((request.method, request.raw_path, reply.status))
        return out

    def _answer(self, request: web.BaseRequest, status: int) -> web.Response:
        self._log.append((request.method, request.raw_path, status))
        code = {409: "ConditionalRequestConflict", 412: "PreconditionFailed", 429: "TooManyRequests"}
        text = f"<Error><Code>{code.get(status, 'SlowDown')}</Code><Message>by the proxy</Message></Error>"
        return web.Response(status=status, text=text, content_type="application/xml")


def _reset(request: web.BaseRequest) -> None:
    if request.transport is None or request.transport.is_closing():
        return
    connection = request.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()


async def _main(upstream: str) -> None:
    connector = TCPConnector(limit=0)
    async with ClientSession(connector=connector, auto_decompress=False, timeout=ClientTimeout()) as session:
        runner = web.ServerRunner(web.Server(_Server(upstream, session).handle, access_log=None))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()


class Proxy:
    """Control of a running proxy; `environ` is what its clients need."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = dict(environ)

    @classmethod
    @contextlib.contextmanager
    def start(cls, server: Mapping[str, str]) -> Iterator[Proxy]:
        """A proxy before the server of this environment."""
        root = Path(__file__).parents[2]
        command = [sys.executable, "-m", "tests.store.proxy", server["AWS_ENDPOINT_URL"]]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield cls({**server, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
        finally:
            process.kill()
            process.wait()

    def add(self, rule: Rule) -> int:
        """The rule holds from now on; returns its number."""
        return int(self._ask("add", dataclasses.asdict(rule)))

    def count(self, number: int) -> tuple[int, int]:
        """Matching requests, and those that were hit."""
        seen, hits = self._ask("count", number)
        return seen, hits

    def remove(self, number: int) -> tuple[int, int]:
        """End a rule, and let go what it holds; returns its counts."""
        seen, hits = self._ask("remove", number)
        return seen, hits

    @contextlib.contextmanager
    def rule(self, rule: Rule) -> Iterator[int]:
        number = self.add(rule)
        try:
            yield number
        finally:
            self.remove(number)

    def log(self, path: str = "") -> list[tuple[str, str, int]]:
        """(method, path and query, status) of finished requests, oldest first; status 0: without a reply."""
        return [(method, where, status) for method, where, status in self._ask("log", path)]

    def _ask(self, what: str, argument: object) -> Any:
        connection = HTTPConnection(urlsplit(self.environ["AWS_ENDPOINT_URL"]).netloc, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", CONTROL + what, json.dumps(argument))
            reply = connection.getresponse()
            assert reply.status == 200, reply.read()
            return json.load(reply)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
