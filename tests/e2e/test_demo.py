"""`make demo` on the cluster: it learns, tells its story, keeps what it learned, and serves what it trained."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
from pathlib import Path

import boto3
import duckdb
import pytest
import torch
import yaml

from tests.e2e.conftest import EXAMPLE, NAMESPACE, ROOT, Demo

pytestmark = pytest.mark.timeout(1800)


def assert_learned(summary: dict) -> None:
    """The issue's bounds on what a population of sixteen learns in forty steps."""
    last = summary["reward_last"]["per_member"]
    assert len(last) == 16
    assert summary["reward_first"]["mean"] <= 0.35
    assert summary["reward_last"]["mean"] >= 0.90
    assert sum(r > 0.85 for r in last.values()) >= 14, last
    cross = summary["cross_evaluation"]
    assert cross["diagonal_mean"] >= 3 * cross["off_diagonal_mean"]
    assert summary["exposure_max_gap"] <= 1e-4
    assert summary["revisions"]["exposed"] >= 16
    assert summary["steps"] >= 40


def test_population_learns_and_what_is_served_is_what_was_trained(cluster_demo: Demo) -> None:
    assert_learned(cluster_demo.summary)
    assert cluster_demo.summary["seconds"]["training"] <= 300
    assert (ROOT / "out/demo/report.png").stat().st_size > 50_000


def test_output_ends_with_members_and_what_to_try(cluster_demo: Demo) -> None:
    for expected in ("taste-0000", "taste-0015", "report.png", "kubectl -n allele-demo get", "allele lineage", "curl"):
        assert expected in cluster_demo.output


def test_columns_say_what_is_the_case(cluster_demo: Demo, kubectl) -> None:
    table = kubectl("get", "ast,art,bp,apop,rlr")
    for line, words in {
        "adapterstore.allele.dev/store": ["True"],
        "adapterruntime.allele.dev/cpu": ["True"],
        "basepool.allele.dev/tiny": ["True", "16"],
        "adapterpopulation.allele.dev/preferences": ["16"],
        "rlrun.allele.dev/preferences": ["Succeeded", "40"],
    }.items():
        (found,) = [row for row in table.splitlines() if row.startswith(line)]
        assert all(w in found for w in words), found


def test_describe_tells_the_story_of_the_run(cluster_demo: Demo, kubectl) -> None:
    run = json.loads(kubectl("get", "rlrun", "preferences", "--output", "json"))
    conditions = {c["type"]: c for c in run["status"]["conditions"]}
    assert conditions["Succeeded"]["status"] == "True"
    assert all(c["message"] and c["observedGeneration"] == run["metadata"]["generation"] for c in conditions.values())
    assert float(run["status"]["reward"]["mean"]) > 0.8
    text = kubectl("describe", "rlrun", "preferences")
    assert "Events:" in text


def test_every_field_is_explained(cluster_demo: Demo, kubectl) -> None:
    for kind in ("ast", "art", "bp", "apop", "rlr"):
        text = kubectl("explain", f"{kind}.spec", "--recursive")
        assert "<empty>" not in text
    assert "<empty>" not in kubectl("explain", "rlr.spec")


def test_exported_adapter_has_the_endpoints_logprobs_in_peft(
    cluster_demo: Demo, allele, kubectl, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    allele("export", "preferences/taste-0005", "--to", str(tmp_path / "adapter"))
    prompt, answer = completion(kubectl, model="preferences/taste-0005", prompt="kbdac=")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "base")
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    served = answer["logprobs"]["token_logprobs"]
    ids = torch.tensor([[*tokenizer(prompt + answer["text"]).input_ids, 1]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0], -1)
    start = len(tokenizer(prompt).input_ids)
    expected = [logprobs[i - 1, ids[0, i]].item() for i in range(start, start + len(served))]
    assert len(served) >= 7
    assert max(abs(a - b) for a, b in zip(served, expected, strict=True)) < 1e-4


