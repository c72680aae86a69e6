"""Where a store is, from its URL, and how to get in, from the environment: decided here, once, for every client.

The variables are those that the provider's own tools read. What comes out are options that obstore and deltalake both
take. No library of any provider is imported, so that the probe can tell a bad URL without them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from allele.protocol.errors import InvalidRequest

SCHEMES = ("s3", "gs", "az", "file")
FORMS = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///dir"


@dataclasses.dataclass(frozen=True)
class Address:
    scheme: str
    bucket: str
    """Of Azure the container; empty for a folder of this machine."""
    prefix: str
    """Without slashes at its ends."""

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises InvalidRequest for a URL that names no store."""
        parts = urlsplit(url)
        prefix = unquote(parts.path).strip("/")
        is_folder = parts.scheme == "file"
        if parts.scheme not in SCHEMES or is_folder == bool(parts.netloc) or (is_folder and not prefix):
            raise InvalidRequest(f"store: expected {FORMS}, found {url!r}")
        return cls(parts.scheme, parts.netloc, prefix)

    def options(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What obstore and deltalake need to open it (no empty ones). Raises InvalidRequest for what is missing."""
        ways = {"s3": s3_options, "gs": gs_options, "az": az_options}
        return ways[self.scheme](environ) if self.scheme in ways else {}


def s3_options(environ: Mapping[str, str]) -> dict[str, str]:
    """boto3's variables."""
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or ""
    options = {
        "aws_access_key_id": environ.get("AWS_ACCESS_KEY_ID", ""),
        "aws_secret_access_key": environ.get("AWS_SECRET_ACCESS_KEY", ""),
        "aws_session_token": environ.get("AWS_SESSION_TOKEN", ""),
        "aws_region": environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        "aws_endpoint": endpoint,
        "aws_web_identity_token_file": environ.get("AWS_WEB_IDENTITY_TOKEN_FILE", ""),
        "aws_role_arn": environ.get("AWS_ROLE_ARN", ""),
        "aws_role_session_name": environ.get("AWS_ROLE_SESSION_NAME", ""),
        "aws_endpoint_url_sts": environ.get("AWS_ENDPOINT_URL_STS", ""),
        "aws_container_credentials_relative_uri": environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", ""),
        "aws_container_credentials_full_uri": environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI", ""),
        "aws_container_authorization_token_file": environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", ""),
    }
    allow_http = environ.get("AWS_ALLOW_HTTP", "").lower() == "true" or endpoint.startswith("http://")
    return _given(options) | {"aws_allow_http": str(allow_http).lower()}


def gs_options(environ: Mapping[str, str]) -> dict[str, str]:
    """Google's variables, and obstore's GOOGLE_SERVICE_ACCOUNT_KEY (a key's JSON) and GOOGLE_BASE_URL.

    With none of them the metadata server is asked, as it is for workload identity. Behind STORAGE_EMULATOR_HOST nobody
    is asked who they are.
    """
    endpoint, key = environ.get("GOOGLE_BASE_URL", ""), environ.get("GOOGLE_SERVICE_ACCOUNT_KEY", "")
    if emulator := environ.get("STORAGE_EMULATOR_HOST", ""):
        endpoint = emulator if "://" in emulator else f"http://{emulator}"
        anonymous = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        key = json.dumps(anonymous | {"gcs_base_url": endpoint})
    options = {
        "google_service_account_key": key,
        "google_application_credentials": "" if key else environ.get("GOOGLE_APPLICATION_CREDENTIALS", ""),
        "google_base_url": endpoint.rstrip("/"),
        "allow_http": "true" if endpoint.startswith("http://") else "",
    }
    return _given(options)


def az_options(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of Azure's identity library and of its command line.

    The first that is there counts: key, shared access signature, client secret, federated token; with none of them
    the instance's managed identity is asked. Raises InvalidRequest without an account.
    """
    account = environ.get("AZURE_STORAGE_ACCOUNT_NAME") or environ.get("AZURE_STORAGE_ACCOUNT") or ""
    if not account:
        raise InvalidRequest("AZURE_STORAGE_ACCOUNT_NAME: expected the storage account of az://, found nothing")
    endpoint = environ.get("AZURE_STORAGE_ENDPOINT", "")
    options = {
        "azure_storage_account_name": account,
        "azure_storage_account_key": environ.get("AZURE_STORAGE_ACCOUNT_KEY") or environ.get("AZURE_STORAGE_KEY") or "",
        "azure_storage_sas_token": environ.get("AZURE_STORAGE_SAS_TOKEN", ""),
        "azure_client_id": environ.get("AZURE_CLIENT_ID", ""),
        "azure_client_secret": environ.get("AZURE_CLIENT_SECRET", ""),
        "azure_tenant_id": environ.get("AZURE_TENANT_ID", ""),
        "azure_federated_token_file": environ.get("AZURE_FEDERATED_TOKEN_FILE", ""),
        "azure_authority_host": environ.get("AZURE_AUTHORITY_HOST", "").rstrip("/"),
        "azure_storage_endpoint": endpoint.rstrip("/"),
        "azure_allow_http": "true" if endpoint.startswith("http://") else "",
    }
    return _given(options)


def _given(options: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in options.items() if value}
