"""Everything the operator can be told, each with unit, default and reason.

A field is set by its environment variable (`ALLELE_OPERATOR_STATUS_INTERVAL`) or its flag (`--status-interval`), the
flag winning. The chart's values name the same fields.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

PREFIX = "ALLELE_OPERATOR_"
Address = Annotated[str, StringConstraints(pattern=r"^\S*:\d{1,5}$")]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kubeconfig: str = Field("", description="Path of a kubeconfig; empty: the pod's own service account.")
    namespace: tuple[str, ...] = Field(
        (), description="Namespaces to work in (repeat the flag; commas in the environment); none: all."
    )
    listen: Address = Field(
        "0.0.0.0:8080", description="Address of progress reports, health and metrics. Port 0 takes a free one."
    )
    operator_url: str = Field(
        "http://allele-operator.allele-system.svc:8080", description="Where drivers reach `listen`; told to their pods."
    )
    advertise: str = Field(
        "", description="host:port at which other replicas reach this one (the pod's IP); empty: they cannot."
    )
    image: str = Field(
        "allele/rollout:latest",
        description="Image of the Jobs that probe stores, erase and collect populations: one with `allele` and what "
        "its store needs.",
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="Pull policy of these Jobs."
    )
    backend: Literal["Auto", "JobSet", "Job"] = Field(
        "Auto", description="What pools are made of. Auto: JobSet where the API server has it when the operator starts."
    )
    cluster_domain: str = Field("cluster.local", description="DNS domain of the cluster, for the addresses in status.")

    lease_name: str = Field("allele-operator", description="Lease that replicas compete for.")
    lease_namespace: str = Field("allele-system", description="Its namespace.")
    lease_duration: float = Field(
        15,
        description="Seconds after which an unrenewed lease may be taken: the wait for a lost leader.",
        ge=2,
        le=3600,
    )
    renew_deadline: float = Field(
        10,
        description="Seconds since the last renewal after which the leader stops writing and exits; below the "
        "duration, so that the old leader is silent before a new one begins.",
        ge=1,
    )
    lease_retry: float = Field(2, description="Seconds between renewals, and between attempts to take the lease.", gt=0)
    lease_timeout: float = Field(3, description="Longest request for the lease, seconds.", gt=0)

    request_timeout: float = Field(
        8, description="Longest request to the API server, seconds. A write in flight outlives the fence by this.", gt=0
    )
    workers: int = Field(
        8, description="Objects reconciled at once: a write takes some 4 ms, so that these fill one core.", ge=1, le=256
    )
    backoff: float = Field(0.5, description="First delay after a failure, seconds; doubles each time.", gt=0)
    backoff_limit: float = Field(60, description="Largest delay after a failure, seconds.", gt=0)
    status_interval: float = Field(
        10,
        description="Seconds between two status writes of an object that only move numbers on: each is a write in "
        "etcd and an event for every watcher.",
        ge=0,
    )
    resync: float = Field(
        600,
        description="Seconds between full listings, which find what was deleted while a watch was broken.",
        ge=5,
    )
    stuck_after: float = Field(
        120, description="Seconds that one object may wait for, or occupy, a worker before /healthz fails.", ge=5
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged.")

    @model_validator(mode="after")
    def _deadlines(self) -> Settings:
        slowest = self.lease_retry + 2 * self.lease_timeout
        if not slowest <= self.renew_deadline < self.lease_duration:
            raise ValueError(
                f"expected lease_retry + 2 x lease_timeout ({slowest:g} s) <= renew_deadline "
                f"({self.renew_deadline:g} s) < lease_duration ({self.lease_duration:g} s): "
                "or a healthy leader loses its lease"
            )
        return self

    @classmethod
    def load(cls, arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> Settings:
        """From flags and environment. pydantic.ValidationError names the field and what was expected."""
        given: dict[str, object] = {}
        for name in cls.model_fields:
            value = environ.get(PREFIX + name.upper())
            if value:
                given[name] = [v for v in value.split(",") if v] if _repeats(name) else value
        flags = vars(_parser().parse_args(arguments))
        return cls.model_validate(given | {k: v for k, v in flags.items() if v is not None})


def _repeats(name: str) -> bool:
    return get_origin(Settings.model_fields[name].annotation) is tuple


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allele_operator", description="The Allele operator.")
    for name, field in Settings.model_fields.items():
        text = f"{field.description} [{PREFIX}{name.upper()}, default: {field.default!r}]".replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), help=text, action="append" if _repeats(name) else "store")
    return parser
