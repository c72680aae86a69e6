"""The engine's HTTP API, as far as the gateway uses it.

Two failures are told apart, because they ask for different things: the engine is gone (`EngineGone`: nothing is
loaded any more) and the engine refused (`EngineRefused`: this request or adapter is wrong, others are fine).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import aiohttp

from allele.protocol.errors import InvalidRequest, Unavailable

JSON = Mapping[str, Any]


class EngineGone(Unavailable):
    """No connection, or it broke: the engine is starting, or died."""


class EngineRefused(InvalidRequest):
    """The engine answered that it will not do this."""

    @property
    def unknown_adapter(self) -> bool:
        """Whether the engine does not know an adapter that it was told to use: it restarted behind our back."""
        return "never been loaded" in str(self) or "adapters are not loaded" in str(self)


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What distinguishes one start of the engine from another."""

    boot: str
    version: str
    experts: bool
    """Whether it tells which experts a token took."""


class EngineClient:
    """One engine. `last_answer` is the monotonic time of its last answer from a forward pass."""

    def __init__(self, url: str, *, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url.rstrip("/")
        self._clock = clock
        # The engine closes idle connections after 5 s; ours must forget them first, or a request meets a closed one.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=timeout))
        self.last_answer = -float("inf")

    async def close(self) -> None:
        await self._session.close()

    async def info(self) -> EngineInfo:
        """Raises EngineGone until the server is up."""
        found = await self._call("GET", "/server_info", within=10)
        # Measured durations of its start-up, in floating point: no two starts share them.
        boot = json.dumps(found["startup_time"], sort_keys=True)
        experts = bool(found["enable_return_routed_experts"])
        return EngineInfo(boot=boot, version=str(found["version"]), experts=experts)

    async def answers(self, *, within: float) -> None:
        """Raises EngineGone unless the engine generates a token now."""
        await self.generate({"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}, within=within)

    async def adapters(self) -> list[str]:
        """Names loaded now."""
        return [m["id"] for m in (await self._call("GET", "/v1/models"))["data"] if m.get("parent")]

    async def bulk(self) -> str:
        """Why adapters cannot be published in bulk; empty when they can."""
        try:
            await self.upsert([], [])
        except EngineRefused as e:
            return str(e)
        return ""

    async def upsert(self, files: Sequence[JSON], remove: Sequence[str]) -> None:
        """The plugin's call: all of it or EngineRefused; returns when what was removed has left the engine."""
        await self._call("POST", "/allele/upsert", {"files": list(files), "remove": list(remove)})

    async def load(self, name: str, folder: str) -> None:
        await self._call("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    async def unload(self, name: str) -> None:
        await self._call("POST", "/unload_lora_adapter", {"lora_name": name}, within=60)

    async def generate(self, body: JSON, *, within: float | None = None) -> Any:
        found = await self._call("POST", "/generate", body, within=within)
        self.last_answer = self._clock()
        return found

    async def forward(self, path: str, body: JSON) -> aiohttp.ClientResponse:
        """The raw response of an OpenAI endpoint; the caller releases it, or closes it to cancel the request."""
        return await self._guard(lambda: self._session.post(self._url + path, json=body))

    async def _call(self, method: str, path: str, body: JSON | None = None, *, within: float | None = None) -> Any:
        limit = aiohttp.ClientTimeout(total=within) if within else self._session.timeout

        async def once() -> tuple[int, bytes]:
            async with self._session.request(method, self._url + path, json=body, timeout=limit) as response:
                return response.status, await response.read()

        status, data = await self._guard(once)
        if status in (502, 503):
            raise EngineGone(f"engine: {path} answered {status}", retry_after=2.0)
        if status >= 300:
            raise EngineRefused(f"engine: {path} answered {status}: {refusal(data)}")
        return json.loads(data)

    async def _guard(self, send: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await send()
        except (aiohttp.ClientError, OSError) as e:
            raise EngineGone(f"engine: no answer from {self._url}: {type(e).__name__} {e}", retry_after=2.0) from e


async def read_whole(response: aiohttp.ClientResponse) -> bytes:
    """Raises EngineGone when the connection breaks."""
    try:
        return await response.read()
    except aiohttp.ClientError as e:
        raise EngineGone(f"engine: gone in the middle of an answer: {e}", retry_after=2.0) from e


def refusal(data: bytes) -> str:
    """The engine's reason, out of the shapes in which it gives one; lists of all adapters are cut off."""
    try:
        found = json.loads(data)
    except ValueError:
        return data[:300].decode(errors="replace")
    error = found.get("error", found) if isinstance(found, dict) else found
    text = error.get("message") or error.get("error_message") if isinstance(error, dict) else error
    return str(text or found)[:300]
