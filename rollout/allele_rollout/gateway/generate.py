"""`/v1/generate`: prompts of a driver in, the engine's own ids and logprobs out, both as Arrow."""

from __future__ import annotations

import base64
import binascii
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
import pyarrow as pa

from allele.protocol.errors import InvalidRequest, ProtocolError
from allele.protocol.samples import COMPLETIONS, PROMPTS, Generate, Generated, decode, encode
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.populations import Populations
from allele_rollout.gateway.sampler import Outcome, Row, Sampler
from allele_rollout.gateway.underway import Aborted, Underway

Asked = Row | ProtocolError
"""A row for the engine, or why there is none."""


async def generate(
    data: bytes,
    *,
    populations: Populations,
    sampler: Sampler,
    underway: Underway,
    place: Callable[[], AbstractAsyncContextManager[None]],
    tells_experts: Callable[[], bool],
    on_sample: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> bytes:
    """Answer one PROMPTS stream with one COMPLETIONS stream: `n` rows a prompt, in request order."""
    begun = clock()
    header, table = decode(data, Generate, PROMPTS)
    name = underway.name(header.request_prefix)

    async def sample() -> tuple[list[Asked], list[Outcome]]:
        async with place():
            if header.experts and not tells_experts():
                raise InvalidRequest(
                    "experts: expected an engine of a base with experts, started with --enable-return-routed-experts; "
                    "found one that does not tell them"
                )
            asked = await _rows(header, table, populations, prefix=name)
            served = iter(await sampler.run([r for r in asked if isinstance(r, Row)], sampling_params(header)))
            return asked, [next(served) if isinstance(r, Row) else r for r in asked]

    try:
        asked, outcomes = await underway.run(name, sample())
    except Aborted as e:
        asked, outcomes = [e] * (len(table) * header.n), [e] * (len(table) * header.n)
    columns = completions(asked, outcomes, n=header.n)
    for error in columns["error"]:
        on_sample("ok" if error is None else "failed")
    return encode(Generated(seconds=clock() - begun), COMPLETIONS, columns)


async def _rows(header: Generate, table: pa.Table, populations: Populations, *, prefix: str) -> list[Asked]:
    """`n` for each prompt."""
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
    asked: list[Asked] = []
    for key, prompt in zip(keys, table["prompt"].to_pylist(), strict=True):
        adapter = adapters[key]
        if isinstance(adapter, ProtocolError):
            asked += [adapter] * header.n
        else:
            asked += [Row(adapter, prompt or [], prefix=prefix, experts=header.experts)] * header.n
    return asked


def sampling_params(header: Generate) -> dict[str, Any]:
    """The engine's names for a driver's wishes."""
    return {
        "temperature": header.temperature,
        "top_p": header.top_p,
        "max_new_tokens": header.max_tokens,
        "stop_token_ids": list(header.stop_token_ids),
        "skip_special_tokens": False,
    }


def completions(asked: Sequence[Asked], outcomes: Sequence[Outcome], *, n: int) -> dict[str, list[object]]:
    """Columns of COMPLETIONS. A sample without a finite logprob for each token is an error, not data."""
    columns: dict[str, list[object]] = {name: [] for name in COMPLETIONS.names}
    for i, (row, outcome) in enumerate(zip(asked, outcomes, strict=True)):
        sample = _failed(row) if isinstance(row, ProtocolError) else _sample(row, outcome)
        for name, value in ({"request": i // n} | sample).items():
            columns[name].append(value)
    return columns


def _failed(error: ProtocolError) -> dict[str, object]:
    finish = "abort" if isinstance(error, Aborted) else None
    return _no_sample(f"{type(error).__name__}: {error}", finish=finish)


def _no_sample(error: str, *, finish: str | None = None) -> dict[str, object]:
    return {"completion": [], "logprobs": [], "finish": finish, "error": error, "revision": None, "experts": None}


def _sample(row: Row, outcome: Outcome) -> dict[str, object]:
    if isinstance(outcome, ProtocolError):
        return _failed(outcome)
    meta = outcome["meta_info"]
    reason = meta["finish_reason"] or {}
    ids: list[int] = outcome["output_ids"]
    logprobs: list[float] = [entry[0] for entry in meta["output_token_logprobs"]]
    if reason.get("type") == "abort":
        return _no_sample(f"the engine aborted it: {reason.get('message')}", finish="abort")
    if len(ids) != len(logprobs) or not all(p is not None and math.isfinite(p) for p in logprobs):
        return _no_sample(f"expected {len(ids)} finite logprobs, found {logprobs}")
    experts = None
    if row.experts:
        try:
            experts = routed(meta.get("routed_experts"), tokens=len(row.input_ids) + len(ids))
        except InvalidRequest as e:
            return _no_sample(str(e))
    return {
        "completion": ids,
        "logprobs": logprobs,
        "finish": reason.get("type"),
        "error": None,
        "revision": None if row.adapter is None else row.adapter.name.revision,
        "experts": experts,
    }


def routed(text: str | None, *, tokens: int) -> list[int]:
    """The engine's `[tokens − 1, layers, experts per token]` of int32, flattened. Raises InvalidRequest."""
    try:
        found = np.frombuffer(base64.b64decode(text or "", validate=True), "<i4")
    except (binascii.Error, ValueError) as e:
        raise InvalidRequest(f"experts: expected base64 of int32, found {str(text)[:40]!r}") from e
    if not found.size or found.size % (tokens - 1):
        raise InvalidRequest(f"experts: expected some for each of {tokens - 1} tokens, found {found.size} in all")
    if found.min() < -1 or found.max() > np.iinfo(np.int16).max:
        raise InvalidRequest(f"experts: expected −1 to 32767, found {found.min()} to {found.max()}")
    return list(map(int, found))
