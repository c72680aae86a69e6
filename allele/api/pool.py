"""BasePool: one base model kept resident, by a trainer and rollouts that many runs and populations share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from allele.api.schema import Digest, Model, Name, Status, cel, schema

Targets = Annotated[
    list[Annotated[str, Field(max_length=63, pattern=r"^[a-z][a-z0-9_]*$")]],
    Field(min_length=1, max_length=16, json_schema_extra=schema(list_type="set")),
]
QWEN3_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_POWERS = "self in [1, 2, 4, 8, 16, 32, 64, 128, 256]"
Rank = Annotated[
    int,
    Field(
        ge=1,
        le=256,
        json_schema_extra=schema(cel(_POWERS, "rank must be a power of two from 1 to 256")) | {"format": "int32"},
    ),
]


class Base(Model):
    uri: str = Field(
        description="Folder with config.json, tokenizer and safetensors: s3://, gs:// or az://bucket/path at the "
        "server of the pool's store, or file:///path for a mounted folder.",
        min_length=1,
        max_length=1024,
        json_schema_extra=schema(
            cel(
                "['s3://', 'gs://', 'az://', 'file:///'].exists(form, self.startsWith(form))",
                "uri must begin with s3://, gs://, az:// or file:///",
            )
        ),
    )
    digest: Digest = Field(description="Digest that `allele base put` printed; checked when the base is fetched.")
    volume_claim: Name | None = Field(
        None, description="Claim that keeps the fetched base across pods; absent: an emptyDir, fetched by each pod."
    )


class Adapters(Model):
    max_rank: Rank = Field(16, description="Largest rank that the pool's engines make room for.")
    targets: Targets = Field(
        default_factory=lambda: list(QWEN3_TARGETS),
        description="Modules that adapters may change. Default: all linear layers of Qwen3 and Llama.",
        json_schema_extra={"default": [*QWEN3_TARGETS]},
    )


SlotCount = Annotated[
    Annotated[int, Field(ge=1, le=65536)] | Literal["auto"],
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 5,
        }
        | schema(
            cel(
                "type(self) == int ? self >= 1 && self <= 65536 : self == 'auto'",
                "slots must be a number from 1 to 65536, or auto",
            )
        )
    ),
]


class Trainer(Model):
    slots: SlotCount = Field(
        16,
        description="Adapters of one shape resident for training at once; auto: as many as the trainer finds room for "
        "when it starts (status.slots tells).",
    )


class Rollout(Model):
    replicas: int = Field(
        1, description="Engines with a gateway beside each.", ge=0, le=1000, json_schema_extra={"format": "int32"}
    )
    slots: int = Field(
        16, description="Adapters in one engine's memory at once.", ge=1, le=4096, json_schema_extra={"format": "int32"}
    )


class BasePoolSpec(Model):
    model_config = ConfigDict(
        json_schema_extra=schema(
            cel(
                "has(self.trainer) == has(oldSelf.trainer)",
                "trainer cannot be added or removed: create another pool",
            )
        )
    )
    base: Base = Field(
        description="The base model.",
        json_schema_extra=schema(cel("self == oldSelf", "base is immutable: create another pool")),
    )
    runtime_ref: Name = Field(description="AdapterRuntime of this namespace.")
    store_ref: Name = Field(
        description="AdapterStore of this namespace.",
        json_schema_extra=schema(cel("self == oldSelf", "storeRef is immutable: create another pool")),
    )
    adapters: Adapters = Field(default_factory=Adapters, description="What adapters the pool makes room for.")
    trainer: Trainer | None = Field(None, description="The trainer; absent: the pool only serves.")
    rollout: Rollout = Field(default_factory=Rollout, description="The rollout engines.")
    suspend: bool = Field(False, description="True: no pods; runs wait.")


class Slots(Model):
    total: int = Field(0, description="Training slots; 0 with auto until a first run has told.", ge=0)
    used: int = Field(0, description="Of these, holding an adapter.", ge=0)
    wave: int = Field(0, description="Adapters that train at a time; 0 until a first run has told.", ge=0)
    reason: str = Field(
        "", description="Where the number comes from: given, or what the trainer found.", max_length=512
    )


class TierStatus(Model):
    name: Literal["hot", "host", "disk"] = Field(
        description="Hot: in the engines' slots. Host: in their host memory. Disk: on the nodes."
    )
    adapters: int = Field(0, description="Adapters in it; one counts once for each replica that has it.", ge=0)
    bytes: int = Field(0, description="Their bytes.", ge=0)
    capacity: int = Field(0, description="What there is room for: adapters, of disk bytes.", ge=0)


class Engines(Model):
    ready: int = Field(0, description="That answer.", ge=0)
    starting: int = Field(0, description="That have not answered yet.", ge=0)
    failed: int = Field(0, description="That answered and do not any more.", ge=0)


class BasePoolStatus(Status):
    replicas: int = Field(0, description="Ready rollout pods.", ge=0, json_schema_extra={"format": "int32"})
    engines: Engines | None = Field(None, description="Engines, as the gateways beside them say.")
    tiers: list[TierStatus] | None = Field(
        None,
        description="Where adapters are, of all gateways that reported of late.",
        max_length=3,
        json_schema_extra=schema(list_type="map", list_map_keys=["name"]),
    )
    publish_path: Literal["Bulk", "Native", "Mixed"] | None = Field(
        None,
        description="How new revisions get into engines: Bulk in one call, Native one by one; Mixed: replicas differ.",
    )
    selector: str = Field("", description="Label selector of the rollout pods (scale subresource).", max_length=512)
    job_set: str = Field("", description="Name of the JobSet that runs the pool.", max_length=63)
    endpoint: str = Field("", description="OpenAI-compatible URL inside the cluster.", max_length=512)
    slots: Slots | None = Field(None, description="Training slots, total and used.")
    runs: int = Field(0, description="Runs that train in this pool now.", ge=0)
