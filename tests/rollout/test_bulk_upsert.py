"""One call publishes many adapters from a mapped file: the same slots and bits as the engine's own way, or nothing."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load, save

from allele.format import AdapterShape, adapter_config, export_peft
from tests.rollout.rollout_engine import EngineProcess
from tests.rollout.rollout_parts import ALPHA, BASE, SHAPE, TARGETS, Answer, call, random_adapter

PROMPT = (13, 4, 6, 3, 5, 2)
PAGE = 4096


def config(shape: AdapterShape, alpha: float = ALPHA) -> dict[str, Any]:
    return adapter_config(shape, scale=alpha / shape.rank, base_name="tiny")


def written(path: Path, adapters: Mapping[str, bytes]) -> dict[str, int]:
    """A file of packed adapters; name → offset."""
    offsets, at = {}, 0
    with path.open("wb") as f:
        for name, packed in adapters.items():
            offsets[name] = at
            f.seek(at)
            f.write(packed)
            at += -(-len(packed) // PAGE) * PAGE
    return offsets


class Upserter:
    """A client of one engine's bulk route that leaves nothing behind."""

    def __init__(self, engine: EngineProcess) -> None:
        self.url = engine.url
        self.names: set[str] = set()

    def __call__(self, files: Sequence[Mapping[str, Any]] = (), remove: Sequence[str] = ()) -> Answer:
        answer = call(f"{self.url}/allele/upsert", {"files": list(files), "remove": list(remove)})
        if answer.status == 200:
            self.names |= {name for f in files for name in f["rows"]}
            self.names -= set(remove)
        return answer

    def greedy(self, names: Sequence[str | None], *, tokens: int = 8) -> list[tuple[list[int], list[float]]]:
        body = {
            "input_ids": [list(PROMPT)] * len(names),
            "lora_path": list(names),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = call(f"{self.url}/generate", body)
        assert answer.status == 200, answer.body
        return [(a["output_ids"], [p for p, *_ in logprobs(a)]) for a in answer.json]


def logprobs(answer: Mapping[str, Any]) -> list[Any]:
    meta = answer["meta_info"]
    return meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]


@pytest.fixture
def upsert(engine: EngineProcess) -> Iterator[Upserter]:
    upserter = Upserter(engine)
    yield upserter
    assert upserter(remove=sorted(upserter.names)).status == 200


def peft_order(packed: bytes, shape: AdapterShape) -> bytes:
    """The same weights in the order in which PEFT writes them, where fused projections are no single stretch."""
    return save(dict(sorted(load(packed).items())))


