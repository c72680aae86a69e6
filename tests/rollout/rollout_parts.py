"""Real adapters, their truth by Hugging Face and PEFT, a population in a store, and a client of a gateway."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from allele.format import AdapterShape, export_peft
from allele.protocol.commands import OptimizerSpec, ProbeSequence
from allele.protocol.samples import COMPLETIONS, PROMPTS, Generate, Generated, decode, encode
from allele.protocol.serving import Gate, ProbeReply, ProbeRequest, Target
from allele.store.facts import Fact
from allele.store.population import PopulationRecord, PopulationStore
from allele.store.provenance import BaseRef, DataRange, Provenance, ShapeRef, Versions

BASE = Path(__file__).parent.parent.parent / "examples/preferences/base"
BASE_DIGEST = "sha256:" + "b" * 64
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA = 16.0
SHAPE = AdapterShape.from_model(json.loads((BASE / "config.json").read_text()), rank=8, targets=TARGETS)
EOS = 1
PROBES = (
    ProbeSequence(prompt=(13, 4, 6, 3, 5, 2), completion=(35, 3, 4, 5, 6, 13, 35, EOS)),
    ProbeSequence(prompt=(7, 9, 8, 2), completion=(36, 7, 8, 9)),
)


def random_adapter(seed: int, *, size: float = 0.15, shape: AdapterShape = SHAPE) -> bytes:
    """A packed adapter with both halves random, so that it does something."""
    return shape.pack((np.random.default_rng(seed).standard_normal(shape.numel) * size).astype("<f4"))


def inert_adapter() -> bytes:
    """As an adapter starts: B is zero, so it is the base."""
    row = np.zeros(SHAPE.numel, "<f4")
    for slot in SHAPE.tensors:
        if ".lora_A." in slot.name:
            row[slot.offset : slot.offset + slot.numel] = 0.1
    return SHAPE.pack(row)


def reference(packed: bytes | None, sequences: Sequence[ProbeSequence]) -> list[float]:
    """Logprobs of all completion tokens by Hugging Face and PEFT, in float32; None is the base."""
    import torch

    model = _reference_model()
    if packed is not None:
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            export_peft(packed, folder, shape=SHAPE, scale=ALPHA / SHAPE.rank, base_name="tiny")
            model = PeftModel.from_pretrained(model, folder).eval()
    found: list[float] = []
    with torch.no_grad():
        for s in sequences:
            ids = torch.tensor([s.prompt + s.completion])
            logprobs = torch.log_softmax(model(ids).logits[0].float(), -1)
            start = len(s.prompt) - 1
            found += [float(logprobs[start + i, t]) for i, t in enumerate(s.completion)]
    if packed is not None:
        model.unload()
    return found


@functools.cache
def _reference_model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


class StoredPopulation:
    """Writes what a driver would."""

    def __init__(
        self,
        url: str,
        *,
        namespace: str,
        name: str,
        base_digest: str = BASE_DIGEST,
        uid: str = "uid-1",
        environ: Mapping[str, str] = os.environ,
        shape: AdapterShape = SHAPE,
    ) -> None:
        self.namespace, self.name, self.shape = namespace, name, shape
        self.store = PopulationStore.open(url, namespace=namespace, population=name, environ=environ)
        record = PopulationRecord(uid=uid, base_digest=base_digest, shapes={"main": shape.digest})
        self.store.claim(record)
        self._writer = self.store.catalogue.start("run-1")
        self._step = 0

    def commit(
        self,
        adapters: Mapping[str, bytes],
        *,
        revision: int = 1,
        parent: int | None = None,
        expose: bool = False,
        probes: Mapping[str, Sequence[float]] | None = None,
        sequences: tuple[ProbeSequence, ...] = PROBES,
    ) -> int:
        """One revision of each member, as one commit; returns the catalogue version."""
        ranges = self.store.write_segments(adapters)
        provenance = self.store.write_provenance(self._provenance(sequences))
        facts = [
            Fact.committed(
                member=m,
                revision=revision,
                weights=where,
                group="main",
                parent=parent,
                shape=self.shape.digest,
                provenance=provenance,
                probe=tuple(np.float32(x).item() for x in probes[m]) if probes else None,
            )
            for m, where in ranges.items()
        ]
        if expose:
            facts += [Fact(kind="Exposed", member=m, revision=revision) for m in adapters]
        return self.add(facts)

    def add(self, facts: Sequence[Fact]) -> int:
        self._step += 1
        return self._writer.commit(self._step, facts)

    def _provenance(self, sequences: tuple[ProbeSequence, ...]) -> Provenance:
        shape = ShapeRef(
            digest=self.shape.digest,
            rank=self.shape.rank,
            alpha=ALPHA,
            scaling="Standard",
            targets=self.shape.targets,
            init="Standard",
        )
        return Provenance(
            namespace=self.namespace,
            population=self.name,
            population_uid="uid-1",
            run="run",
            run_uid="run-1",
            fence=1,
            step=self._step,
            base=BaseRef(uri="tiny", digest=BASE_DIGEST),
            tokenizer_digest="",
            shapes={"main": shape},
            environment="none",
            reward="none",
            data=DataRange(cursor=0, prompts=0),
            versions=Versions(allele="0"),
            optimizer=OptimizerSpec(),
            loss={},
            probes=sequences,
            time=datetime(2026, 1, 1, tzinfo=UTC),
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def call(url: str, body: bytes | Mapping[str, Any] | None = None) -> Answer:
    """One request; an error status is an answer too."""
    data = json.dumps(body).encode() if isinstance(body, Mapping) else body
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as r:
            return Answer(r.status, r.headers, r.read())
    except urllib.error.HTTPError as e:
        return Answer(e.code, e.headers, e.read())


@dataclasses.dataclass(frozen=True)
class Sample:
    request: int
    completion: list[int]
    logprobs: list[float]
    finish: str | None
    error: str | None
    revision: int | None
    experts: list[int] | None


@dataclasses.dataclass(frozen=True)
class Service:
    """A running gateway."""

    tenant: str
    internal: str

    def wait_healthy(self, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.healthy():
            assert time.monotonic() < deadline, "the gateway did not become healthy"
            time.sleep(0.1)

    def healthy(self) -> bool:
        try:
            return call(f"{self.tenant}/healthz").status == 200
        except urllib.error.URLError:  # not listening yet
            return False

    def generate(
        self, rows: Sequence[tuple[str, int | None, Sequence[int]]], *, population: str = "styles", **wishes: Any
    ) -> list[Sample]:
        status, samples = self.try_generate(rows, population=population, **wishes)
        assert samples is not None, status
        return samples

    def try_generate(
        self, rows: Sequence[tuple[str, int | None, Sequence[int]]], *, population: str = "styles", **wishes: Any
    ) -> tuple[int, list[Sample] | None]:
        """Status, and the samples where it is 200."""
        header = Generate(
            **{"namespace": "team", "population": population, "max_tokens": 8, "stop_token_ids": (EOS,), **wishes}
        )
        columns: dict[str, list[object]] = {
            "member": [r[0] for r in rows],
            "revision": [r[1] for r in rows],
            "prompt": [list(r[2]) for r in rows],
        }
        answer = call(f"{self.internal}/v1/generate", encode(header, PROMPTS, columns))
        if answer.status != 200:
            return answer.status, None
        _, table = decode(answer.body, Generated, COMPLETIONS)
        return 200, [Sample(**row) for row in table.to_pylist()]

    def probe(self, version: int, targets: Sequence[tuple[str, int]], gate: Gate | None = None) -> ProbeReply:
        request = ProbeRequest(
            namespace="team",
            population="styles",
            version=version,
            targets=tuple(Target(member=m, revision=r) for m, r in targets),
            gate=gate or Gate(),
        )
        answer = call(f"{self.internal}/v1/probe", request.model_dump_json().encode())
        assert answer.status == 200, answer.body
        return ProbeReply.model_validate_json(answer.body)

    def complete(self, model: str, prompt: str = "kbdac=", **fields: Any) -> Answer:
        return call(
            f"{self.tenant}/v1/completions",
            {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields},
        )
