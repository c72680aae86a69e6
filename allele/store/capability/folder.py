"""A folder as a store: the file system's create-only link is what commits rely on there; it has no versions."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ulid import ULID

from allele.store.capability.found import Failed, Found, Latency
from allele.store.capability.rounds import ROUNDS, median_ms


def look(folder: Path, found: Found) -> None:
    """Raises Failed."""
    top = folder / ".allele-probe"
    path = top / str(ULID())
    try:
        top.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(b"0123456789")
        try:
            path.open("xb").close()
        except FileExistsError:
            found.create_only = found.if_match = True
        with path.open("rb") as file:
            file.seek(2)
            found.ranged_read = file.read(3) == b"234"
        found.list = path.name in os.listdir(top)
        found.latency = _measure(path)
        path.unlink()
        with contextlib.suppress(OSError):  # another probe is at work there
            top.rmdir()
    except PermissionError as e:
        raise Failed("CredentialsRefused", str(e)) from e
    except OSError as e:
        raise Failed("Unreachable", str(e)) from e


def _measure(path: Path) -> Latency:
    new = [path.with_name(f"{path.name}-{i}") for i in range(ROUNDS)]
    latency = Latency(
        put=median_ms(lambda i: path.write_bytes(b"0123456789")),
        get=median_ms(lambda i: path.read_bytes()),
        conditional_put=median_ms(lambda i: new[i].open("xb").close()),
    )
    for file in new:
        file.unlink()
    return latency
