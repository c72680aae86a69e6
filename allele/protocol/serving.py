"""Exposure: a gateway loads revisions and compares what it serves with what was trained; the driver commits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from allele.protocol.wire import Wire

Prefix = Annotated[str, Field(pattern=r"^([A-Za-z0-9._-]+/)+$", max_length=200)]
"""Of request ids, as `run/<uid>/`: it ends in `/`, so that run/1/ is none of run/10/."""

Refusal = Literal["Gap", "NotMoved", "LoadFailed"]
"""Why a revision may not be exposed: it is not what was trained, it does nothing new, or it cannot be served."""


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
    outage: bool = False
    """The replica is to blame, not the revision: its engine is starting, it is full, or its store is away."""


class ProbeReply(Wire):
    results: tuple[ProbeResult, ...]
    seconds: float


class Tier(Wire):
    name: Literal["hot", "host", "disk"]
    adapters: int
    bytes: int
    capacity: int


class GatewayStatus(Wire):
    """`GET /v1/status` on the internal port; pushed to the operator in a GatewayReport."""

    replica: str
    engine: Literal["Starting", "Ready", "Failed"]
    engine_version: str
    publish_path: Literal["Native", "Bulk"]
    publish_path_message: str = Field("", max_length=512)
    """Why adapters are published one by one, if they are."""
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


class GatewayReport(Wire):
    """`POST /v1/gateways` of the operator, or of `allele run`: the whole state of one replica.

    Which replica it is, the operator knows from the token.
    """

    namespace: str
    pool: str
    status: GatewayStatus


class Prefetch(Wire):
    """`POST /v1/prefetch` on a gateway's internal port: these will be sampled soon, so have them loaded.

    It replaces what the same run announced before; without targets that is all that it does.
    """

    namespace: str
    population: str
    run: str
    """Uid."""
    version: int
    """Catalogue version that holds these revisions."""
    targets: tuple[Target, ...] = Field(max_length=65536)
    seconds: float = Field(gt=0, le=3600)
    """For which they are kept."""


class Prefetched(Wire):
    taken: int
    """Targets that there is room for; they are loaded when this is answered, or soon after."""
