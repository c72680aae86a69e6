"""`/v1/probe`: load each revision, score its stored probe on the engine, say whether it may be exposed.

The trainer computed the probe's logprobs from the exported bytes, so what is compared is what was written, not what
was in the trainer's memory. Scoring sends prompt and completion as one prompt and reads the prompt's logprobs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from allele.protocol.commands import ProbeSequence
from allele.protocol.errors import Overloaded, ProtocolError, Unavailable
from allele.protocol.serving import Gate, ProbeReply, ProbeRequest, ProbeResult, Target
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.populations import Population, Populations
from allele_rollout.gateway.sampler import Outcome, Row, Sampler
from allele_rollout.gateway.verdict import judge

SCORE = {"temperature": 1.0, "max_new_tokens": 0}
"""Sampling parameters under which the engine only scores."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What one target must be compared with."""

    adapter: Adapter
    sequences: tuple[ProbeSequence, ...]
    trained: tuple[float, ...]
    parent: tuple[float, ...] | Adapter | None
    """The parent's stored probe; the parent itself, to be served, when its probe was another; None: the base."""


async def probe(
    request: ProbeRequest, *, populations: Populations, sampler: Sampler, clock: Callable[[], float] = time.monotonic
) -> ProbeReply:
    """Verdicts in the order of the targets."""
    begun = clock()
    population = await populations.get(request.namespace, request.population, version=request.version)
    probes: dict[Target, Probe | ProtocolError] = {}
    for target in request.targets:
        try:
            probes[target] = await stored_probe(population, target)
        except ProtocolError as e:
            probes[target] = e
    wanted = [p for p in probes.values() if isinstance(p, Probe)]
    scores = await _scores(wanted, sampler)
    results = tuple(_result(t, probes[t], scores, request) for t in request.targets)
    return ProbeReply(results=results, seconds=clock() - begun)


async def own_probe(adapter: Adapter, *, populations: Populations, sampler: Sampler) -> ProbeResult | None:
    """The verdict on one revision by the gate that its driver had; None: no probe was stored with it.

    What a person holds need not differ from its parent: one may go back to a first revision that does nothing yet.
    """
    name = adapter.name
    population = await populations.get(name.namespace, name.population)
    fact = population.fact(name.member, name.revision or 0)
    if not fact.probe:
        return None
    request = ProbeRequest(
        namespace=name.namespace,
        population=name.population,
        version=population.version,
        targets=(Target(member=name.member, revision=name.revision or 0),),
        gate=(await population.provenance(fact)).gate or Gate(),
    )
    (result,) = (await probe(request, populations=populations, sampler=sampler)).results
    held = result.verdict == "NotMoved" and population.is_held(name.member, result.revision)
    return result.model_copy(update={"verdict": "Passed"}) if held else result


async def stored_probe(population: Population, target: Target) -> Probe:
    """The probe recorded with a revision, and with its parent."""
    fact = population.fact(target.member, target.revision)
    sequences = (await population.provenance(fact)).probes
    parent = population.parent(fact)
    before: tuple[float, ...] | Adapter | None = None
    if parent is not None and parent.probe:
        same = (await population.provenance(parent)).probes == sequences
        before = tuple(parent.probe) if same else await population.committed(parent.member, parent.revision)
    return Probe(
        adapter=await population.committed(target.member, target.revision),
        sequences=tuple(sequences),
        trained=tuple(fact.probe or ()),
        parent=before,
    )


Scored = tuple[Adapter | None, tuple[ProbeSequence, ...]]


async def _scores(probes: Sequence[Probe], sampler: Sampler) -> dict[Scored, list[float | None] | ProtocolError]:
    """Served logprobs of everything that has to be served: targets, and parents without a stored probe."""
    wanted: dict[Scored, None] = {}
    for p in probes:
        wanted[p.adapter, p.sequences] = None
        if not isinstance(p.parent, tuple):
            wanted[p.parent, p.sequences] = None
    rows = [
        Row(adapter, s.prompt + s.completion, logprob_start=len(s.prompt) - 1)
        for adapter, sequences in wanted
        for s in sequences
    ]
    outcomes = iter(await sampler.run(rows, SCORE))
    found: dict[Scored, list[float | None] | ProtocolError] = {}
    for key in wanted:
        found[key] = _joined(key[1], [next(outcomes) for _ in key[1]])
    return found


def _joined(sequences: Sequence[ProbeSequence], outcomes: Sequence[Outcome]) -> list[float | None] | ProtocolError:
    """Logprobs of the completion tokens, one sequence after the other."""
    logprobs: list[float | None] = []
    for sequence, outcome in zip(sequences, outcomes, strict=True):
        if isinstance(outcome, ProtocolError):
            return outcome
        # The entry of the start position itself comes first, without a logprob.
        entries = outcome["meta_info"]["input_token_logprobs"][1:]
        found = tuple(e[1] for e in entries)
        if found != sequence.completion:
            return ProtocolError(f"probe: expected logprobs of {sequence.completion}, found those of {found}")
        logprobs += [e[0] for e in entries]
    return logprobs


def _result(
    target: Target,
    probe: Probe | ProtocolError,
    scores: dict[Scored, list[float | None] | ProtocolError],
    request: ProbeRequest,
) -> ProbeResult:
    if isinstance(probe, ProtocolError):
        return _failed(target, probe)
    served = scores[probe.adapter, probe.sequences]
    before = probe.parent if isinstance(probe.parent, tuple) else scores[probe.parent, probe.sequences]
    if isinstance(served, ProtocolError):
        return _failed(target, served)
    if isinstance(before, ProtocolError):
        return _failed(target, before)
    return judge(target, served=served, trained=probe.trained, before=before, gate=request.gate)


def _failed(target: Target, error: ProtocolError) -> ProbeResult:
    return ProbeResult(
        member=target.member,
        revision=target.revision,
        verdict="LoadFailed",
        message=f"{type(error).__name__}: {error}",
        outage=isinstance(error, Unavailable | Overloaded),
    )
