"""What a user gets wrong ends in one line that names it, without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLE = Path(__file__).parent.parent.parent / "examples/preferences"


def allele(*args: str | Path) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"ALLELE_STORE": "", "COLUMNS": "200"}
    del environ["ALLELE_STORE"]
    command = [sys.executable, "-m", "allele_cli", *map(str, args)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=120)


def changed(tmp_path: Path, name: str, **spec: object) -> Path:
    """An example file with fields of its spec replaced."""
    obj = yaml.safe_load((EXAMPLE / name).read_text())
    obj["spec"] |= spec
    path = tmp_path / name
    path.write_text(yaml.safe_dump(obj))
    return path


def refused(*args: str | Path, words: tuple[str, ...]) -> None:
    done = allele(*args)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(w in done.stderr for w in words), done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stop": {"steps": 0}}, ("RLRun/preferences", "spec.stop.steps", "found 0")),
        ({"populationRef": "others"}, ("populationRef", "'preferences'", "'others'")),
        ({"groups": "all"}, ("spec.groups", "found 'all'")),
    ],
)
def test_invalid_run_names_the_field(tmp_path: Path, change: dict[str, object], words: tuple[str, ...]) -> None:
    run = changed(tmp_path, "05-run.yaml", **change)
    refused("run", EXAMPLE / "04-population.yaml", run, "--base", EXAMPLE / "base", words=words)


def test_missing_object_is_named(tmp_path: Path) -> None:
    refused("run", EXAMPLE / "04-population.yaml", "--base", EXAMPLE / "base", words=("RLRun", "AdapterPopulation"))


def test_another_base_than_the_populations_is_refused_with_both_digests(tmp_path: Path) -> None:
    other = "sha256:" + "0" * 64
    population = changed(tmp_path, "04-population.yaml", base={"digest": other})
    words = ("expected " + other, "found sha256:21d4afa4")
    run = ("run", population, EXAMPLE / "05-run.yaml", "--base", EXAMPLE / "base", "--out", tmp_path / "out")
    refused(*run, words=words)


def test_damaged_base_is_refused_when_fetched(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/store/bases/tiny"
    put = allele("base", "put", EXAMPLE / "base", "--to", uri)
    assert put.returncode == 0, put.stderr
    stored = tmp_path / "store/bases/tiny/model.safetensors"
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    fetch = ("base", "fetch", "--uri", uri, "--digest", put.stdout.strip(), "--to", tmp_path / "base")
    refused(*fetch, words=("model.safetensors", "expected", "found"))


def test_unknown_population_and_member_are_named(tmp_path: Path) -> None:
    store = f"file://{tmp_path}"
    refused("lineage", "nobody/member", "--store", store, words=("nobody",))
    refused("lineage", "no slash", "--store", store, words=("population/member", "no slash"))


@pytest.mark.parametrize(
    "command", ["run", "watch", "members", "lineage", "export", "import", "eval", "plot", "base put", "base residual"]
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = allele(*command.split(), "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout
