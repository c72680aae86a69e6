"""One HTTP exchange with the API server, and the fence before every write.

kubernetes.aio gives configuration, TLS and token refresh; its typed models and its dynamic client are not used: they
validate what the server validates anyway, drop `fieldValidation`, and send patches that custom resources refuse. Its
default timeout is five minutes and transport errors come as aiohttp's own; both are closed here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from allele_operator.cluster.errors import ApiError, FenceShut
from allele_operator.cluster.kinds import Obj

JSON = "application/json"
JSON_PATCH, MERGE_PATCH = "application/json-patch+json", "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"  # JSON is YAML: the body needs no other encoder
_CONNECT_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    path: str
    kind: str
    """For counters only."""
    body: Any = None
    query: Mapping[str, Any] = field(default_factory=dict)
    content_type: str = JSON

    @property
    def writes(self) -> bool:
        """Reviews are questions that happen to be asked by POST."""
        return self.method != "GET" and self.kind != "TokenReview"


class Observer(Protocol):
    """Told of every exchange; code 0: no answer."""

    def __call__(self, request: Request, *, code: int, seconds: float) -> None: ...


async def connect(kubeconfig: str, *, connections: int = 32) -> ApiClient:
    """A client of its own connection pool. `kubeconfig` is a path; empty means the pod's service account.

    `load_incluster_config` reads the token again each minute, as kubelet rotates it.
    """
    conf = Configuration(tcp_connector_limit_per_host=connections)
    if kubeconfig:
        await config.load_kube_config(config_file=kubeconfig, client_configuration=conf)
    else:
        config.load_incluster_config(client_configuration=conf)
    api = ApiClient(conf)
    api.user_agent = "allele-operator"
    return api


class Transport:
    """Sends requests. A write is refused with FenceShut when `fence()` is false at the moment of sending."""

    def __init__(
        self, api: ApiClient, *, timeout: float, fence: Callable[[], bool], observe: Observer | None = None
    ) -> None:
        self._api = api
        self._timeout = timeout
        self._fence = fence
        self._observe = observe

    async def call(self, request: Request) -> Obj:
        """The decoded answer. ApiError for anything outside 2xx and for no answer within the timeout."""
        if request.writes and not self._fence():
            raise FenceShut(f"{request.method} {request.path}: the lease is no longer held for sure")
        start = time.monotonic()
        code = 0
        try:
            code, headers, data = await self._exchange(request)
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise ApiError(0, type(e).__name__, f"{request.method} {request.path}: {e}") from e
        finally:
            if self._observe is not None:
                self._observe(request, code=code, seconds=time.monotonic() - start)
        body = _decode(data)
        if 200 <= code < 300:
            return body
        message = str(body.get("message") or data[:300].decode(errors="replace"))
        raise ApiError(code, str(body.get("reason", "")), message, retry_after=_seconds(headers.get("Retry-After")))

    async def _exchange(self, request: Request) -> tuple[int, Mapping[str, str], bytes]:
        prepared = await self._api.param_serialize(
            request.method,
            request.path,
            query_params=list(request.query.items()),
            body=request.body,
            auth_settings=["BearerToken"],
            header_params={"Accept": JSON, "Content-Type": request.content_type},
        )
        limit = aiohttp.ClientTimeout(total=self._timeout, sock_connect=_CONNECT_SECONDS)
        answer = await self._api.call_api(*prepared, _request_timeout=limit)
        data = await answer.read()
        return int(answer.status), answer.getheaders(), data or b""


def _decode(data: bytes) -> Obj:
    """{} for what is not a JSON object: a proxy in between may answer with a page."""
    try:
        body = json.loads(data) if data else {}
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 0), 0.0), 120.0)
    except ValueError:  # an HTTP date: the API server does not send these
        return 0.0
