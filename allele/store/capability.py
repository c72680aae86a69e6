"""Probe of a store: can this process reach it, and does it do what commits rely on?

`python -m allele.store.capability --store URL [--termination-log PATH]` prints the result as JSON and exits 1 with a
reason when something is missing. boto3 and not obstore, because it tells a wrong secret from a missing bucket, and
because a second implementation of the protocol should agree. What is written lies below `.allele-probe/` and is
removed again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from ulid import ULID

from allele.protocol.errors import InvalidRequest
from allele.protocol.wire import Wire

Reason = Literal[
    "Reachable", "BucketMissing", "CredentialsRefused", "Unreachable", "NoConditionalWrites", "NoRangedReads"
]

_BUCKET_CODES = {"NoSuchBucket", "404", "NotFound"}
_CREDENTIAL_CODES = {
    "403", "AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken", "Forbidden",
    "AuthorizationHeaderMalformed", "TokenRefreshRequired", "XAdminUserNotFound",
}  # fmt: skip
_MAX_MESSAGE = 1024
"""Characters of a termination message that the operator copies."""


class Capabilities(Wire):
    """Result of a probe; the words of `reason` become the reason of the store's Reachable condition."""

    reachable: bool
    reason: Reason
    message: str
    create_only: bool = False
    if_match: bool = False
    ranged_read: bool = False
    list: bool = False


class _Failed(Exception):
    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def probe(url: str, environ: Mapping[str, str] = os.environ) -> Capabilities:
    """Never raises for what a store does; raises InvalidRequest for a URL that names none."""
    parts = urlsplit(url)
    found = dict.fromkeys(("create_only", "if_match", "ranged_read", "list"), False)
    try:
        if parts.scheme == "s3" and parts.netloc:
            s3 = _call("credentials", lambda: _client(environ))
            _probe_s3(s3, bucket=parts.netloc, prefix=unquote(parts.path).strip("/"), found=found)
        elif parts.scheme == "file" and parts.path.strip("/"):
            _probe_folder(Path(unquote(parts.path)), found)
        else:
            raise InvalidRequest(f"store: expected s3://bucket/prefix or file:///dir, found {url!r}")
    except _Failed as e:
        return Capabilities(reachable=False, reason=e.reason, message=f"{url}: {e}"[:_MAX_MESSAGE], **found)
    return Capabilities(reachable=True, reason="Reachable", message=f"{url}: all that commits rely on works", **found)


def _client(environ: Mapping[str, str]) -> Any:
    """Keys are given explicitly so that `environ` decides; without them boto3 looks for a workload identity itself."""
    return boto3.client(
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


def _probe_s3(s3: Any, *, bucket: str, prefix: str, found: dict[str, bool]) -> None:
    key = "/".join(p for p in (prefix, f".allele-probe/{ULID()}") if p)
    _call("list", lambda: s3.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1))
    found["list"] = True
    try:
        created = _call("create", lambda: s3.put_object(Bucket=bucket, Key=key, Body=b"0123456789", IfNoneMatch="*"))
        found["create_only"] = _refused(lambda: s3.put_object(Bucket=bucket, Key=key, Body=b"again", IfNoneMatch="*"))
        stale = '"00000000000000000000000000000000"'
        refused = _refused(lambda: s3.put_object(Bucket=bucket, Key=key, Body=b"other", IfMatch=stale))
        _call("replace", lambda: s3.put_object(Bucket=bucket, Key=key, Body=b"0123456789", IfMatch=created["ETag"]))
        found["if_match"] = refused
        body = _call("read", lambda: s3.get_object(Bucket=bucket, Key=key, Range="bytes=2-4")["Body"].read())
        found["ranged_read"] = body == b"234"
    finally:
        with contextlib.suppress(ClientError, BotoCoreError):
            s3.delete_object(Bucket=bucket, Key=key)
    _require(found)


def _probe_folder(folder: Path, found: dict[str, bool]) -> None:
    """A folder has no etags; the file system's create-only link is what commits rely on there."""
    path = folder / ".allele-probe" / str(ULID())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(b"0123456789")
        try:
            path.open("xb").close()
        except FileExistsError:
            found["create_only"] = found["if_match"] = True
        with path.open("rb") as file:
            file.seek(2)
            found["ranged_read"] = file.read(3) == b"234"
        found["list"] = path.name in os.listdir(path.parent)
        path.unlink()
        with contextlib.suppress(OSError):  # another probe is at work there
            path.parent.rmdir()
    except PermissionError as e:
        raise _Failed("CredentialsRefused", str(e)) from e
    except OSError as e:
        raise _Failed("Unreachable", str(e)) from e
    _require(found)


def _require(found: Mapping[str, bool]) -> None:
    if not (found["create_only"] and found["if_match"]):
        raise _Failed(
            "NoConditionalWrites",
            "If-None-Match or If-Match on PUT is ignored: two writers could overwrite each other's commits",
        )
    if not found["ranged_read"]:
        raise _Failed("NoRangedReads", "Range on GET is ignored: members of a segment could not be read alone")


def _refused(put: Callable[[], object]) -> bool:
    """True when a conditional write that must not succeed is answered with a failed precondition."""
    try:
        put()
    except ClientError as e:
        return _status(e) in (404, 409, 412)
    except BotoCoreError as e:
        raise _Failed("Unreachable", str(e)) from e
    return False


def _call(what: str, request: Callable[[], Any]) -> Any:
    try:
        return request()
    except ClientError as e:
        code, status = e.response.get("Error", {}).get("Code", ""), _status(e)
        if code in _BUCKET_CODES:
            raise _Failed("BucketMissing", f"{what}: the bucket does not exist: {e}") from e
        if code in _CREDENTIAL_CODES or status in (401, 403):
            raise _Failed("CredentialsRefused", f"{what}: {e}") from e
        if what in ("create", "replace") and status in (400, 409, 412, 501):
            raise _Failed("NoConditionalWrites", f"{what}: {e}") from e
        raise _Failed("Unreachable", f"{what}: {e}") from e
    except (NoCredentialsError, PartialCredentialsError) as e:
        raise _Failed("CredentialsRefused", f"{what}: {e}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from e
    except BotoCoreError as e:
        raise _Failed("Unreachable", f"{what}: {e}") from e


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m allele.store.capability", description="Probe a store.")
    parser.add_argument("--store", required=True, help="s3://bucket/prefix or file:///dir")
    parser.add_argument("--termination-log", type=Path, help="also write the result here, as a pod's last message")
    arguments = parser.parse_args(argv)
    result = probe(arguments.store)
    text = result.model_dump_json()
    print(text)
    if arguments.termination_log is not None:
        arguments.termination_log.write_text(text)
    return 0 if result.reachable else 1


if __name__ == "__main__":
    sys.exit(main())
