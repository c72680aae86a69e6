"""Rendered pods as local processes: the operator's own manifests, with addresses replaced and nothing else.

An address is a mounted path, a host with a port, a port of our own, or the Python interpreter. Everything that
configures a role is in its arguments and environment, so a run that works here works there.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from allele_cli.failure import Failure
from allele_cli.local.processes import Spec

Obj = Mapping[str, Any]

INHERITED = ("PATH", "LANG", "LD_LIBRARY_PATH")
"""Variables that a container gets from its image."""


@dataclasses.dataclass(frozen=True)
class Addresses:
    """What replaces what. `paths` by prefix, `hosts` anywhere in a text, `words` only as a whole argument."""

    paths: Mapping[str, str]
    hosts: Mapping[str, str]
    words: Mapping[str, str]

    def replace(self, text: str) -> str:
        if text in self.words:
            return self.words[text]
        for old in sorted(self.hosts, key=len, reverse=True):
            text = text.replace(old, self.hosts[old])
        if not self.paths:
            return text
        longest_first = sorted(self.paths, key=len, reverse=True)
        pattern = rf"(?<![\w./-])({'|'.join(map(re.escape, longest_first))})(?=$|[/:,])"
        return re.sub(pattern, lambda m: self.paths[m.group(1)], text)


@dataclasses.dataclass(frozen=True)
class LocalPod:
    inits: tuple[Spec, ...]
    containers: tuple[Spec, ...]


def localise(
    pod: Obj, *, name: str, root: Path, addresses: Addresses, given: Mapping[str, Path], restarts: int
) -> LocalPod:
    """Processes of one pod spec.

    `given` names the folders that stand for volumes with content (ConfigMaps, tokens); every other volume becomes an
    empty folder below `root`. Secrets are taken from our own environment, under the same names.
    """
    volumes = {v["name"]: given.get(v["name"], root / v["name"]) for v in pod.get("volumes", ())}
    for folder in volumes.values():
        folder.mkdir(parents=True, exist_ok=True)

    def spec(container: Obj) -> Spec:
        mounts = {m["mountPath"]: str(volumes[m["name"]]) for m in container.get("volumeMounts", ())}
        local = dataclasses.replace(addresses, paths={**addresses.paths, **mounts})
        argv = [*container.get("command", ()), *container.get("args", ())]
        env = {k: os.environ[k] for k in INHERITED if k in os.environ}
        env |= {k: local.replace(v) for k, v in _environment(container, name)}
        return Spec(
            name=f"{name}-{container['name']}" if container["name"] not in name else name,
            argv=tuple(local.replace(a) for a in argv),
            env=env,
            restarts=restarts,
        )

    return LocalPod(
        inits=tuple(spec(c) for c in pod.get("initContainers", ())),
        containers=tuple(spec(c) for c in pod["containers"]),
    )


def _environment(container: Obj, pod: str) -> Iterator[tuple[str, str]]:
    for entry in container.get("env", ()):
        source = entry.get("valueFrom", {})
        if "value" in entry or not source:
            yield entry["name"], entry.get("value", "")
        elif "fieldRef" in source:
            yield entry["name"], {"metadata.name": pod}.get(source["fieldRef"]["fieldPath"], "")
        elif "secretKeyRef" in source:
            if entry["name"] in os.environ:
                yield entry["name"], os.environ[entry["name"]]
        else:
            raise Failure(f"{pod}: variable {entry['name']}: expected a value, a field or a secret, found {source}")


def interpreter() -> dict[str, str]:
    """`python3` and `allele` of an image, here."""
    scripts = Path(sys.executable).parent
    return {"python3": sys.executable, "allele": str(scripts / "allele")}


def write_files(folder: Path, files: Iterable[tuple[str, str]]) -> Path:
    """What kubelet does with a ConfigMap volume."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files:
        (folder / name).write_text(text)
    return folder
