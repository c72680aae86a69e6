"""`allele base residual` makes a base that trainer and rollouts load like any other, and says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from allele.protocol.errors import InvalidRequest
from allele.protocol.initialisation import RESIDUAL, Residual
from allele.store import BaseMismatch, Objects, bases
from allele_cli.main import app

BASE = Path(__file__).parents[2] / "examples/preferences/base"
RUNNER = CliRunner()


def made(store: Path, name: str, *words: str, base: Path = BASE) -> str:
    """The digest that the command printed."""
    command = ["base", "residual", str(base), "--to", f"file://{store}/bases/{name}", *words]
    done = RUNNER.invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.strip().splitlines()[-1]


def test_the_printed_digest_is_that_of_a_whole_base_with_what_was_taken_out(tmp_path: Path) -> None:
    digest = made(tmp_path, "p", "--kind", "PiSSA", "--rank", "4", "--alpha", "2", "--targets", "v_proj,down_proj")
    folder = tmp_path / "fetched"
    bases.fetch(Objects.open(f"file://{tmp_path}"), "p", folder, digest=digest)
    told = Residual.model_validate_json((folder / RESIDUAL).read_bytes())
    assert told.source_digest == bases.digest(BASE) != digest
    assert (told.kind, told.rank, told.alpha, told.targets) == ("PiSSA", 4, 2, ("v_proj", "down_proj"))
    before, after = load_file(BASE / "model.safetensors"), load_file(folder / "model.safetensors")
    taken = load_file(folder / "residual/adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        module = "base_model.model." + name.removesuffix(".weight")
        if any(t in name for t in told.targets):
            b, a = (taken[f"{module}.lora_{half}.weight"] for half in "BA")
            torch.testing.assert_close(after[name], weight - 0.5 * b @ a, rtol=0, atol=1e-6)
            assert torch.linalg.matrix_rank(weight - after[name], atol=1e-5) == 4
        else:
            assert torch.equal(after[name], weight)
    assert (folder / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
    config = json.loads((folder / "residual/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"] / config["r"]) == (4, 0.5)


def test_made_again_it_is_the_same_and_another_one_needs_another_name(tmp_path: Path) -> None:
    first = made(tmp_path, "m", "--kind", "MiLoRA")
    assert made(tmp_path, "m", "--kind", "MiLoRA") == first
    with pytest.raises(BaseMismatch, match="a base is never replaced: choose another name"):
        made(tmp_path, "m", "--kind", "OLoRATail")
    assert made(tmp_path, "t", "--kind", "OLoRATail") != first


def test_in_bfloat16_files_and_config_say_so(tmp_path: Path) -> None:
    made(tmp_path, "b", "--kind", "PiSSA", "--dtype", "bfloat16")
    folder = tmp_path / "bases/b"
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidRequest, match=r"q_proj: rank: expected at most 64 for a weight of \(64, 64\), found 128"
    ):
        made(tmp_path, "x", "--kind", "PiSSA", "--rank", "128")
    with pytest.raises(InvalidRequest, match=r"targets: expected some of q_proj.*found"):
        made(tmp_path, "x", "--kind", "PiSSA", "--targets", "w_proj")
    made(tmp_path, "x", "--kind", "PiSSA")
    with pytest.raises(InvalidRequest, match="expected a base, found a residual base"):
        made(tmp_path, "y", "--kind", "PiSSA", base=tmp_path / "bases/x")
