"""The disk tier against a real folder: bounded, right, and whole after a crash at any write."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from allele_rollout.gateway.disk import DiskTier


def data(i: int) -> bytes:
    return f"bytes of {i} ".encode() * 10


def digest(i: int) -> str:
    return hashlib.sha256(data(i)).hexdigest()


def test_damaged_bytes_are_not_handed_out_and_not_kept(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, capacity=1 << 20)
    tier.keep(digest(0), data(0))
    assert tier.get(digest(0)) == data(0)
    (tmp_path / digest(0)).write_bytes(b"something else")
    assert tier.get(digest(0)) is None
    assert len(tier) == 0 and not list(tmp_path.iterdir())
    tier.keep(digest(0), data(0))
    (tmp_path / digest(0)).unlink()
    assert tier.get(digest(0)) is None and tier.get(digest(1)) is None


def test_it_stays_within_its_bytes_and_finds_what_it_had(tmp_path: Path) -> None:
    size = len(data(0))
    tier = DiskTier(tmp_path, capacity=3 * size)
    for i in range(6):
        tier.keep(digest(i), data(i))
        assert len(list(tmp_path.iterdir())) == len(tier) <= 3 and tier.size <= 3 * size
    tier.keep("large", b"x" * 4 * size)
    assert "large" not in os.listdir(tmp_path)
    again = DiskTier(tmp_path, capacity=3 * size)
    assert len(again) == 3 and sum(again.get(digest(i)) == data(i) for i in range(6)) == 3
    smaller = DiskTier(tmp_path, capacity=size)
    assert len(smaller) == len(list(tmp_path.iterdir())) == 1
    assert len(DiskTier(tmp_path / "none", capacity=0)) == 0


WRITER = """
import builtins, io, os, sys
from pathlib import Path
from allele_rollout.gateway.disk import DiskTier
from tests.rollout.test_disk_tier import data, digest

left = int(sys.argv[2])
def dying(call):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*args, **kwargs)
    return wrapper

def half(path, content):
    with open(path, "wb", buffering=0) as f:
        dying(f.write)(content[: len(content) // 2])
        dying(f.write)(content[len(content) // 2 :])

root = Path(sys.argv[1])
Path.write_bytes = half
os.replace, Path.unlink, Path.mkdir = dying(os.replace), dying(Path.unlink), dying(Path.mkdir)
tier = DiskTier(root, capacity=3 * len(data(0)))
for i in range(5):
    tier.keep(digest(i), data(i))
    tier.get(digest(i - 1))
"""


def test_a_process_killed_at_any_write_leaves_a_folder_that_serves_only_right_bytes(tmp_path: Path) -> None:
    writes, died = 0, True
    while died:
        folder = tmp_path / str(writes)
        done = subprocess.run(
            [sys.executable, "-c", WRITER, str(folder), str(writes)], check=False, capture_output=True
        )
        died = done.returncode == 9
        assert died or done.returncode == 0, done.stderr.decode()
        tier = DiskTier(folder, capacity=3 * len(data(0)))
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        for i in range(6):
            assert tier.get(digest(i)) in (None, data(i))
        tier.keep(digest(5), data(5))
        assert tier.get(digest(5)) == data(5)
        assert len(list(folder.iterdir())) == len(tier) <= 3
        writes += 1
    assert writes > 20, "the writer was to be killed at each of its writes"
