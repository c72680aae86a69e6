"""Requests of a probe to S3, with boto3 and not obstore: it tells a wrong secret from a missing bucket, and a second
implementation of the protocol should agree."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from allele.store.capability.found import Failed
from allele.store.capability.rounds import Refused

_BUCKET_CODES = {"NoSuchBucket", "404", "NotFound"}
_CREDENTIAL_CODES = {
    "403", "AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken", "Forbidden",
    "AuthorizationHeaderMalformed", "TokenRefreshRequired", "XAdminUserNotFound",
}  # fmt: skip
_WRONG = {
    "ChecksumSHA256": base64.b64encode(bytes(32)).decode(),
    "ContentMD5": base64.b64encode(bytes(16)).decode(),
}
"""Checksums that no bytes have; a server may know either."""


class S3Client:
    no_version = '"00000000000000000000000000000000"'

    def __init__(self, s3: Any, bucket: str) -> None:
        self._s3 = s3
        self._bucket = bucket

    @classmethod
    def open(cls, bucket: str, environ: Mapping[str, str]) -> S3Client:
        """Raises Failed without credentials."""
        return cls(_call("credentials", lambda: _boto(environ)), bucket)

    def list(self, prefix: str, *, after: str = "") -> Sequence[str]:
        where = {"Bucket": self._bucket, "Prefix": prefix, "StartAfter": after, "MaxKeys": 10}
        found = _call("list", lambda: self._s3.list_objects_v2(**where))
        return [item["Key"] for item in found.get("Contents", ())]

    def put(self, key: str, data: bytes) -> None:
        _call("put", lambda: self._put(key, data))

    def create(self, key: str, data: bytes) -> Any:
        return _conditional("create", lambda: self._put(key, data, IfNoneMatch="*"))["ETag"]

    def replace(self, key: str, data: bytes, version: Any) -> None:
        _conditional("replace", lambda: self._put(key, data, IfMatch=version))

    def read(self, key: str, start: int, length: int) -> bytes:
        where = {"Bucket": self._bucket, "Key": key, "Range": f"bytes={start}-{start + length - 1}"}
        return bytes(_call("read", lambda: self._s3.get_object(**where)["Body"].read()))

    def refuses_damage(self, key: str) -> bool:
        def refused(**checksum: str) -> bool:
            try:
                self._put(key, b"0123456789", **checksum)
            except ClientError as e:
                return _status(e) == 400
            except BotoCoreError:
                pass
            return False

        return any(refused(**{name: value}) for name, value in _WRONG.items())

    def delete(self, key: str) -> None:
        with contextlib.suppress(ClientError, BotoCoreError):
            self._s3.delete_object(Bucket=self._bucket, Key=key)

    def _put(self, key: str, data: bytes, **more: str) -> Any:
        return self._s3.put_object(Bucket=self._bucket, Key=key, Body=data, **more)


def _boto(environ: Mapping[str, str]) -> Any:
    """Keys are given explicitly so that `environ` decides; without them boto3 looks for a workload identity itself."""
    # A session of its own: the default one keeps the credentials that it found first.
    return boto3.Session().client(
        "s3",
        endpoint_url=environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None,
        aws_access_key_id=environ.get("AWS_ACCESS_KEY_ID") or None,
        aws_secret_access_key=environ.get("AWS_SECRET_ACCESS_KEY") or None,
        aws_session_token=environ.get("AWS_SESSION_TOKEN") or None,
        region_name=environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        config=Config(
            connect_timeout=5,
            read_timeout=20,
            retries={"max_attempts": 3, "mode": "standard"},
            s3={"addressing_style": "path"} if environ.get("AWS_ENDPOINT_URL") else {},
        ),
    )


def _conditional(what: str, write: Callable[[], Any]) -> Any:
    """Raises Refused for a failed precondition, Failed for conditions that are no such thing there."""

    def or_refused() -> Any:
        try:
            return write()
        except ClientError as e:
            if _status(e) in (404, 409, 412) and e.response.get("Error", {}).get("Code") not in _BUCKET_CODES:
                raise Refused(str(e)) from e
            raise

    return _call(what, or_refused)


def _call(what: str, request: Callable[[], Any]) -> Any:
    try:
        return request()
    except ClientError as e:
        code, status = e.response.get("Error", {}).get("Code", ""), _status(e)
        if code in _BUCKET_CODES:
            raise Failed("BucketMissing", f"{what}: the bucket does not exist: {e}") from e
        if code in _CREDENTIAL_CODES or status in (401, 403):
            raise Failed("CredentialsRefused", f"{what}: {e}") from e
        if what in ("create", "replace") and status in (400, 501):
            raise Failed("NoConditionalWrites", f"{what}: {e}") from e
        raise Failed("Unreachable", f"{what}: {e}") from e
    except (NoCredentialsError, PartialCredentialsError) as e:
        raise Failed("CredentialsRefused", f"{what}: {e}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from e
    except BotoCoreError as e:
        raise Failed("Unreachable", f"{what}: {e}") from e


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
