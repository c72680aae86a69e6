"""AdapterStore: the bucket that holds the truth about adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from allele.api.schema import Model, Name, Status, cel, schema

Provider = Literal["S3", "GCS", "Azure"]


class Credentials(Model):
    secret_name: Name | None = Field(
        None,
        description="Secret in this namespace with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (S3), "
        "GOOGLE_SERVICE_ACCOUNT_KEY, the JSON of a service account's key (GCS), or AZURE_STORAGE_ACCOUNT_KEY (Azure). "
        "Absent: the pods' workload identity.",
    )
    service_account_name: Name | None = Field(
        None, description="Service account whose workload identity may use the bucket. Default: the namespace's."
    )


class AdapterStoreSpec(Model):
    model_config = ConfigDict(
        json_schema_extra=schema(
            cel("self.provider != 'Azure' || has(self.account)", "Azure needs the name of the storage account"),
            cel("self.provider == 'Azure' || !has(self.account)", "account belongs to Azure", path=".account"),
            cel("self.provider == 'S3' || !has(self.region)", "region belongs to S3", path=".region"),
            cel("self.provider == 'GCS' || !self.bucket.contains('_')", "only GCS has names with _", path=".bucket"),
            cel("self.provider != 'Azure' || !self.bucket.contains('.')", "a container has no dots", path=".bucket"),
        )
    )

    provider: Provider = Field(
        "S3",
        description="What keeps the bucket: S3 (AWS, and servers that speak its protocol), GCS (Google Cloud Storage) "
        "or Azure (Blob Storage). Default: S3.",
        json_schema_extra=schema(cel("self == oldSelf", "provider is immutable: create another AdapterStore")),
    )
    account: str | None = Field(
        None,
        description="Azure: name of the storage account; needed there. Default: none.",
        pattern=r"^[a-z0-9]{3,24}$",
        max_length=24,
        json_schema_extra=schema(cel("self == oldSelf", "account is immutable: create another AdapterStore")),
    )
    bucket: str = Field(
        description="Name of the bucket (Azure: of the container); it must exist.",
        min_length=3,
        max_length=63,
        pattern=r"^[a-z0-9][a-z0-9._-]*[a-z0-9]$",
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
        description="URL of the server. Absent: the provider's own (Azure: https://ACCOUNT.blob.core.windows.net).",
        max_length=253,
        pattern=r"^https?://[^\s]+$",
    )
    region: str | None = Field(None, description="S3: region of the bucket. Default: us-east-1.", max_length=63)
    credentials: Credentials = Field(default_factory=Credentials, description="How pods get access.")


class Latency(Model):
    put: int = Field(description="Milliseconds of a small PUT, rounded up.", ge=0)
    get: int = Field(description="Milliseconds of a small GET, rounded up.", ge=0)
    conditional_put: int = Field(description="Milliseconds of a small PUT that must be the first, rounded up.", ge=0)


class AdapterStoreStatus(Status):
    url: str = Field("", description="Where populations of this namespace lie.", max_length=1024)
    capabilities: list[str] = Field(
        default_factory=list,
        description="What the probe found to work: CreateOnly, IfMatch, RangedRead, List, Checksums.",
        max_length=16,
        json_schema_extra={"items": {"type": "string", "maxLength": 63}},
    )
    latency: Latency | None = Field(
        None, description="How long one request took when the probe ran, the median of five. Absent: not known."
    )
