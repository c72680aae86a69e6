"""Bytes of adapters: publishing many, loading many cold, and one of very many tensors."""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import safetensors.numpy
import safetensors.torch

from allele.format import AdapterShape, export_peft
from allele.store import Fact, PopulationStore
from bench.report import Report
from bench.store.places import BUCKET, Place

SMALL = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MINT = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 128,
    "num_local_experts": 128,
    "moe_intermediate_size": 32,
}
"""48 layers × (128 experts × 3 + 4) × 2 = 37,248 tensors, as of Qwen3-30B-A3B; widths are small, as their number is
what is asked about."""
THREADS = 16


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Wall time, the best of several."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def packed(shape: AdapterShape, count: int) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {f"m{i}": shape.pack(rng.normal(size=shape.numel).astype(np.float32)) for i in range(count)}


def publish(report: Report, place: Place, *, members: int, rounds: int) -> PopulationStore:
    """A step of all members: their bytes and the commit that makes them exist."""
    adapters = packed(AdapterShape.from_model(SMALL, rank=8, targets=TARGETS), members)
    store = PopulationStore.of(place.store(), namespace="bench", population="members")
    writer = store.catalogue.start("run")
    step = 0

    def ours() -> None:
        nonlocal step
        step += 1
        ranges = store.write_segments(adapters)
        writer.commit(
            step,
            [Fact.committed(member=m, revision=step, weights=r, shape="s") for m, r in ranges.items()],
        )

    what, taken = f"publish {members}", seconds(ours, rounds)
    report.rows.append({"what": what, "place": place.name, "by": "allele", "s": taken})
    if place.name == "s3":
        client = place.boto3()

        def put(item: tuple[str, bytes]) -> None:
            client.put_object(Bucket=BUCKET, Key=f"peft/{item[0]}/adapter_model.safetensors", Body=item[1])

        def one_by_one() -> None:
            for item in adapters.items():
                put(item)

        def threaded() -> None:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(put, adapters.items()))

        _against(report, what, place.name, taken, {"PUT each": one_by_one, f"PUT each, {THREADS} threads": threaded})
    return store


def cold_load(report: Report, place: Place, store: PopulationStore, *, members: int, rounds: int) -> None:
    """Adapters of a population that nothing has read, digests checked."""
    newest = {f.member: f for f in store.catalogue.facts() if f.kind == "Committed"}
    wanted = [f.weights for m, f in sorted(newest.items(), key=lambda i: int(i[0][1:]))[:members] if f.weights]
    what, taken = f"load {members} cold", seconds(lambda: store.read_many(wanted), rounds)
    report.rows.append({"what": what, "place": place.name, "by": "allele", "s": taken})
    if place.name == "s3":
        client = place.boto3()

        def get(i: int) -> bytes:
            key = f"peft/m{i}/adapter_model.safetensors"
            return bytes(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

        def one_by_one() -> None:
            for i in range(members):
                get(i)

        def threaded() -> None:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(get, range(members)))

        _against(report, what, place.name, taken, {"GET each": one_by_one, f"GET each, {THREADS} threads": threaded})


def many_tensors(report: Report, *, rounds: int) -> None:
    """From a file in the page cache to one flat row, against a dictionary of tensors."""
    shape = AdapterShape.from_model(MINT, rank=2, targets=TARGETS)
    data = packed(shape, 1)["m0"]
    with tempfile.TemporaryDirectory() as folder:
        path = export_peft(data, folder, shape=shape, scale=1.0, base_name="base") / "adapter_model.safetensors"

        def ours() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
            return np.frombuffer(shape.unpack(pathlib.Path(path).read_bytes()), np.uint8).copy()

        what, taken = f"load {len(shape.tensors)} tensors", seconds(ours, rounds)
        report.rows.append({"what": what, "place": "files", "by": "allele", "s": taken, "MB": len(data) / 1e6})
        rivals: dict[str, Callable[[], object]] = {
            "safetensors.torch": lambda: safetensors.torch.load_file(path),
            "safetensors.numpy": lambda: safetensors.numpy.load_file(path),
        }
        _against(report, what, "files", taken, rivals, rounds=rounds)


def _against(
    report: Report, what: str, place: str, ours: float, rivals: dict[str, Callable[[], object]], *, rounds: int = 1
) -> None:
    for name, work in rivals.items():
        found = seconds(work, rounds)
        report.ratios[f"{what} on {place} vs {name}"] = found / ours
        report.rows.append({"what": what, "place": place, "by": name, "s": found, "times": found / ours})
