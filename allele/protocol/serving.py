"""Exposure: a gateway loads revisions and compares what it serves with what was trained; the driver commits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from allele.protocol.wire import Wire

Prefix = Annotated[str, Field(pattern=r"^([A-Za-z0-9._-]+/)+$", max_length=200)]
"""Of request ids, as `run/<uid>/`: it ends in `/`, so that run/1/ is none of run/10/."""


class Gate(Wire):
    """When a revision may be exposed. Gaps are of logprobs, over the probe's completion tokens."""

    max_gap: float = 1e-4
    """Largest |served − trained| allowed."""
    min_move: float = 1e-5
    """Smallest max |served − parent's trained| demanded; serving the parent's bytes moves nothing."""


class Target(Wire):
    member: str
    revision: int


class ProbeRequest(Wire):
    """`POST /v1/probe` on a gateway's internal port: load each target, then run its stored probe."""

    namespace: str
    population: str
    version: int
    """Catalogue version that holds these revisions."""
    targets: tuple[Target, ...]
    gate: Gate


class ProbeResult(Wire):
    member: str
    revision: int
    verdict: Literal["Passed", "Gap", "NotMoved", "LoadFailed"]
    max_gap: float | None = None
    mean_gap: float | None = None
    move: float | None = None
    message: str = ""


class ProbeReply(Wire):
    results: tuple[ProbeResult, ...]
    seconds: float


class Tier(Wire):
    name: Literal["hot", "host", "disk"]
    adapters: int
    bytes: int
    capacity: int


class GatewayStatus(Wire):
    """`GET /v1/status` on the internal port."""

    replica: str
    engine: Literal["Starting", "Ready", "Failed"]
    engine_version: str
    publish_path: Literal["Native", "Bulk"]
    publish_path_message: str = ""
    """Why adapters are published one by one."""
    base_digest: str
    tiers: tuple[Tier, ...]
    populations: dict[str, int]
    """Catalogue version seen of each namespace/population."""


class AbortRequest(Wire):
    """`POST /v1/abort` on a gateway's internal port: give up the batches of `/v1/generate` below a prefix."""

    prefix: Prefix


class AbortReply(Wire):
    batches: int
    """Those that were waiting or running here; each is answered with all of its samples aborted."""
