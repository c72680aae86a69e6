"""`/v1/generate`: prompts of a driver in, the engine's own ids and logprobs out, both as Arrow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from allele.protocol.errors import ProtocolError
from allele.protocol.samples import COMPLETIONS, PROMPTS, Generate, Generated, decode, encode
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.populations import Populations
from allele_rollout.gateway.sampler import Outcome, Row, Sampler


async def generate(
    data: bytes,
    *,
    populations: Populations,
    sampler: Sampler,
    on_sample: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> bytes:
    """Answer one PROMPTS stream with one COMPLETIONS stream: `n` rows a prompt, in request order."""
    begun = clock()
    header, table = decode(data, Generate, PROMPTS)
    keys = list(zip(table["member"].to_pylist(), table["revision"].to_pylist(), strict=True))
    adapters: dict[tuple[str, int | None], Adapter | ProtocolError | None] = {}
    for member, revision in dict.fromkeys(keys):
        if revision is None:
            adapters[member, revision] = None
            continue
        population = await populations.get(header.namespace, header.population, version=header.version)
        try:
            adapters[member, revision] = await population.committed(member, revision)
        except ProtocolError as e:
            adapters[member, revision] = e
    rows: list[Row] = []
    results: list[Outcome | None] = []
    for key, prompt in zip(keys, table["prompt"].to_pylist(), strict=True):
        adapter = adapters[key]
        for _ in range(header.n):
            results.append(adapter if isinstance(adapter, ProtocolError) else None)
            if not isinstance(adapter, ProtocolError):
                rows.append(Row(adapter, prompt or []))
    served = iter(await sampler.run(rows, sampling_params(header)))
    columns = completions([r if r is not None else next(served) for r in results], n=header.n)
    for error in columns["error"]:
        on_sample("ok" if error is None else "failed")
    return encode(Generated(seconds=clock() - begun), COMPLETIONS, columns)


def sampling_params(header: Generate) -> dict[str, Any]:
    """The engine's names for a driver's wishes."""
    return {
        "temperature": header.temperature,
        "top_p": header.top_p,
        "max_new_tokens": header.max_tokens,
        "stop_token_ids": list(header.stop_token_ids),
        "skip_special_tokens": False,
    }


def completions(outcomes: Sequence[Outcome], *, n: int) -> dict[str, list[object]]:
    """Columns of COMPLETIONS. A sample without a finite logprob for each token is an error, not data."""
    columns: dict[str, list[object]] = {name: [] for name in COMPLETIONS.names}
    for i, outcome in enumerate(outcomes):
        ids, logprobs, finish, error = _sample(outcome)
        for name, value in zip(COMPLETIONS.names, (i // n, ids, logprobs, finish, error), strict=True):
            columns[name].append(value)
    return columns


def _sample(outcome: Outcome) -> tuple[list[int], list[float], str | None, str | None]:
    if isinstance(outcome, ProtocolError):
        return [], [], None, f"{type(outcome).__name__}: {outcome}"
    meta = outcome["meta_info"]
    reason = meta["finish_reason"] or {}
    ids: list[int] = outcome["output_ids"]
    logprobs: list[float] = [entry[0] for entry in meta["output_token_logprobs"]]
    if reason.get("type") == "abort":
        return [], [], "abort", f"the engine aborted it: {reason.get('message')}"
    if len(ids) != len(logprobs) or not all(p is not None and math.isfinite(p) for p in logprobs):
        return [], [], None, f"expected {len(ids)} finite logprobs, found {logprobs}"
    return ids, logprobs, reason.get("type"), None