def completion(kubectl, *, model: str, prompt: str) -> tuple[str, dict]:
    """One greedy completion with logprobs, asked for as a client would."""
    service = json.loads(kubectl("get", "service", "tiny", "--output", "json"))
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    url = f"http://{service['spec']['clusterIP']}/v1/completions"
    command = ["curl", "-sS", "--fail-with-body", url, "-H", "content-type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return prompt, json.loads(done.stdout)["choices"][0]


def test_duckdb_and_boto3_alone_can_read_verify_and_fetch_a_member(cluster_demo: Demo, tmp_path: Path) -> None:
    """Nothing of ours: the Delta log by boto3, the facts by DuckDB, the bytes by one ranged GET, their sha256."""
    secret, store = (o for o in yaml.safe_load_all((EXAMPLE / "01-store.yaml").read_text()))
    s3 = boto3.client(
        "s3",
        endpoint_url=store["spec"]["endpoint"],
        region_name="us-east-1",
        aws_access_key_id=secret["stringData"]["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=secret["stringData"]["AWS_SECRET_ACCESS_KEY"],
    )
    bucket, prefix = store["spec"]["bucket"], f"{NAMESPACE}/preferences/"
    keys = [
        o["Key"]
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "catalogue/")
        for o in page.get("Contents", ())
    ]
    live = live_files(s3, bucket, sorted(k for k in keys if "/_delta_log/" in k and k.endswith(".json")))
    assert live
    for name in live:
        path = tmp_path / name.replace("/", "_")
        path.write_bytes(s3.get_object(Bucket=bucket, Key=f"{prefix}catalogue/{name}")["Body"].read())
    rows = duckdb.sql(
        f"select member, revision, digest, segment, \"offset\", length from '{tmp_path}/*.parquet' "
        "where kind = 'Committed' and member = 'taste-0007' order by revision desc limit 3"
    ).fetchall()
    assert len(rows) == 3
    for _, _, digest, segment, offset, length in rows:
        span = f"bytes={offset}-{offset + length - 1}"
        data = s3.get_object(Bucket=bucket, Key=prefix + segment, Range=span)["Body"].read()
        assert hashlib.sha256(data).hexdigest() == digest


def live_files(s3, bucket: str, log: list[str]) -> set[str]:
    """Data files of a Delta table: what its log added and did not remove."""
    live: set[str] = set()
    for key in log:
        for line in s3.get_object(Bucket=bucket, Key=key)["Body"].read().splitlines():
            action = json.loads(line)
            if "add" in action:
                live.add(action["add"]["path"])
            if "remove" in action:
                live.discard(action["remove"]["path"])
    return live


def test_command_line_tells_members_and_lineage(cluster_demo: Demo, allele) -> None:
    members = json.loads(allele("members", "preferences", "--output", "json"))
    assert [m["member"] for m in members] == [f"taste-{i:04d}" for i in range(16)]
    assert all(m["exposed"] for m in members)
    chain = json.loads(allele("lineage", "preferences/taste-0003", "--output", "json"))
    revisions = [link["revision"] for link in chain]
    assert revisions == sorted(revisions, reverse=True) and chain[-1]["parent"] is None
    assert all(a["parent"] == b["revision"] for a, b in itertools.pairwise(chain))
    assert chain[0]["base"].startswith("sha256:") and chain[0]["code_digest"].startswith("sha256:")


def test_running_the_demo_again_is_quick_and_safe(cluster_demo: Demo, kubeconfig: Path, allele) -> None:
    from tests.e2e.conftest import run_demo

    before = allele("members", "preferences", "--output", "json")
    again = run_demo("cluster", KUBECONFIG=str(kubeconfig))
    assert allele("members", "preferences", "--output", "json") == before
    assert again.summary["seconds"]["start"] < 60
    assert os.path.exists(ROOT / "out/demo/report.png")
