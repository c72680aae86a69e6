"""The questions that a probe asks of any provider, over a client of a few requests."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ulid import ULID

from allele.store.capability.found import Failed, Found, Latency

ROUNDS = 5
"""Requests of each kind that are timed."""

_BODY = b"0123456789"


class Refused(Exception):
    """A conditional write was answered with a failed precondition."""


class Client(Protocol):
    """Requests that raise Failed, or Refused where they have a condition. A version is whatever a write returned."""

    no_version: Any
    """A version that no object has."""

    def list(self, prefix: str, *, after: str = "") -> Sequence[str]:
        """Names below a prefix, those after one only; one page is enough."""

    def put(self, key: str, data: bytes) -> None: ...

    def create(self, key: str, data: bytes) -> Any:
        """Write only where nothing is; returns the version."""

    def replace(self, key: str, data: bytes, version: Any) -> None:
        """Write only over this version."""

    def read(self, key: str, start: int, length: int) -> bytes: ...

    def refuses_damage(self, key: str) -> bool:
        """Whether bytes that are not those of their checksum are refused for that reason."""

    def delete(self, key: str) -> None:
        """Does not raise."""


def look(client: Client, prefix: str, found: Found) -> None:
    """Raises Failed as soon as it is known that the store will not do."""
    client.list(prefix)
    folder = "/".join(p for p in (prefix, f".allele-probe/{ULID()}") if p)
    names = _Names(folder)
    try:
        _conditions(client, names, found)
        found.ranged_read = client.read(names["a"], 2, 3) == _BODY[2:5]
        there = [names["a"], names["b"], names["c"]]
        for name in there[1:]:
            client.put(name, _BODY)
        found.list = (sorted(client.list(folder)), list(client.list(folder, after=there[1]))) == (there, there[2:])
        found.checksums = client.refuses_damage(names["damaged"])
        found.latency = _measure(client, names)
    finally:
        for name in names.used:
            with contextlib.suppress(Failed):
                client.delete(name)


class _Names:
    """Names in the probe's folder, and which were used."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> str:
        key = f"{self._folder}/{name}"
        self.used.add(key)
        return key


def _conditions(client: Client, names: _Names, found: Found) -> None:
    key = names["a"]
    try:
        version = client.create(key, _BODY)
    except Refused as e:
        raise Failed("NoConditionalWrites", f"a new name cannot be created: {e}") from e
    found.create_only = _refused(lambda: client.create(key, b"again"))
    refused = _refused(lambda: client.replace(key, b"other", client.no_version))
    try:
        client.replace(key, _BODY, version)
    except Refused as e:
        raise Failed("NoConditionalWrites", f"a known version cannot be replaced: {e}") from e
    found.if_match = refused


def _refused(write: Callable[[], object]) -> bool:
    try:
        write()
    except Refused:
        return True
    return False


def _measure(client: Client, names: _Names) -> Latency:
    """Every write has a name of its own, since some providers limit how often one name is written."""
    return Latency(
        put=median_ms(lambda i: client.put(names[f"put-{i}"], _BODY)),
        get=median_ms(lambda i: client.read(names[f"put-{i}"], 0, len(_BODY))),
        conditional_put=median_ms(lambda i: client.create(names[f"create-{i}"], _BODY)),
    )


def median_ms(request: Callable[[int], object]) -> float:
    """Milliseconds of `request(0)`, `request(1)`, …: the median of ROUNDS."""

    def one(i: int) -> float:
        begun = time.perf_counter()
        request(i)
        return (time.perf_counter() - begun) * 1e3

    return round(statistics.median(one(i) for i in range(ROUNDS)), 3)
