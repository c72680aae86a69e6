"""AdapterRuntime: the platform team's part of a pool: images, sizes, pod pieces, engine arguments."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from allele.api.schema import FreeForm, Model, Name, Quantity, Status, Text


class Images(Model):
    trainer: str = Field(description="Image of the trainer.", min_length=1, max_length=512)
    engine: str = Field(description="Image of the SGLang engine.", min_length=1, max_length=512)
    gateway: str = Field(description="Image of the gateway.", min_length=1, max_length=512)
    driver: str = Field(description="Image of the driver and of store jobs.", min_length=1, max_length=512)
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="When kubelet pulls them."
    )
    pull_secrets: list[Name] = Field(
        default_factory=list, description="Secrets to pull them with, in the pool's namespace.", max_length=8
    )


class Resources(Model):
    requests: dict[str, Quantity] = Field(
        default_factory=dict, description="Requests of the container, e.g. cpu, memory, nvidia.com/gpu.", max_length=16
    )
    limits: dict[str, Quantity] = Field(default_factory=dict, description="Limits of the container.", max_length=16)


class RoleResources(Model):
    trainer: Resources = Field(default_factory=Resources, description="Resources of a trainer container.")
    engine: Resources = Field(default_factory=Resources, description="Resources of an engine container.")
    gateway: Resources = Field(default_factory=Resources, description="Resources of a gateway container.")
    driver: Resources = Field(default_factory=Resources, description="Resources of a driver container.")


class EnvVar(Model):
    name: str = Field(description="Name of the variable.", min_length=1, max_length=253)
    value: str = Field("", description="Its value.", max_length=4096)


class PodTemplate(Model):
    """Passed through to every pod of the runtime, never interpreted."""

    labels: dict[str, Annotated[str, Field(max_length=63)]] = Field(
        default_factory=dict, description="Labels of every pod.", max_length=32
    )
    annotations: dict[str, Annotated[str, Field(max_length=4096)]] = Field(
        default_factory=dict, description="Annotations of every pod, e.g. Kueue's topology requests.", max_length=32
    )
    node_selector: dict[str, Annotated[str, Field(max_length=63)]] = Field(
        default_factory=dict, description="Nodes the pods may run on.", max_length=32
    )
    tolerations: list[FreeForm] = Field(
        default_factory=list, description="Taints the pods tolerate, as in a pod.", max_length=32
    )
    priority_class_name: Text | None = Field(None, description="Priority class of the pods.")
    scheduler_name: Text | None = Field(None, description="Scheduler of the pods.")
    env: list[EnvVar] = Field(
        default_factory=list, description="Environment variables of every container.", max_length=64
    )


class Environment(Model):
    claim_name: Name = Field(
        description="Read-only claim that holds a Python 3.11 site-packages folder, put on PYTHONPATH of trainer, "
        "engine and driver. For development: in production the images hold everything."
    )


class Engine(Model):
    args: list[Annotated[str, Field(max_length=512)]] = Field(
        default_factory=list, description="Further arguments of sglang.launch_server.", max_length=64
    )
    max_total_tokens: int | None = Field(
        None, description="Tokens in the KV cache of one engine; absent: what memory allows.", ge=1024
    )
    context_length: int | None = Field(None, description="Longest sequence, tokens; absent: the model's.", ge=1)


class AdapterRuntimeSpec(Model):
    images: Images = Field(description="Images of the roles.")
    resources: RoleResources = Field(default_factory=RoleResources, description="Resources of each role's container.")
    pod_template: PodTemplate = Field(default_factory=PodTemplate, description="Pieces of every pod.")
    environment: Environment | None = Field(None, description="A mounted Python environment, for development.")
    engine: Engine = Field(default_factory=Engine, description="Arguments of the SGLang engine.")
    shared_memory: Quantity = Field(
        "1Gi",
        description="Size of /dev/shm in trainer and rollout pods. A gateway keeps packed adapters in half of it, or "
        "in half of its memory limit where that is less; both containers of a rollout map them.",
    )


class AdapterRuntimeStatus(Status):
    pass