def natively(url: str, name: str, packed: bytes, folder: Path, shape: AdapterShape, alpha: float) -> None:
    export_peft(packed, folder, shape=shape, scale=alpha / shape.rank, base_name="tiny")
    answer = call(f"{url}/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
    assert answer.status == 200, answer.body


def test_rows_of_any_layout_serve_the_same_bits_as_the_engines_own_loading(
    upsert: Upserter, engine: EngineProcess, tmp_path: Path
) -> None:
    model = json.loads((BASE / "config.json").read_text())
    small = AdapterShape.from_model(model, rank=4, targets=TARGETS)
    few = AdapterShape.from_model(model, rank=8, targets=("q_proj", "v_proj"))
    half = AdapterShape.from_model(model, rank=8, targets=TARGETS, dtype="BF16")

    def random(shape: AdapterShape, seed: int) -> bytes:
        values = np.random.default_rng(seed).standard_normal(shape.numel).astype("<f4") * 0.15
        return shape.pack(values if shape.dtype == "F32" else (values.view("<u4") >> 16).astype("<u2"))

    cases = {
        "ours": (SHAPE, random(SHAPE, 1), ALPHA),
        "other-alpha": (SHAPE, random(SHAPE, 2), 3.0),
        "rank-4": (small, random(small, 3), ALPHA),
        "q-and-v": (few, random(few, 4), ALPHA),
        "bf16": (half, random(half, 5), ALPHA),
    }
    files = []
    for name, (shape, packed, alpha) in cases.items():
        rows = {f"{name}/bulk": packed, f"{name}/peft-order": peft_order(packed, shape)}
        path = tmp_path / f"{name}.seg"
        files.append({"path": str(path), "config": config(shape, alpha), "rows": written(path, rows)})
        natively(engine.url, f"{name}/native", packed, tmp_path / name, shape, alpha)
    answer = upsert(files)
    assert answer.json == {"loaded": 10, "removed": 0}, answer.body
    for path in tmp_path.glob("*.seg"):
        path.unlink()  # what is mapped stays readable
    batches = (("ours", "rank-4", "bf16"), ("q-and-v", "other-alpha"), ("bf16", "q-and-v", "ours"))
    for _ in range(2):  # the second time over slots that others used
        for batch in batches:  # the same batch each time: its composition shows in the last bits
            truth = upsert.greedy([*(f"{name}/native" for name in batch), None])
            assert len({str(t) for t in truth}) == len(truth)
            for way in ("bulk", "peft-order"):
                assert upsert.greedy([*(f"{name}/{way}" for name in batch), None]) == truth, (batch, way)
    for name in cases:
        assert call(f"{engine.url}/unload_lora_adapter", {"lora_name": f"{name}/native"}).status == 200


def test_a_call_that_is_refused_changes_nothing(upsert: Upserter, tmp_path: Path) -> None:
    path, cut = tmp_path / "a.seg", tmp_path / "cut.seg"
    offsets = written(path, {"a": random_adapter(1), "b": random_adapter(2)})
    cut.write_bytes(path.read_bytes()[:-100])
    large = AdapterShape.from_model(json.loads((BASE / "config.json").read_text()), rank=16, targets=TARGETS)
    good = {"path": str(path), "config": config(SHAPE), "rows": {"x": offsets["b"]}}
    assert upsert([{**good, "rows": {"a": offsets["a"]}}]).status == 200
    before = upsert.greedy(["a"])
    refused = {
        "no such file": ({**good, "path": str(tmp_path / "none")}, "No such file"),
        "no adapter there": ({**good, "rows": {"x": 12345}}, "offset 12345: expected a packed adapter"),
        "negative": ({**good, "rows": {"x": -4096}}, "expected a packed adapter"),
        "past the end": ({**good, "rows": {"x": 1 << 40}}, "expected a packed adapter"),
        "truncated": ({**good, "path": str(cut), "rows": {"x": offsets["b"]}}, "the file ends"),
        "wrong type": ({**good, "rows": {"x": "0"}}, "Expected `int`"),
        "unknown field": ({**good, "row": 1}, "unknown field"),
        "rank too high": ({**good, "config": config(large), "rows": {"x": 0}}, "rank"),
    }
    for what, (file, reason) in refused.items():
        answer = upsert([{**good, "rows": {"fresh": 0}}, file], remove=["a"])
        assert answer.status == 400 and reason in answer.json["error"], (what, answer.body)
    answer = upsert([good, good])
    assert answer.status == 400 and "each name once" in answer.json["error"]
    assert upsert.greedy(["a"]) == before
    body = {"input_ids": list(PROMPT), "lora_path": "fresh", "sampling_params": {"max_new_tokens": 1}}
    assert call(f"{upsert.url}/generate", body).status == 400


def test_removed_weights_are_gone_when_the_answer_comes_and_running_requests_keep_theirs(
    upsert: Upserter, engine: EngineProcess, tmp_path: Path
) -> None:
    path = tmp_path / "a.seg"
    adapters = {f"m{i}": random_adapter(40 + i) for i in range(6)}
    offsets = written(path, adapters)
    file = {"path": str(path), "config": config(SHAPE)}
    assert upsert([{**file, "rows": {"m0": offsets["m0"]}}]).status == 200
    many: list[str | None] = ["m0"] * 24
    truth = upsert.greedy(many, tokens=50)
    found: list[tuple[list[int], list[float]]] = []
    asking = threading.Thread(target=lambda: found.extend(upsert.greedy(many, tokens=50)))
    asking.start()
    engine.until_running(bool)
    assert upsert(remove=["m0"]).json == {"loaded": 0, "removed": 1}
    assert not engine.running(), "the answer came while a request still used the weights"
    # The bytes are the caller's again: writing over them must not reach anyone.
    with path.open("r+b") as f:
        f.write(b"\xff" * len(adapters["m0"]))
    asking.join(60)
    assert found == truth
    assert upsert([{**file, "rows": {f"m{i}": offsets[f"m{i}"] for i in range(1, 6)}}]).status == 200


def test_a_name_that_is_loaded_moves_to_the_new_weights(upsert: Upserter, tmp_path: Path) -> None:
    path = tmp_path / "a.seg"
    offsets = written(path, {"old": random_adapter(1), "new": random_adapter(2)})
    file = {"path": str(path), "config": config(SHAPE)}
    upsert([{**file, "rows": {"m": offsets["old"], "fresh": offsets["new"]}}])
    (old,), (fresh,) = upsert.greedy(["m"]), upsert.greedy(["fresh"])
    assert old != fresh
    assert upsert([{**file, "rows": {"m": offsets["new"]}}]).json == {"loaded": 1, "removed": 0}
    assert upsert.greedy(["m"]) == [fresh]


def test_a_changed_engine_turns_bulk_off_and_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    # Loaded by Python at start: the digests then do not fit, as after an upgrade.
    (folder / "sitecustomize.py").write_text(
        "from allele_rollout.engine.bulk import seen\n"
        "seen.SEEN = {**seen.SEEN, seen.POOL + 'remove_lora': '0' * 16, seen.POOL + 'no_such': '0' * 16}\n"
    )
    engine = EngineProcess(tmp_path / "log", python_path=[str(folder)])
    try:
        engine.start()
        engine.wait()
        answer = call(f"{engine.url}/allele/upsert", {})
        assert answer.status == 501
        assert "remove_lora" in answer.json["error"] and "no_such" in answer.json["error"]
        natively(engine.url, "a", random_adapter(1), tmp_path / "a", SHAPE, ALPHA)
        assert len(Upserter(engine).greedy(["a"])) == 1
    finally:
        engine.kill()
    assert os.path.exists(tmp_path / "log") and "bulk upsert is off" in (tmp_path / "log").read_text()
