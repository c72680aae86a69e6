"""Names of adapters: `population/member[@revision]`, in a namespace.

The same text is what a client sends as OpenAI `model`, what logs print and what the engine calls a loaded adapter,
so it is parsed in one place and refused in one place.
"""

from __future__ import annotations

import dataclasses
import re

from allele.protocol.errors import InvalidRequest

MEMBER_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""1 to 63 characters; no `/ @ :` nor control characters, so that names compose and print safely."""

POPULATION_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclasses.dataclass(frozen=True, order=True)
class AdapterName:
    """One adapter; without `revision`, whatever is exposed now."""

    namespace: str
    population: str
    member: str
    revision: int | None = None

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{self.namespace}/{self.population}/{self.member}{at}"

    @property
    def model(self) -> str:
        """What an OpenAI client inside the namespace sends as `model`."""
        return str(self).split("/", 1)[1]


def parse_model(model: str, namespace: str) -> AdapterName:
    """`[namespace/]population/member[@revision]` → AdapterName.

    Raises InvalidRequest when the text does not have that form.
    """
    path, _, revision = model.partition("@")
    parts = path.split("/")
    if len(parts) == 2:
        parts.insert(0, namespace)
    fits = (
        len(parts) == 3
        and all(POPULATION_NAME.fullmatch(p) for p in parts[:2])
        and MEMBER_NAME.fullmatch(parts[2])
        and ("@" not in model or (revision.isascii() and revision.isdigit()))
    )
    if not fits:
        raise InvalidRequest(f"model: expected population/member or population/member@revision, found {model!r}")
    namespace, population, member = parts
    return AdapterName(namespace, population, member, revision=int(revision) if revision else None)
