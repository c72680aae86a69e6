"""What the operator knows of the cluster: slim projections of watched objects, indexed for the plans.

Three sources feed it: listings, kopf's events, and the answers to our own writes. They arrive in any order, so an older
resourceVersion never replaces a newer one (they are comparable, KEP-5504). kopf never tells of what was deleted while a
watch was broken; `settle` removes it after each listing.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from allele.protocol.progress import Progress
from allele_operator.planning.model import GatewaySeen, Obj, Options, Ref
from allele_operator.planning.observe import project

_TOMBSTONES = 4096


class Cache:
    """The World of the plans. `progress` gives the newest report of a run by its uid, `gateways` those of a pool's."""

    def __init__(
        self,
        options: Options,
        *,
        progress: Callable[[str], Progress | None],
        gateways: Callable[[str], Sequence[GatewaySeen]],
    ) -> None:
        self.options = options
        self.listening = datetime.now(UTC)
        self._progress = progress
        self._gateways = gateways
        self._objects: dict[Ref, Obj] = {}
        self._places: defaultdict[tuple[str, str], dict[str, Ref]] = defaultdict(dict)
        self._owned: defaultdict[str, set[Ref]] = defaultdict(set)
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._ending: set[str] = set()

    def get(self, ref: Ref) -> Obj | None:
        return self._objects.get(ref)

    def owned(self, owner_uid: str, kind: str) -> list[Obj]:
        refs = self._owned.get(owner_uid, ())
        return [self._objects[r] for r in sorted(refs) if r.kind == kind]

    def select(self, kind: str, namespace: str) -> list[Obj]:
        return [self._objects[r] for r in self._places.get((kind, namespace), {}).values()]

    def ends(self, namespace: str) -> bool:
        return namespace in self._ending

    def ending(self, namespace: str, *, ends: bool) -> None:
        """What was found when the namespace was looked up: it is not watched."""
        (self._ending.add if ends else self._ending.discard)(namespace)

    def progress(self, uid: str) -> Progress | None:
        return self._progress(uid)

    def gateways(self, uid: str) -> Sequence[GatewaySeen]:
        return self._gateways(uid)

    def refs(self, *kinds: str) -> list[Ref]:
        return [r for r in self._objects if r.kind in kinds]

    def count(self) -> dict[str, int]:
        """Objects by kind."""
        counts: dict[str, int] = defaultdict(int)
        for (kind, _), names in self._places.items():
            counts[kind] += len(names)
        return dict(counts)

    def put(self, kind: str, raw: Obj) -> tuple[Obj, Obj | None] | None:
        """The new and the old projection if anything that a plan can see changed, else None."""
        new = project(kind, raw)
        if _uid(new) in self._gone:  # the answer to a write of ours that came after the deletion
            return None
        ref = Ref.of(new)
        old = self._objects.get(ref)
        if old is not None and _version(old) > _version(new):
            return None
        self._drop(ref)
        self._objects[ref] = new
        self._places[kind, ref.namespace][ref.name] = ref
        for owner in new["metadata"]["ownerReferences"]:
            self._owned[owner["uid"]].add(ref)
        return None if old is not None and _visible(old) == _visible(new) else (new, old)

    def remove(self, ref: Ref, *, uid: str) -> Obj | None:
        """The last projection, if this very object was known. It never comes back: uids are not reused."""
        self._gone[uid] = None
        if len(self._gone) > _TOMBSTONES:
            self._gone.popitem(last=False)
        old = self._objects.get(ref)
        if old is None or _uid(old) != uid:
            return None
        self._drop(ref)
        return old

    def settle(self, kind: str, *, listed: set[str], version: str, namespace: str | None) -> Iterator[Obj]:
        """Removes and yields objects of the kind that a listing taken at `version` no longer had (by uid).

        Younger ones than the listing stay: they were put while it ran.
        """
        for ref in self.refs(kind):
            obj = self._objects[ref]
            inside = namespace is None or ref.namespace == namespace
            if inside and _uid(obj) not in listed and _version(obj) <= int(version):
                self._drop(ref)
                yield obj

    def _drop(self, ref: Ref) -> None:
        old = self._objects.pop(ref, None)
        if old is None:
            return
        place = self._places[ref.kind, ref.namespace]
        place.pop(ref.name, None)
        if not place:
            del self._places[ref.kind, ref.namespace]
        for owner in old["metadata"]["ownerReferences"]:
            siblings = self._owned[owner["uid"]]
            siblings.discard(ref)
            if not siblings:
                del self._owned[owner["uid"]]


def _uid(obj: Obj) -> str:
    return str(obj["metadata"]["uid"])


def _version(obj: Obj) -> int:
    return int(obj["metadata"]["resourceVersion"])


def _visible(obj: Obj) -> Obj:
    return obj | {"metadata": {k: v for k, v in obj["metadata"].items() if k != "resourceVersion"}}
