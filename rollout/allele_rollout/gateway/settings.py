"""Configuration of a gateway, declared once: the command line is generated from these fields."""

from __future__ import annotations

import argparse
import dataclasses
import socket
from typing import Any, Self

from allele.store.address import FORMS


def _field(text: str, *, default: Any = dataclasses.MISSING, reason: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"help": " ".join(filter(None, (text, reason)))})


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """One gateway, beside one engine."""

    engine: str = _field("URL of the engine, on this host.")
    store: str = _field(f"URL of the store: {FORMS}.")
    namespace: str = _field("Namespace whose populations tenants may name.")
    base_name: str = _field("Model name under which tenants reach the bare base.")
    base_digest: str = _field("sha256:... of the base that the engine holds; adapters of another base are refused.")
    cache_dir: str = _field("Folder of the disk tier: packed adapters by digest.")
    slots: int = _field("Adapters in one engine batch, the bare base not counted.")
    listen: str = _field("Tenant address.", default="0.0.0.0:8000")
    internal: str = _field("Internal address: generate, probe, status, metrics.", default="0.0.0.0:8001")
    host_dir: str = _field("Folder in shared memory, which the engine sees under the same path.", default="/dev/shm")
    host_bytes: int = _field(
        "Size of the host tier in bytes; 0 means half of what host_dir has free or the memory limit allows, at most "
        "16 GiB.",
        default=0,
    )
    loaded: int = _field(
        "Adapters registered with an engine that takes them one by one; 0 means four times the slots.",
        default=0,
        reason="Each such load answers with the list of all, so this is not free. Without effect in bulk.",
    )
    cache_bytes: int = _field("Size of the disk tier in bytes.", default=8 << 30)
    running: int = _field("Sequences at the engine at once.", default=1024)
    requests: int = _field("Tenant requests inside, running or waiting; more get 429.", default=1280)
    batches: int = _field("Internal batches (generate, probe) inside, running or waiting; more get 429.", default=68)
    quantum: int = _field(
        "Sequences that a member may start in a turn while others wait for a slot.",
        default=64,
        reason="More: fewer changes of slots, longer turns of others.",
    )
    patience: float = _field("Seconds after which a waiting request goes before all others.", default=5.0)
    deadline: float = _field("Seconds a request may take, waiting included.", default=600.0)
    tail_seconds: float = _field("Seconds between looks at the Delta logs.", default=2.0)
    peer: str = _field("URL of the pool's trainer, asked for adapters before the store; empty: none.", default="")
    report: str = _field("URL that takes reports at /v1/gateways; empty: none are sent.", default="")
    report_token_file: str = _field("Bearer token for it, read anew for each report.", default="")
    settle_seconds: float = _field(
        "Seconds from SIGTERM, and from being unready, until the ports close.",
        default=0.0,
        reason="A Service sends requests here until all nodes know that this replica leaves.",
    )
    finish_seconds: float = _field("Seconds that requests under way may then take.", default=20.0)
    replica: str = _field("Name of this replica in status.", default=socket.gethostname())

    def __post_init__(self) -> None:
        if self.slots < 1 or (self.loaded and self.loaded < self.slots):
            raise ValueError(f"loaded: expected at least slots ({self.slots}, itself at least 1), found {self.loaded}")
        if ":" in self.base_name:
            raise ValueError(f"base_name: expected no ':' (the engine's separator), found {self.base_name!r}")

    @property
    def max_loaded(self) -> int:
        return self.loaded or 4 * self.slots

    @classmethod
    def parse(cls, argv: list[str]) -> Self:
        parser = argparse.ArgumentParser(prog="allele_rollout.gateway")
        for f in dataclasses.fields(cls):
            required = f.default is dataclasses.MISSING
            kind = str if required and f.type == "str" else int if f.type == "int" else type(f.default)
            parser.add_argument(
                f"--{f.name.replace('_', '-')}",
                type=kind,
                required=required,
                default=None if required else f.default,
                help=f.metadata["help"] + ("" if required else f" Default {f.default}."),
            )
        return cls(**vars(parser.parse_args(argv)))


def address(text: str) -> tuple[str, int]:
    """`host:port`."""
    host, _, port = text.rpartition(":")
    return host, int(port)
