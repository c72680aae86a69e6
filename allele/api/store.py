"""AdapterStore: the bucket that holds the truth about adapters."""

from __future__ import annotations

from pydantic import Field

from allele.api.schema import Model, Name, Status, cel, schema


class Credentials(Model):
    secret_name: Name | None = Field(
        None,
        description="Secret in this namespace with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Absent: the "
        "pods' workload identity.",
    )
    service_account_name: Name | None = Field(
        None, description="Service account whose workload identity may use the bucket. Default: the namespace's."
    )


class AdapterStoreSpec(Model):
    bucket: str = Field(
        description="Name of the bucket; it must exist.",
        min_length=3,
        max_length=63,
        pattern=r"^[a-z0-9][a-z0-9.-]*[a-z0-9]$",
        json_schema_extra=schema(cel("self == oldSelf", "bucket is immutable: create another AdapterStore")),
    )
    prefix: str = Field(
        "",
        description="Folder in the bucket, without slashes at its ends; populations lie below it as namespace/name.",
        max_length=253,
        pattern=r"^([A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)?$",
        json_schema_extra=schema(cel("self == oldSelf", "prefix is immutable: create another AdapterStore")),
    )
    endpoint: str | None = Field(
        None,
        description="URL of an S3-compatible server; absent: AWS.",
        max_length=253,
        pattern=r"^https?://[^\s]+$",
    )
    region: str = Field("us-east-1", description="Region of the bucket.", max_length=63)
    credentials: Credentials = Field(default_factory=Credentials, description="How pods get access.")


class AdapterStoreStatus(Status):
    url: str = Field("", description="Where populations of this namespace lie.", max_length=1024)
    capabilities: list[str] = Field(
        default_factory=list,
        description="What the probe found to work: CreateOnly, IfMatch, RangedRead, List.",
        max_length=16,
        json_schema_extra={"items": {"type": "string", "maxLength": 63}},
    )
