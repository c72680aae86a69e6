"""Requests of a probe to Google Cloud Storage and Azure Blob, through obstore as everything else.

obstore has one error for most answers; what a server said is read from its words.
"""

from __future__ import annotations

import base64
import contextlib
import re
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.error import HTTPError, URLError

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from allele.protocol.errors import InvalidRequest
from allele.store.address import Address
from allele.store.backends import Backend, connect
from allele.store.capability.found import Failed
from allele.store.capability.rounds import Refused
from allele.store.errors import StoreRefused

_MAX_RETRIES = 2
_SECONDS = 20
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_NOBODY = re.compile(r"token request|federated token file")
"""What obstore says when it could not find out who it is; no server of the store was asked."""

_TOOK = re.compile(r" in [\d.]+(ns|µs|ms|s)\b")
_HINTS = {
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT_KEY, or run with a workload identity",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or run with a workload identity",
}
_WRONG = {"Content-MD5": base64.b64encode(bytes(16)).decode()}
"""A checksum that no bytes have."""


class CloudClient:
    def __init__(self, address: Address, options: Mapping[str, str]) -> None:
        self.no_version = {"e_tag": '"0x1"', "version": "1"}
        self._address = address
        self._options = options
        self._backend = self._connect()

    @classmethod
    def open(cls, address: Address, environ: Mapping[str, str]) -> CloudClient:
        """Raises Failed for credentials that are none."""
        try:
            return cls(address, address.options(environ))
        except (InvalidRequest, StoreRefused) as e:
            raise Failed("CredentialsRefused", str(e)) from e

    def _connect(self, headers: Mapping[str, str] | None = None) -> Backend:
        return connect(self._address, self._options, max_retries=_MAX_RETRIES, seconds=_SECONDS, headers=headers)

    def list(self, prefix: str, *, after: str = "") -> Sequence[str]:
        def first_page() -> Sequence[str]:
            for batch in obstore.list(self._backend, prefix=prefix or None, offset=after or None):
                return [meta["path"] for meta in batch]
            return []

        found: Sequence[str] = self._call("list", first_page)
        return found

    def put(self, key: str, data: bytes) -> None:
        self._call("put", lambda: self._put(key, data, "overwrite"))

    def create(self, key: str, data: bytes) -> Any:
        made = self._call("create", lambda: self._put(key, data, "create"))
        return {name: value for name, value in made.items() if value is not None}

    def replace(self, key: str, data: bytes, version: Any) -> None:
        self._call("replace", lambda: self._put(key, data, version))

    def read(self, key: str, start: int, length: int) -> bytes:
        return bytes(self._call("read", lambda: obstore.get_range(self._backend, key, start=start, length=length)))

    def refuses_damage(self, key: str) -> bool:
        """With an account's key by a signed URL, since a header that obstore does not sign makes it wrong."""
        try:
            if "azure_storage_account_key" in self._options:
                url = obstore.sign(self._backend, "PUT", key, timedelta(minutes=5))
                headers = {**_WRONG, "x-ms-blob-type": "BlockBlob"}
                request = urllib.request.Request(url, method="PUT", data=b"0123456789", headers=headers)
                urllib.request.urlopen(request, timeout=_SECONDS).close()
            else:
                obstore.put(self._connect(_WRONG), key, b"0123456789", use_multipart=False)
        except HTTPError as e:
            return e.code == 400
        except BaseError as e:
            return _status(e) == 400
        except URLError:
            pass
        return False

    def delete(self, key: str) -> None:
        with contextlib.suppress(BaseError, OSError):
            obstore.delete(self._backend, key)

    def _put(self, key: str, data: bytes, mode: Any) -> Any:
        return obstore.put(self._backend, key, data, mode=mode, use_multipart=False)

    def _call(self, what: str, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except (AlreadyExistsError, PreconditionError) as e:
            raise Refused(_words(e)) from e
        except (BaseError, OSError) as e:
            raise self._failed(what, e) from e

    def _failed(self, what: str, error: Exception) -> Failed:
        words, status = _words(error), _status(error)
        said = f"{what}: {words}"
        if _NOBODY.search(words):
            return Failed("CredentialsRefused", f"{said}; {_HINTS[self._address.scheme]}")
        if status in (401, 403):
            return Failed("CredentialsRefused", said)
        if status == 404:
            return Failed("BucketMissing", f"the bucket does not exist: {said}")
        if what in ("create", "replace") and status in (400, 501):
            return Failed("NoConditionalWrites", said)
        if what == "read" and status == 0 and "range" in words.lower():
            return Failed("NoRangedReads", said)
        return Failed("Unreachable", said)


def _status(error: Exception) -> int:
    """HTTP status of the answer; 0 where there was none, or it was not the status that was wrong."""
    return int(match[1]) if (match := _STATUS.search(str(error))) else 0


def _words(error: Exception) -> str:
    """Its first line, with the code that the server gave, and without times, so that the same is said the same way."""
    line = _TOOK.sub("", str(error).strip().split("\n", 1)[0].partition("<")[0]).strip(" :")
    code = match[1] if (match := _CODE.search(str(error))) else ""
    return f"{line[:400]} {code}".strip()
