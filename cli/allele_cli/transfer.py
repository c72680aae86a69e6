"""`allele export | import`: revisions out of a population as PEFT folders, and folders into it as revisions."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

import allele
from allele.format import AdapterShape, Imported, export_peft, import_peft
from allele.protocol.adapters import AdapterName
from allele.protocol.commands import OptimizerSpec
from allele.store.facts import Fact
from allele.store.index import Index
from allele.store.objects import Objects
from allele.store.population import PopulationRecord, PopulationStore
from allele.store.provenance import DataRange, ImportRef, Provenance, ShapeRef, Versions
from allele_cli.access import Adapter, NamespaceOption, StoreOption, asked, parse_adapter
from allele_cli.failure import Failure

RUN = "import"
"""Run of all imports of a population: its fence lets one at a time commit, so that no two take one revision."""


def export(
    adapter: Adapter,
    to: Annotated[Path, typer.Option(help="Folder to write adapter_model.safetensors and adapter_config.json into.")],
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
) -> None:
    """Write a revision as a folder that PEFT, vLLM and SGLang load.

    Example: `allele export preferences/taste-0003@12 --to out/adapter --namespace allele-demo`
    """
    source, name = parse_adapter(adapter, namespace, store)
    fact = asked(Index.load(source.catalogue), name)
    if fact.weights is None or fact.provenance is None:
        raise Failure(f"{name}@{fact.revision}: expected bytes and provenance in the catalogue, found neither")
    made = source.read_provenance(fact.provenance)
    spec, shape = _shape(made, fact.group)
    export_peft(source.read(fact.weights), to, shape=shape, scale=spec.scale, base_name=made.base.uri)
    print(f"{to}: {name.population}/{name.member}@{fact.revision} sha256:{fact.digest}")


def import_(
    member: Annotated[str, typer.Argument(help="population/member; a member that is not there yet is made.")],
    folder: Annotated[Path, typer.Argument(help="Folder with adapter_model.safetensors and adapter_config.json.")],
    group: Annotated[
        str | None, typer.Option(help="Group of the population; absent: the member's own, or the only one.")
    ] = None,
    fold_scale: Annotated[
        bool, typer.Option("--fold-scale", help="Multiply B where the folder's scale is not the group's.")
    ] = False,
    cast: Annotated[bool, typer.Option("--cast", help="Round values that the population's dtype cannot hold.")] = False,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
) -> None:
    """Commit a LoRA folder of PEFT, TRL, vLLM or SGLang as the next revision of a member, without a parent.

    Its base must be the population's: of that, only the sizes can be checked. Ranks below the group's are padded with
    zeros. A population gets its groups' ranks and scales from its first run, so that one comes before the first import.
    A run that trains the member is not asked and goes on from its own revisions; one that starts later with startFrom
    Newest begins here. The revision is served by its number at once, and under the member's name once it is exposed.

    Example: `allele import preferences/taste-0003 out/checkpoint-70 --namespace allele-demo`
    """
    source, name = parse_adapter(member, namespace, store)
    if name.revision is not None:
        raise Failure(f"{member}: expected population/member, found a revision; an import makes the next one")
    place = _place(source, name, group)
    found = import_peft(folder, place.shape, scale=place.spec.scale, fold=fold_scale, cast=cast)
    fact = _commit(place, found, folder)
    print(f"{name.population}/{name.member}@{fact.revision} sha256:{fact.digest}")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an import goes."""

    store: PopulationStore
    index: Index
    name: AdapterName
    uid: str
    group: str
    made: Provenance
    """Of a revision of the group."""
    spec: ShapeRef
    shape: AdapterShape


def _shape(made: Provenance, group: str) -> tuple[ShapeRef, AdapterShape]:
    """Of the group's adapters, over the base that the provenance names."""
    spec = made.shapes[group]
    config = json.loads(Objects.open(made.base.uri).get("config.json"))
    return spec, AdapterShape.from_model(config, rank=spec.stored_rank, targets=spec.targets)


def _group(record: PopulationRecord, index: Index, name: AdapterName, asked: str | None) -> str:
    """The group of the import. Raises Failure unless it is one, and the member's own if it has one."""
    newest = index.newest(name.member)
    own = newest.group if newest is not None else None
    if own is not None and asked not in (None, own):
        raise Failure(f"--group: {name.population}/{name.member} is of group {own!r}, found {asked!r}")
    chosen = own or asked or (next(iter(record.shapes)) if len(record.shapes) == 1 else None)
    if chosen not in record.shapes:
        raise Failure(f"--group: expected one of {', '.join(sorted(record.shapes))}, found {chosen or 'none'}")
    return chosen


def _place(store: PopulationStore, name: AdapterName, asked: str | None) -> _Place:
    """What an adapter of the group is, from a revision of the member or of another one. Raises Failure without any."""
    record = store.record()
    if record is None:
        where = store.objects.url("population.json")
        raise Failure(f"{where}: expected the population's record, found none; its first run writes it")
    index = Index.load(store.catalogue)
    group = _group(record, index, name, asked)
    facts = (index.newest(m) for m in itertools.chain([name.member], index.members()))
    sha = next((f.provenance for f in facts if f is not None and f.group == group and f.provenance is not None), None)
    where = f"{name.population}, group {group}"
    if sha is None:
        raise Failure(
            f"{where}: expected a revision to take rank and scale from, found none; the first run makes one of each "
            "member"
        )
    made = store.read_provenance(sha)
    spec, shape = _shape(made, group)
    if spec.base_mode != "Untouched":
        raise Failure(
            f"{where}: expected baseMode Untouched, found {spec.base_mode}: its adapters go with factors of the base, "
            "which a folder has not; import into a group with init Standard"
        )
    if (made.base.digest, shape.digest) != (record.base_digest, record.shapes[group]):
        raise Failure(
            f"{where}: expected base {record.base_digest} and shape {record.shapes[group]}, found {made.base.digest} "
            f"and {shape.digest} in the provenance {sha}"
        )
    return _Place(store, index, name, record.uid, group, made, spec, shape)


def _commit(place: _Place, found: Imported, folder: Path) -> Fact:
    """Bytes, then provenance, then the commit. Raises FencedError when another import has begun meanwhile."""
    member = place.name.member
    weights = place.store.write_segments({member: place.shape.pack(found.row)})[member]
    with found.weights.open("rb") as file:
        source = ImportRef(folder=str(folder), sha256=hashlib.file_digest(file, "sha256").hexdigest())
    writer = place.store.catalogue.start(RUN)
    step = 0 if writer.last_step is None else writer.last_step + 1
    provenance = Provenance(
        namespace=place.name.namespace,
        population=place.name.population,
        population_uid=place.uid,
        run=RUN,
        run_uid=RUN,
        fence=writer.fence,
        step=step,
        base=place.made.base,
        tokenizer_digest=place.made.tokenizer_digest,
        shapes={place.group: place.spec},
        environment="",
        reward="",
        data=DataRange(cursor=0, prompts=0),
        versions=Versions(allele=allele.__version__),
        optimizer=OptimizerSpec(),
        loss={},
        imported=source,
        time=datetime.now(UTC),
    )
    place.index.refresh()  # after the start: from here on, no other import can take the revision and commit
    fact = Fact.committed(
        member=member,
        revision=place.index.next_revision(member),
        weights=weights,
        group=place.group,
        provenance=place.store.write_provenance(provenance),
        shape=place.shape.digest,
        reason=f"imported from {folder}",
    )
    writer.commit(step, [fact])
    return fact
