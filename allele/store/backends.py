"""obstore's client of each provider, with the retries and time limits of this project."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TypeAlias

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from allele.store.address import Address
from allele.store.errors import StoreRefused

Backend: TypeAlias = S3Store | GCSStore | AzureStore | LocalStore

MAX_RETRIES = 8
_RETRY_SECONDS = 60


def connect(
    address: Address,
    options: Mapping[str, str],
    *,
    max_retries: int = MAX_RETRIES,
    seconds: int = _RETRY_SECONDS,
    headers: Mapping[str, str] | None = None,
) -> Backend:
    """A client; nothing is sent yet. `seconds` limit a request, and all its repetitions; `headers` go with each.

    Raises StoreRefused for credentials that cannot even be parsed.
    """
    if address.scheme == "file":
        return LocalStore("/" + address.prefix, mkdir=True)
    client = {
        "timeout": f"{seconds}s",
        "connect_timeout": "5s",
        "default_headers": dict(headers or {}),
        "allow_http": any(name.endswith("allow_http") and value == "true" for name, value in options.items()),
    }
    retry = {"max_retries": max_retries, "retry_timeout": timedelta(seconds=seconds)}
    shared = {"client_options": client, "retry_config": retry}
    try:
        if address.scheme == "s3":
            return S3Store(address.bucket, config={**options, "aws_conditional_put": "etag"}, **shared)
        if address.scheme == "gs":
            return GCSStore(address.bucket, config=dict(options), **shared)
        return AzureStore(address.bucket, config=dict(options), **shared)
    except (BaseError, ValueError) as e:
        where = f"{address.scheme}://{address.bucket}"
        raise StoreRefused(f"{where}: credentials refused: {str(e).strip().splitlines()[0][:300]}") from e


def delta_options(address: Address, options: Mapping[str, str]) -> dict[str, str]:
    """`storage_options` of deltalake for the same store."""
    if address.scheme == "file":
        return {}
    conditional = {"conditional_put": "etag"} if address.scheme == "s3" else {}
    return {**options, **conditional, "max_retries": str(MAX_RETRIES)}
