"""How containers reach a store of each provider."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from allele.api.store import AdapterStoreSpec
from allele_operator.planning.model import Obj

_SECRET_KEYS = {
    "S3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "GCS": ("GOOGLE_SERVICE_ACCOUNT_KEY",),
    "Azure": ("AZURE_STORAGE_ACCOUNT_KEY",),
}
_SCHEMES = {"S3": "s3", "GCS": "gs", "Azure": "az"}
_ENDPOINTS = {"S3": "AWS_ENDPOINT_URL", "GCS": "GOOGLE_BASE_URL", "Azure": "AZURE_STORAGE_ENDPOINT"}
_AZURE_IDENTITY = {"azure.workload.identity/use": "true"}
"""Azure's webhook gives its tokens to pods with this label; those of other providers go by the service account."""


@dataclasses.dataclass(frozen=True)
class StoreAccess:
    """The store's URL, variables with secrets by reference only, and what its pods must carry."""

    url: str
    env: tuple[Obj, ...] = ()
    service_account: str | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, spec: AdapterStoreSpec) -> StoreAccess:
        secret = spec.credentials.secret_name
        env: list[Obj] = []
        if secret:
            env += [
                {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
                for key in _SECRET_KEYS[spec.provider]
            ]
        if spec.provider == "S3":
            env.append({"name": "AWS_REGION", "value": spec.region or "us-east-1"})
        if spec.account:
            env.append({"name": "AZURE_STORAGE_ACCOUNT_NAME", "value": spec.account})
        if spec.endpoint:
            env.append({"name": _ENDPOINTS[spec.provider], "value": spec.endpoint})
            if spec.provider == "S3" and spec.endpoint.startswith("http://"):
                env.append({"name": "AWS_ALLOW_HTTP", "value": "true"})
        url = f"{_SCHEMES[spec.provider]}://{spec.bucket}" + (f"/{spec.prefix}" if spec.prefix else "")
        labels = _AZURE_IDENTITY if spec.provider == "Azure" and not secret else {}
        return cls(url, tuple(env), spec.credentials.service_account_name, labels)
