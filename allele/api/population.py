"""AdapterPopulation: groups of members that share a base, each member an adapter of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from allele.api.pool import QWEN3_TARGETS, Rank, Targets
from allele.api.schema import Digest, FreeForm, Model, Name, Status, Text, cel, schema
from allele.protocol.initialisation import BaseMode, InitKind, Scaling, stored_rank

DeletionPolicy = Literal["Retain", "Delete"]


class BaseRef(Model):
    digest: Digest = Field(description="Digest of the base; a pool with another base is refused.")


class Manifest(Model):
    config_map: Name = Field(description="ConfigMap of this namespace that holds the manifest.")
    key: Text = Field("members.jsonl", description='Its key: one JSON object a line, {"name": …, "parameters": {…}}.')


class Members(Model):
    model_config = ConfigDict(
        json_schema_extra=schema(
            cel(
                "has(self.count) != has(self.manifest)",
                "exactly one of count and manifest must be set",
                reason="FieldValueInvalid",
            )
        )
    )
    count: int | None = Field(
        None,
        description="Number of members, named <group>-0000 and so on.",
        ge=1,
        le=1_000_000,
        json_schema_extra={"format": "int32"},
    )
    manifest: Manifest | None = Field(None, description="Names and parameters of the members.")


class Init(Model):
    model_config = ConfigDict(
        json_schema_extra=schema(
            cel(
                "!(self.kind in ['Standard', 'MiCA']) || self.baseMode == 'Untouched'",
                "baseMode must be Untouched with kind Standard or MiCA: they begin as the base itself",
                reason="FieldValueInvalid",
            ),
            cel(
                "self.kind in ['Standard', 'MiCA'] || self.baseMode != 'Untouched'",
                "baseMode must be SharedResidual or Rank2r with kind PiSSA, MiLoRA, OLoRA or OLoRATail: they begin as "
                "a part of the base, which must be taken away somewhere",
                reason="FieldValueInvalid",
            ),
        )
    )
    kind: InitKind = Field(
        "Standard",
        description="Standard: A uniform, B zero. From the base's singular vectors: PiSSA the largest, MiLoRA the "
        "smallest, OLoRATail the smallest without their values, MiCA the smallest in B, which stays, and A zero. "
        "OLoRA: the base's QR factors. A new adapter always equals the base.",
    )
    base_mode: BaseMode = Field(
        "Untouched",
        description="Untouched: the base as it is. SharedResidual: base.digest is a residual base, made by "
        "`allele base residual`. Rank2r: the base as it is, and an adapter of twice the rank, half of it frozen.",
    )


class Adapter(Model):
    model_config = ConfigDict(
        json_schema_extra=schema(
            cel(
                "self.init.baseMode != 'Rank2r' || self.rank <= 128",
                "rank must be at most 128 with baseMode Rank2r: the adapter is stored with twice the rank",
                reason="FieldValueInvalid",
            )
        )
    )
    rank: Rank = Field(8, description="Rank of the adapter's matrices, of the half that trains with baseMode Rank2r.")
    alpha: float = Field(16, description="What the scale is made from, by scaling.", gt=0, le=65536)
    scaling: Scaling = Field(
        "Standard",
        description="The scale of an adapter. Standard: alpha/rank. RankStabilised: alpha/√rank. Fixed: alpha.",
    )
    targets: Targets = Field(
        default_factory=lambda: list(QWEN3_TARGETS),
        description="Modules that the adapter changes.",
        json_schema_extra={"default": [*QWEN3_TARGETS]},
    )
    init: Init = Field(default_factory=Init, description="What a new adapter begins as, and over which base.")

    @property
    def stored_rank(self) -> int:
        """Of its matrices: what trainer and engines must have room for."""
        return stored_rank(self.rank, self.init.base_mode)


class Group(Model):
    model_config = ConfigDict(
        json_schema_extra=schema(
            cel(
                "has(self.members.manifest) || size(self.name) <= 56",
                "name of a group by count must be at most 56 characters, so that its members' names fit in 63",
            )
        )
    )
    name: Name = Field(description="Name of the group; members by count are named after it.")
    members: Members = Field(description="Who belongs to it.")
    adapter: Adapter = Field(default_factory=Adapter, description="Shape of each member's adapter.")
    seed: int = Field(
        0,
        description="With a member's name, seeds its initialisation.",
        ge=0,
        le=2**31 - 1,
        json_schema_extra={"format": "int64"},
    )
    parameters: FreeForm = Field(
        default_factory=dict, description="Given to the environment with each member; a manifest's row may override."
    )


class Exposure(Model):
    max_gap: float = Field(
        1e-4, description="Largest |served − trained| log-probability on the probe that is still exposed.", gt=0, le=10
    )
    min_move: float = Field(
        1e-5, description="Least change of the probe's log-probabilities against the parent revision.", ge=0, le=10
    )


_CRON = "[0-9A-Za-z*/,-]+"
"""A field of a cron expression, roughly: what it may hold is checked when the CronJob is made."""


class Retention(Model):
    """What collection keeps besides what is exposed, pinned, held, or can be resumed from."""

    keep_last: int = Field(5, description="Newest revisions of each member that are kept.", ge=1, le=1_000_000)
    every: int = Field(
        0, description="Revisions whose number is a multiple of this are kept as well; 0: none.", ge=0, le=1_000_000
    )
    grace_hours: int = Field(
        24,
        description="Hours for which bytes stay after they are no longer needed; must be longer than the longest step "
        "of a run.",
        ge=1,
        le=8760,
    )
    schedule: str | None = Field(
        None,
        description="When a CronJob collects: five fields of cron in UTC, e.g. `17 3 * * *` for every day at 3:17. "
        "Absent: only `allele gc` does.",
        max_length=100,
        json_schema_extra=schema(
            cel(
                f"self.matches('^({_CRON} +){{4}}{_CRON}$')",
                "schedule must be five fields of cron in UTC (minute hour day-of-month month day-of-week), such as "
                "'17 3 * * *'",
                reason="FieldValueInvalid",
            )
        ),
    )


class AdapterPopulationSpec(Model):
    base: BaseRef = Field(
        description="The base that all members adapt.",
        json_schema_extra=schema(cel("self == oldSelf", "base is immutable: create another population")),
    )
    store_ref: Name = Field(
        description="AdapterStore of this namespace.",
        json_schema_extra=schema(cel("self == oldSelf", "storeRef is immutable: create another population")),
    )
    groups: list[Group] = Field(
        description="Groups of members.",
        min_length=1,
        max_length=32,
        json_schema_extra=schema(
            cel(
                "oldSelf.all(o, self.exists(n, n.name == o.name))",
                "a group cannot be removed or renamed: its revisions are kept",
            ),
            cel(
                "oldSelf.all(o, self.all(n, n.name != o.name || n.adapter == o.adapter))",
                "the adapter of a group is immutable: add another group",
            ),
            cel(
                "!self.exists(g, g.adapter.init.baseMode == 'SharedResidual') || "
                "self.all(g, g.adapter == self[0].adapter)",
                "with baseMode SharedResidual all groups must have the same adapter: the residual base is made for one",
                reason="FieldValueInvalid",
            ),
            list_type="map",
            list_map_keys=["name"],
        ),
    )
    exposure: Exposure = Field(default_factory=Exposure, description="When a revision may be served.")
    retention: Retention = Field(default_factory=Retention, description="What collection keeps, and when it runs.")
    deletion_policy: DeletionPolicy = Field(
        "Retain",
        description="What becomes of the population's folder in the store when this object is deleted. Retain: it "
        "stays. Delete: a Job deletes it once no run trains the population, and the object stays until that is done; "
        "Retain then lets it go.",
    )
    adopt: bool = Field(
        False,
        description="True: take over what another object of this name left in the store, if base and shapes agree.",
    )


class MemberCounts(Model):
    total: int = Field(0, description="Members declared.", ge=0)
    trained: int = Field(0, description="Members with a committed revision.", ge=0)
    failed: int = Field(0, description="Members that stopped with an error in the last run.", ge=0)


class RevisionCounts(Model):
    committed: int = Field(0, description="Revisions in the store.", ge=0)
    exposed: int = Field(0, description="Exposures so far.", ge=0)


class AdapterPopulationStatus(Status):
    members: MemberCounts | None = Field(None, description="Members by state.")
    revisions: RevisionCounts | None = Field(None, description="Revisions by state.")
    url: str = Field("", description="Its folder in the store.", max_length=1024)
