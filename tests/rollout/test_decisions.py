"""Verdicts, OpenAI bodies, engine flags and configuration: decisions without I/O."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from allele.protocol.errors import NotFound, Overloaded
from allele.protocol.serving import Gate, Target
from allele.store.facts import Fact
from allele_rollout.engine.launch import CPU_PATH, EngineSettings, command, environment
from allele_rollout.gateway.bodies import TextRequest
from allele_rollout.gateway.exposure import candidates
from allele_rollout.gateway.generate import completions
from allele_rollout.gateway.openai import BadRequest, engine_body, engine_refusal, error_body, model_page, parse_body
from allele_rollout.gateway.sampler import Row
from allele_rollout.gateway.settings import GatewaySettings
from allele_rollout.gateway.verdict import judge

TARGET = Target(member="a", revision=2)
SETTINGS = EngineSettings(
    base="/base", port=1, slots=5, max_rank=8, targets=("q_proj", "v_proj"), extra=("--dtype", "x")
)


@pytest.mark.parametrize(
    ("served", "trained", "before", "verdict"),
    [
        ([-1.0, -2.0], [-1.00005, -2.0], [-1.5, -2.0], "Passed"),
        ([-1.0, -2.0], [-1.0, -2.001], [-1.5, -2.0], "Gap"),
        ([-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.000001], "NotMoved"),
        ([-1.0, -2.001], [-1.0, -2.0], [-1.0, -2.001], "Gap"),  # a gap is reported before a lack of movement
        ([-1.0, None], [-1.0, -2.0], [-1.5, -2.0], "Gap"),
        ([-1.0, math.nan], [-1.0, -2.0], [-1.5, -2.0], "Gap"),
        ([-1.0, -2.0], [-1.0, math.nan], [-1.5, -2.0], "Gap"),
        ([-1.0], [-1.0, -2.0], [-1.5, -2.0], "Gap"),
        ([], [], [], "Gap"),
        ([-1.0, -2.0], [-1.0, -2.0], [], "NotMoved"),
        ([-1.0, -2.0], [-1.0, -2.0], [math.nan, -2.0], "NotMoved"),
    ],
)
def test_verdicts(served: list[float | None], trained: list[float], before: list[float | None], verdict: str) -> None:
    assert judge(TARGET, served=served, trained=trained, before=before, gate=Gate()).verdict == verdict


def test_a_body_loses_what_reaches_other_adapters_and_keeps_the_rest() -> None:
    sent = b'{"model": "p/m", "prompt": "x", "lora_path": "x", "rid": "r", "vote": null, "n": null, "min_p": 0, "x": 3}'
    body, asked = parse_body(sent, TextRequest)
    kept = {"model": "p/m", "prompt": "x", "min_p": 0, "x": 3}
    assert engine_body(body, "n/p/m@1") == {**kept, "lora_path": "n/p/m@1"}
    assert engine_body(body, None) == kept and asked.n is None
    assert error_body(NotFound("x"))["error"]["code"] == "model_not_found"
    assert error_body(Overloaded("x"))["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        (b"[]", None),
        (b"{", None),
        (b"[" * 100_000, None),
        (b'{"model": "p/m", "prompt": "x", "top_p": NaN}', None),
        (b'{"model": 3, "prompt": "x"}', "model"),
        (b'{"model": "p/m"}', "prompt"),
        (b'{"model": "p/m", "prompt": [[3], []]}', "prompt"),
        (b'{"model": "p/m", "prompt": ["x", "y"], "n": 128, "stop": [1]}', "stop"),
        (b'{"model": "p/m", "prompt": ' + json.dumps(["x"] * 9).encode() + b', "n": 128}', "n"),
    ],
)
def test_a_wrong_body_is_refused_with_the_field_that_is_wrong(sent: bytes, param: str | None) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_body(sent, TextRequest)
    assert refused.value.param == param and len(str(refused.value)) < 500


def test_what_the_engine_refuses_names_the_field_and_no_path_of_its_host() -> None:
    long = (
        "2 validation errors:\n  {'type': 'value_error', 'loc': ('body', 'messages', 0, 'after[role(), Any]', 'role'), "
        "'msg': \"Value error, 'role' must be one of 'system'\", 'input': 3}\n\n  File \"/srv/x.py\", line 1"
    )
    refused = engine_refusal(long)
    assert refused.param == "messages" and str(refused) == "messages: 'role' must be one of 'system'"
    cut = engine_refusal(long[:100])
    assert cut.param == "messages" and "File" not in str(cut)
    assert str(engine_refusal("prompt too long")) == "engine: prompt too long"


def test_pages_of_models_hold_every_name_once() -> None:
    names, seen, after = [f"p/m{i}" for i in range(7)], list[str](), None
    while True:
        page = model_page(names, after=after, limit=3, owner="n")
        seen += [m["id"] for m in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert seen == names


def test_a_bare_name_tries_the_exposed_revision_then_the_one_before_and_a_hold_stands_alone() -> None:
    fact = Fact(kind="Committed", member="a", revision=3)
    assert candidates(fact, None, (3, 2, 1)) == [3, 2]
    held = Fact(kind="Held", member="a", revision=1)
    assert candidates(Fact(kind="Committed", member="a", revision=1), held, (3, 2, 1)) == [1]
    assert candidates(None, None, ()) == []


def test_a_sample_without_finite_logprobs_is_an_error() -> None:
    def answer(logprobs: list[float | None], kind: str = "stop") -> dict[str, object]:
        entries = [[p, 7, None] for p in logprobs]
        reason = {"type": kind, "message": "why"}
        return {"output_ids": [7, 7], "meta_info": {"finish_reason": reason, "output_token_logprobs": entries}}

    answers = [answer([-1, -2]), answer([-1, math.nan]), answer([None, -1]), answer([-1]), answer([-1, -2], "abort")]
    good, nan, none, short, aborted = completions([Row(None, (7,))] * 5, answers, n=1)["error"]
    assert good is None
    assert all("expected 2 finite logprobs" in str(e) for e in (nan, none, short))
    assert "why" in str(aborted)


def test_the_stand_in_kernel_is_importable_only_without_an_accelerator() -> None:
    assert (CPU_PATH / "sgl_kernel/__init__.py").exists()
    before = {"PYTHONPATH": f"/x{os.pathsep}{CPU_PATH}", "SGLANG_PLUGINS": "mine"}
    gpu, cpu = environment(before, accelerator=True), environment(before, accelerator=False)
    assert gpu["PYTHONPATH"] == "/x" and "SGLANG_USE_CPU_ENGINE" not in gpu
    assert cpu["PYTHONPATH"].split(os.pathsep) == ["/x", str(CPU_PATH)] and cpu["SGLANG_USE_CPU_ENGINE"] == "1"
    assert gpu["SGLANG_PLUGINS"] == "mine,allele_guard,allele_bulk"
    assert cpu["SGLANG_PLUGINS"] == "mine,allele_guard,allele_bulk,allele_cpu"
    assert "PYTHONPATH" not in environment({"PYTHONPATH": str(CPU_PATH)}, accelerator=True)


def test_cpu_flags_come_only_without_an_accelerator_and_the_callers_last() -> None:
    gpu = command(SETTINGS, python="python", accelerator=True)
    cpu = command(SETTINGS, python="python", accelerator=False)
    assert "--device" not in gpu and cpu[cpu.index("--device") + 1] == "cpu"
    assert gpu[-2:] == cpu[-2:] == ["--dtype", "x"]
    for words in (gpu, cpu):
        assert words[words.index("--host") + 1] == "127.0.0.1"
        start = words.index("--lora-target-modules") + 1
        assert words[start : start + 2] == ["q_proj", "v_proj"]


def test_settings_come_from_the_command_line(tmp_path: Path) -> None:
    words = ["--engine", "e", "--store", "s", "--namespace", "n", "--base-name", "b", "--base-digest", "d"]
    settings = GatewaySettings.parse([*words, "--slots", "16", "--cache-dir", str(tmp_path)])
    assert settings.max_loaded == 64 and settings.listen == "0.0.0.0:8000"
    with pytest.raises(ValueError, match="loaded"):
        GatewaySettings.parse([*words, "--slots", "16", "--loaded", "3", "--cache-dir", "x"])
