"""What the store says, kept near: one index per population, opened on first use and tailed ever after.

Resolving a name never waits for the store, but for the first name of a population and for a request that carries a
catalogue version newer than the one seen.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from allele.format import AdapterShape, adapter_config
from allele.protocol.adapters import AdapterName
from allele.protocol.commands import ByteRange
from allele.protocol.errors import InvalidRequest, NotExposed, NotFound, ProtocolError, Unavailable
from allele.store.errors import ObjectNotFound, StoreError, StoreUnavailable
from allele.store.facts import Fact
from allele.store.index import Index
from allele.store.objects import Objects
from allele.store.population import PopulationStore
from allele.store.provenance import Provenance
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.exposure import candidates

_log = logging.getLogger(__name__)
_VERSION_WAIT = 15.0
"""Seconds to wait for a catalogue version that a request demands; the log is consistent, so it is there at once or
never."""
_CONFIGS = 100_000
OWNER_EVERY = 10
"""Rounds of tailing between looks at whose folder a population's is."""

T = TypeVar("T")


class Population:
    """One population, as far as its catalogue has been read."""

    def __init__(self, store: PopulationStore, index: Index, *, uid: str, base_name: str) -> None:
        self._store = store
        self._index = index
        self._uid = uid
        self._base_name = base_name
        self._provenance: dict[str, Provenance] = {}
        self._configs: dict[tuple[str, str], bytes] = {}
        """adapter_config.json by provenance and group: a resident adapter is served without asking the store."""
        self._tail = asyncio.Lock()
        self.gone = False
        """Bytes were missing, and the folder is another population's now, or nobody's."""

    @property
    def version(self) -> int:
        return self._index.version

    async def refresh(self) -> None:
        async with self._tail:
            self._index.apply(await from_store(asyncio.to_thread(self._index.fetch)))
            await asyncio.to_thread(self._index.fold)

    async def stands(self) -> bool:
        """Whether the folder still is this population's. Its name may be another's since: a catalogue that was erased
        and begun again has no news for a reader of the first one."""
        record = await from_store(asyncio.to_thread(self._store.record))
        return record is not None and record.uid == self._uid and not record.erasing

    async def seen(self, version: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Return once the catalogue has been read up to `version`. Raises Unavailable when it is not there."""
        begun = clock()
        while self._index.version < version:
            await self.refresh()
            if self._index.version < version:
                if clock() - begun > _VERSION_WAIT:
                    found = self._index.version
                    raise Unavailable(f"catalogue: expected version {version}, found {found}", retry_after=2.0)
                await asyncio.sleep(0.1)

    def fact(self, member: str, revision: int) -> Fact:
        """The Committed fact of a revision; raises NotFound, saying whether member, revision or bytes are missing."""
        where = self._name(member, None)
        if member not in self._index:
            raise NotFound(f"{where}: no such member at catalogue version {self.version}")
        fact = self._index.get(member, revision)
        if fact is None:
            newest = self._index.newest(member)
            raise NotFound(f"{where}: no revision {revision}, the newest is {newest.revision if newest else None}")
        if self._index.is_retired(member, revision):
            raise NotFound(f"{where}: revision {revision} is retired, its bytes are gone")
        return fact

    def parent(self, fact: Fact) -> Fact | None:
        """The fact of the revision that this one was trained from, if it was trained from one."""
        return None if fact.parent is None else self._index.get(fact.member, fact.parent)

    async def committed(self, member: str, revision: int | None) -> Adapter:
        """The adapter of an explicit revision, exposed or not."""
        if revision is None:
            raise InvalidRequest("revision: expected a number, found none")
        return await self._adapter(self.fact(member, revision))

    async def exposed(self, member: str) -> list[Adapter]:
        """What to serve under the bare name, best first: the exposed revision, then the one exposed before it.

        The second is for bytes that turn out to be damaged; a hold has no second. Raises NotFound or NotExposed.
        """
        where = self._name(member, None)
        if member not in self._index:
            raise NotFound(f"{where}: no such member at catalogue version {self.version}")
        revisions = candidates(self._index.exposed(member), self._index.hold(member), self._index.exposures(member))
        if not revisions:
            raise NotExposed(f"{where}: the member exists but no revision is exposed yet; name one as {where}@N")
        return [await self.committed(member, r) for r in revisions]

    def is_held(self, member: str, revision: int) -> bool:
        """Whether a person has set this revision to be served."""
        hold = self._index.hold(member)
        return hold is not None and hold.revision == revision

    def exposed_members(self) -> Sequence[str]:
        return self._index.exposed_members()

    async def provenance(self, fact: Fact) -> Provenance:
        sha = fact.provenance
        if sha is None:
            raise NotFound(f"{self._name(fact.member, fact.revision)}: the revision has no provenance")
        if sha not in self._provenance:
            self._provenance[sha] = await from_store(asyncio.to_thread(self._store.read_provenance, sha))
            while len(self._provenance) > 256:
                self._provenance.pop(next(iter(self._provenance)))
        return self._provenance[sha]

    async def _adapter(self, fact: Fact) -> Adapter:
        name = self._name(fact.member, fact.revision)
        if fact.weights is None:
            raise NotFound(f"{name}: expected bytes with the revision, found none")
        return Adapter(name, fact.weights, await self._config(fact), shelf=self)

    async def _config(self, fact: Fact) -> bytes:
        key = (fact.provenance or "", fact.group or "")
        if key not in self._configs:
            spec = (await self.provenance(fact)).shapes.get(fact.group)
            if spec is None:
                name = self._name(fact.member, fact.revision)
                raise NotFound(f"{name}: expected the shape of group {fact.group!r} with the revision, found none")
            config = adapter_config(
                AdapterShape(tensors=(), rank=spec.stored_rank, targets=spec.targets, dtype="F32"),
                scale=spec.scale,
                base_name=self._base_name,
            )
            text = json.dumps(config, sort_keys=True).encode()
            self._configs[key] = next((c for c in self._configs.values() if c == text), text)
            while len(self._configs) > _CONFIGS:
                self._configs.pop(next(iter(self._configs)))
        return self._configs[key]

    async def read(self, ranges: Sequence[ByteRange]) -> list[bytes | ProtocolError]:
        """The bytes of each range, or why there are none; neighbours in one request."""
        try:
            return list(await from_store(self._store.aread_many(ranges)))
        except Unavailable as e:
            return [e] * len(ranges)
        except ProtocolError as e:  # of one of them
            if len(ranges) == 1:
                if isinstance(e, NotFound) and not await self.stands():
                    self.gone = True
                return [e]
        half = len(ranges) // 2
        return [*await self.read(ranges[:half]), *await self.read(ranges[half:])]

    def _name(self, member: str, revision: int | None) -> AdapterName:
        return AdapterName(self._store.namespace, self._store.population, member, revision)


@dataclasses.dataclass(frozen=True)
class _Absent:
    error: NotFound
    until: float


class Populations:
    """Populations by namespace and name, opened when first asked for."""

    def __init__(
        self, objects: Objects, *, base_name: str, base_digest: str, forget_absent: float, clock: Callable[[], float]
    ) -> None:
        self._objects = objects
        self._base_name = base_name
        self._base_digest = base_digest
        self._forget_absent = forget_absent
        self._clock = clock
        self._open: dict[tuple[str, str], asyncio.Future[Population]] = {}
        self._absent: dict[tuple[str, str], _Absent] = {}

    async def get(self, namespace: str, population: str, *, version: int | None = None) -> Population:
        """Raises NotFound, InvalidRequest (a population of another base), or Unavailable."""
        key = (namespace, population)
        self._close_gone(key)
        if key not in self._open:
            absent = self._absent.get(key)
            if absent is not None and version is None and self._clock() < absent.until:
                raise absent.error
            self._absent.pop(key, None)
            self._open[key] = asyncio.ensure_future(self._first(namespace, population))
        opening = self._open[key]
        try:
            found = await asyncio.shield(opening)
        except ProtocolError as e:
            if self._open.get(key) is opening:
                del self._open[key]
            if isinstance(e, NotFound) and len(self._absent) < 10_000:
                self._absent[key] = _Absent(e, self._clock() + self._forget_absent)
            raise
        if version is not None:
            await found.seen(version)
        return found

    def _close_gone(self, key: tuple[str, str]) -> None:
        if (found := self.opened().get(key)) is not None and found.gone:
            del self._open[key]

    def opened(self) -> dict[tuple[str, str], Population]:
        return {k: f.result() for k, f in self._open.items() if f.done() and not f.exception()}

    async def discover(self, namespace: str) -> Sequence[str]:
        """Names of the populations of a namespace in the store."""
        return await from_store(asyncio.to_thread(self._objects.folders, namespace))

    async def tail(self, *, interval: float, on_failure: Callable[[], None]) -> None:
        """Background task: follow the Delta logs of the populations that are open."""
        for turn in itertools.count(1):
            await asyncio.sleep(interval)
            for key, population in self.opened().items():
                try:
                    await population.refresh()
                    if turn % OWNER_EVERY == 0 and not await population.stands():
                        _log.warning("Population %s/%s was erased or has another owner: opened again when asked", *key)
                        self._open.pop(key, None)
                except ProtocolError as e:
                    on_failure()
                    _log.warning("Catalogue of %s/%s not read, trying again: %s", *key, e)

    async def _first(self, namespace: str, name: str) -> Population:
        store = PopulationStore.of(self._objects, namespace=namespace, population=name)
        record = await from_store(asyncio.to_thread(store.record))
        if record is None:
            raise NotFound(f"{namespace}/{name}: no such population in {self._objects.url()}")
        if record.base_digest != self._base_digest:
            raise InvalidRequest(
                f"{namespace}/{name}: base digest: expected {self._base_digest}, as this engine holds, "
                f"found {record.base_digest}"
            )
        population = Population(store, Index(store.catalogue, history=False), uid=record.uid, base_name=self._base_name)
        await population.refresh()
        return population


async def from_store(call: Awaitable[T]) -> T:
    """The store's errors as those that travel."""
    try:
        return await call
    except ObjectNotFound as e:
        raise NotFound(f"store: {e}") from e
    except StoreUnavailable as e:
        raise Unavailable(f"store: {e}", retry_after=2.0) from e
    except StoreError as e:
        raise Unavailable(f"store: {type(e).__name__}: {e}") from e
