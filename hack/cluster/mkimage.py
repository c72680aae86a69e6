#!/usr/bin/env python3
"""Pack an image archive without an engine (`ctr images import` reads it).

Two kinds suffice here, so there are only these two: one static program alone (`--program`), or a
whole root file system from a tar (`--rootfs`). Times and owners are fixed: the same input gives the
same image digest, so an archive made again does not look like a new image.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

CREATED = "2026-01-01T00:00:00Z"
PATH = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
NONROOT = 65532


def add_bytes(archive: tarfile.TarFile, name: str, data: bytes, *, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))


def program_layer(program: Path, layer: Path) -> None:
    """A layer with the program at /<its name> and what the Go runtime looks for: /etc/passwd, /tmp."""
    with tarfile.open(layer, "w") as archive:
        for name, mode in (("etc", 0o755), ("tmp", 0o1777)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            archive.addfile(entry)
        passwd = f"root:x:0:0::/:\nnonroot:x:{NONROOT}:{NONROOT}::/tmp:\n"
        add_bytes(archive, "etc/passwd", passwd.encode())
        add_bytes(archive, program.name, program.read_bytes(), mode=0o755)


def config_for(layer: Path, *, user: str, entrypoint: list[str], command: list[str]) -> bytes:
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": CREATED,
        "config": {"Env": [PATH], "Entrypoint": entrypoint, "Cmd": command, "User": user, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{"created": CREATED, "created_by": "mkimage"}],
    }
    return json.dumps(config, sort_keys=True).encode()


def write_archive(out: Path, *, ref: str, config: bytes, layer: Path) -> None:
    """The docker-archive format: a manifest, the config named by its digest, the layer's tar."""
    config_name = hashlib.sha256(config).hexdigest() + ".json"
    manifest = [{"Config": config_name, "RepoTags": [ref], "Layers": ["layer.tar"]}]
    unfinished = out.with_name(out.name + ".tmp")
    with tarfile.open(unfinished, "w") as archive:
        add_bytes(archive, config_name, config)
        add_bytes(archive, "manifest.json", json.dumps(manifest).encode())
        entry = tarfile.TarInfo("layer.tar")
        entry.size = layer.stat().st_size
        with layer.open("rb") as file:
            archive.addfile(entry, file)
    os.replace(unfinished, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", required=True, help="full image name, as in localhost/pause:local")
    parser.add_argument("--out", required=True, type=Path, help="archive to write")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--program", type=Path, help="static program; the image runs it as a non-root user")
    kind.add_argument(
        "--rootfs", type=Path, help="uncompressed tar of a root file system; the image runs python3 in it"
    )
    args = parser.parse_args()

    if args.rootfs:
        config = config_for(args.rootfs, user="", entrypoint=[], command=["python3"])
        write_archive(args.out, ref=args.ref, config=config, layer=args.rootfs)
        return
    layer = args.out.with_name(args.out.name + ".layer")
    program_layer(args.program, layer)
    config = config_for(layer, user=f"{NONROOT}:{NONROOT}", entrypoint=[f"/{args.program.name}"], command=[])
    write_archive(args.out, ref=args.ref, config=config, layer=layer)
    layer.unlink()


if __name__ == "__main__":
    main()
