"""Someone with boto3 and DuckDB, and without this project, finds every revision and proves its bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import boto3
import duckdb
import pytest
from botocore.config import Config

from allele.store import Fact, PopulationStore


def parquet_of_the_catalogue(url: str, copies: Path) -> list[str]:
    """Local paths of the parquet files of a catalogue that holds only additions."""
    if url.startswith("file://"):
        return [str(p) for p in Path(url.removeprefix("file://")).glob("team/users/catalogue/*.parquet")]
    s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    bucket, prefix = url.removeprefix("s3://").split("/", 1)
    listed = s3.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/team/users/catalogue/")["Contents"]
    keys = [o["Key"] for o in listed if o["Key"].endswith(".parquet")]
    for i, key in enumerate(keys):
        s3.download_file(bucket, key, str(copies / f"{i}.parquet"))
    return [str(copies / f"{i}.parquet") for i in range(len(keys))]


def ranged(url: str, path: str, *, offset: int, length: int) -> bytes:
    if url.startswith("file://"):
        return (Path(url.removeprefix("file://")) / "team/users" / path).read_bytes()[offset : offset + length]
    s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    bucket, prefix = url.removeprefix("s3://").split("/", 1)
    span = f"bytes={offset}-{offset + length - 1}"
    return bytes(s3.get_object(Bucket=bucket, Key=f"{prefix}/team/users/{path}", Range=span)["Body"].read())


def test_every_recorded_range_hashes_to_its_digest(
    store_url: str,
    store: PopulationStore,
    tmp_path: Path,
    committed: Callable[..., Fact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    writer = store.catalogue.start("run-1")
    for step in range(1, 4):
        weights = store.write_segments({f"m{i}": os.urandom(3000) for i in range(8)})
        states = store.write_segments({f"m{i}": os.urandom(900) for i in range(8)}, kind="states")
        writer.commit(
            step,
            [
                Fact.committed(
                    member=m,
                    revision=step,
                    weights=weights[m],
                    state=states[m],
                    shape="s",
                    probe=(-0.5, -1.25),
                    metrics={"reward": 0.5},
                )
                for m in weights
            ],
        )

    files = parquet_of_the_catalogue(store_url, tmp_path)
    rows = duckdb.execute(
        'select member, revision, segment, "offset", length, digest, state_segment, state_offset, state_length, '
        "state_digest, probe, metrics['reward'], run, fence, step from read_parquet(?) where kind = 'Committed'",
        [files],
    ).fetchall()

    assert len({row[:2] for row in rows}) == len(rows) == 24
    for row in rows:
        assert hashlib.sha256(ranged(store_url, row[2], offset=row[3], length=row[4])).hexdigest() == row[5]
        assert hashlib.sha256(ranged(store_url, row[6], offset=row[7], length=row[8])).hexdigest() == row[9]
        assert row[10:] == ([-0.5, -1.25], 0.5, "run-1", writer.fence, row[1])
