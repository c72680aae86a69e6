"""Where things are: a base by its URI, a population's store by flag or through the cluster with the user's own
kubeconfig."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from allele.api.store import AdapterStoreSpec
from allele.protocol.adapters import AdapterName, parse_model
from allele.store.address import FORMS
from allele.store.facts import Fact
from allele.store.index import Index
from allele.store.objects import Objects
from allele.store.population import PopulationStore
from allele_cli.failure import Failure
from allele_operator.planning.render.access import StoreAccess

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="ALLELE_STORE",
        help=f"{FORMS}; absent: the AdapterStore of the population in the cluster.",
    ),
]
Adapter = Annotated[str, typer.Argument(help="population/member or population/member@revision.")]
PopulationArgument = Annotated[str, typer.Argument(help="Name of the population.")]
NamespaceOption = Annotated[str, typer.Option("--namespace", "-n", envvar="ALLELE_NAMESPACE", help="Namespace.")]


def open_population(population: str, *, namespace: str, store: str | None) -> PopulationStore:
    """Raises Failure when neither flag nor cluster says where the store is."""
    if store is None:
        store = _store_of(population, namespace)
    return PopulationStore.open(store, namespace=namespace, population=population)


def split_uri(uri: str) -> tuple[Objects, str]:
    """`<store>/bases/<name>` → the store and the name. Raises Failure for another form."""
    store, found, name = uri.rpartition("/bases/")
    if not found or not name or "/" in name:
        raise Failure(f"base uri: expected <store>/bases/<name>, found {uri!r}")
    return Objects.open(store), name


def parse_adapter(adapter: str, namespace: str, store: str | None) -> tuple[PopulationStore, AdapterName]:
    """`population/member[@revision]` → the population and the name."""
    name = parse_model(adapter, namespace)
    return open_population(name.population, namespace=name.namespace, store=store), name


def asked(index: Index, name: AdapterName) -> Fact:
    """The Committed fact of the named revision, or of the newest. Raises Failure where there is none."""
    if name.member not in index:
        raise unknown(name)
    fact = index.newest(name.member) if name.revision is None else index.get(name.member, name.revision)
    if fact is None:
        raise Failure(f"{name}: no such committed revision; the newest is {index.next_revision(name.member) - 1}")
    return fact


def unknown(name: AdapterName) -> Failure:
    return Failure(
        f"{name.population}: expected a member of its catalogue, found {name.member!r}; see `allele members`"
    )


def stores_of(namespace: str, store: str | None) -> list[tuple[str, Mapping[str, str]]]:
    """URL and environment of the given store, else of every AdapterStore of the namespace."""
    if store is not None:
        return [(store, os.environ)]
    return [_reach(AdapterStoreSpec.model_validate(o["spec"]), namespace) for o in listed("adapterstore", namespace)]


def _store_of(population: str, namespace: str) -> str:
    """URL of the population's store; its credentials are put into this process's environment."""
    ref = get("adapterpopulation", population, namespace)["spec"]["storeRef"]
    spec = AdapterStoreSpec.model_validate(get("adapterstore", ref, namespace)["spec"])
    url, environ = _reach(spec, namespace)
    os.environ.update(environ)
    return url


def _reach(spec: AdapterStoreSpec, namespace: str) -> tuple[str, dict[str, str]]:
    """URL of a store, and the environment that opens it: what its pods have. Raises Failure for a missing key."""
    access, environ, secret = StoreAccess.of(spec), dict(os.environ), spec.credentials.secret_name
    data = get("secret", secret, namespace).get("data", {}) if secret else {}
    for variable in access.env:
        name = variable["name"]
        if "value" in variable:
            environ[name] = variable["value"]
        elif name in data:
            environ[name] = base64.b64decode(data[name]).decode()
        else:
            raise Failure(f"secret {namespace}/{secret}: expected the key {name}, found {', '.join(data) or 'none'}")
    return access.url, environ


def get(kind: str, name: str, namespace: str) -> dict[str, Any]:
    """One object through kubectl, which knows every way to log in. Raises Failure with kubectl's words."""
    return _kubectl(f"{kind} {namespace}/{name}", kind, name, "--namespace", namespace)


def listed(kind: str, namespace: str) -> list[dict[str, Any]]:
    """All objects of a kind in a namespace, as `get`."""
    items: list[dict[str, Any]] = _kubectl(f"{kind} in {namespace}", kind, "--namespace", namespace)["items"]
    return items


def _kubectl(what: str, *words: str) -> dict[str, Any]:
    command = ["kubectl", "get", *words, "--output", "json"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as e:
        raise Failure("--store: not given, and no kubectl to look it up in the cluster") from e
    if answer.returncode:
        raise Failure(f"{what}: {answer.stderr.strip()}; give --store to read a store directly")
    found: dict[str, Any] = json.loads(answer.stdout)
    return found
