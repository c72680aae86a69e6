"""HTTP between the driver and other roles: bodies in, bodies out, errors as the classes they were raised as."""

from __future__ import annotations

import aiohttp
from pydantic import ValidationError

from allele.protocol.errors import ErrorReply, ProtocolError, Unavailable, raise_reply

JSON = "application/json"
_GATEWAY_ERRORS = (502, 503, 504)


def session() -> aiohttp.ClientSession:
    """One for the whole driver. A dead node without a reset is noticed after ten minutes of silence."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)
    # Servers close idle connections after some seconds; ours forgets them first.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3, force_close=False)
    return aiohttp.ClientSession(timeout=timeout, connector=connector)


async def post(session: aiohttp.ClientSession, url: str, data: bytes, *, media: str = JSON) -> bytes:
    """Raises the ProtocolError that the role raised, or aiohttp's errors."""
    async with session.post(url, data=data, headers={"Content-Type": media}) as response:
        return _checked(url, response.status, await response.read())


async def get(session: aiohttp.ClientSession, url: str) -> bytes:
    """As `post`."""
    async with session.get(url) as response:
        return _checked(url, response.status, await response.read())


def _checked(url: str, status: int, body: bytes) -> bytes:
    if status < 300:
        return body
    try:
        reply = ErrorReply.model_validate_json(body)
    except ValidationError as e:
        found = f"{url}: expected an answer of ours, found status {status}: {body[:200].decode(errors='replace')}"
        raise (Unavailable if status in _GATEWAY_ERRORS else ProtocolError)(found) from e
    raise_reply(reply)
    raise AssertionError("raise_reply raises")
