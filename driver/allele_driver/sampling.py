"""Client of the gateways: spreads members over replicas, and asks all replicas for verdicts.

A gateway URL whose host has several addresses (a headless Service) is as many replicas. A member always goes to the
same replica while the set of replicas stays the same, so that its adapter is resident there; when a replica is lost,
only its members move (rendezvous hashing).
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from allele.api.run import Sampling
from allele.protocol.samples import COMPLETIONS, MEDIA_TYPE, PROMPTS, Generate, Generated, decode, encode
from allele.protocol.serving import Gate, GatewayStatus, Prefetch, ProbeReply, ProbeRequest, ProbeResult, Target
from allele_driver import wire
from allele_driver.metrics import PREFETCH_FAILURES
from allele_driver.patience import TRANSIENT, Patience
from allele_driver.rollouts import Drawn

log = logging.getLogger(__name__)

SAMPLE_ATTEMPTS = 3
"""Times that a prompt is asked for before its failed samples are dropped."""

PREFETCH_SECONDS = 5.0
"""How long a replica may take to note an announcement."""
PROBE_SECONDS = 60.0
"""How long a replica may be silent before a probe counts as failed there; the next revision is probed anew."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One prompt under one revision; None is the base without an adapter."""

    member: str
    revision: int | None
    prompt: tuple[int, ...]


Resolve = Callable[[str], Awaitable[list[str]]]


async def resolve(url: str) -> list[str]:
    """One URL per address of the host."""
    parts = urlsplit(url)
    assert parts.hostname is not None, f"gateway: expected http://host:port, found {url!r}"
    found = await asyncio.get_running_loop().getaddrinfo(
        parts.hostname, parts.port or 80, family=socket.AF_INET, type=socket.SOCK_STREAM
    )
    addresses = sorted({str(f[4][0]) for f in found})
    return [urlunsplit(parts._replace(netloc=f"{a}:{parts.port or 80}")).rstrip("/") for a in addresses]


def replica_of(member: str, replicas: Sequence[str]) -> str:
    """Rendezvous hashing: the replica with the highest hash together with the member."""
    return max(replicas, key=lambda r: hashlib.blake2b(f"{member}\x1f{r}".encode(), digest_size=8).digest())


class Gateways:
    """All rollout replicas of a pool, for one population."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        session: aiohttp.ClientSession,
        namespace: str,
        population: str,
        patience: Patience,
        resolve: Resolve = resolve,
    ) -> None:
        self._urls = tuple(urls)
        self._session = session
        self._namespace = namespace
        self._population = population
        self._patience = patience
        self._resolve = resolve

    async def replicas(self) -> list[str]:
        """URLs of all replicas now. Raises OSError when no name resolves."""
        found = await asyncio.gather(*(self._resolve(u) for u in self._urls), return_exceptions=True)
        known = sorted({u for f in found if not isinstance(f, BaseException) for u in f})
        if not known:
            raise OSError(f"gateways: expected addresses behind {', '.join(self._urls)}, found {found}")
        return known

    async def status(self) -> GatewayStatus:
        """Of one replica that answers with a running engine."""

        async def ask() -> GatewayStatus:
            data = await wire.get(self._session, f"{(await self.replicas())[0]}/v1/status")
            return GatewayStatus.model_validate_json(data)

        return await self._patience.until("gateway", ask)

    async def generate(
        self, asks: Sequence[Ask], *, n: int, sampling: Sampling, stop: tuple[int, ...], version: int | None
    ) -> list[list[Drawn | str]]:
        """`n` samples for each ask, in its order; a text in place of a sample says why it failed."""
        header = Generate(
            namespace=self._namespace,
            population=self._population,
            n=n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=stop,
            version=version,
        )
        answers: dict[int, list[Drawn | str]] = {}
        for attempt in range(SAMPLE_ATTEMPTS):
            pending = [i for i in range(len(asks)) if all(isinstance(d, str) for d in answers.get(i, []))]
            if not pending:
                break
            if attempt:
                log.warning("%d prompts failed, asking again: %s", len(pending), answers[pending[0]][0])
            answers |= await self._spread(header, {i: asks[i] for i in pending})
        return [answers[i] for i in range(len(asks))]

    async def _spread(self, header: Generate, asks: dict[int, Ask]) -> dict[int, list[Drawn | str]]:
        """Answers to all asks, whichever replica gives them; replicas that failed are passed over while others live."""
        answers: dict[int, list[Drawn | str]] = {}
        lost: set[str] = set()

        async def attempt() -> None:
            known = await self.replicas()
            usable = [r for r in known if r not in lost]
            if not usable:
                lost.clear()
                usable = known
            shares: dict[str, list[int]] = {}
            for i, ask in asks.items():
                if i not in answers:
                    shares.setdefault(replica_of(ask.member, usable), []).append(i)
            found = await asyncio.gather(
                *(self._ask(r, header, [asks[i] for i in share]) for r, share in shares.items()), return_exceptions=True
            )
            failure: BaseException | None = None
            for (replica, share), result in zip(shares.items(), found, strict=True):
                if isinstance(result, BaseException):
                    failure = failure if failure is not None and not isinstance(failure, TRANSIENT) else result
                    lost.add(replica)
                else:
                    answers.update(zip(share, result, strict=True))
            if failure is not None:
                raise failure

        await self._patience.until("gateway", attempt)
        return answers

    async def _ask(self, replica: str, header: Generate, asks: Sequence[Ask]) -> list[list[Drawn | str]]:
        columns: dict[str, list[object]] = {
            "member": [a.member for a in asks],
            "revision": [a.revision for a in asks],
            "prompt": [a.prompt for a in asks],
        }
        data = await wire.post(
            self._session, f"{replica}/v1/generate", encode(header, PROMPTS, columns), media=MEDIA_TYPE
        )
        _, table = decode(data, Generated, COMPLETIONS)
        found: list[list[Drawn | str]] = [[] for _ in asks]
        for row in table.to_pylist():
            sample: Drawn | str = row["error"] or Drawn(
                tuple(row["completion"]), tuple(row["logprobs"]), row["finish"] or ""
            )
            found[row["request"]].append(sample)
        return found

    async def probe(self, targets: Sequence[Target], *, gate: Gate, version: int) -> dict[str, list[ProbeResult]]:
        """Verdicts on each target, by replica. A silent replica has failed them all."""
        body = ProbeRequest(
            namespace=self._namespace,
            population=self._population,
            version=version,
            targets=tuple(targets),
            gate=gate,
        )
        replicas = await self._patience.until("gateway", self.replicas)
        found = await asyncio.gather(*(self._probe_one(r, body) for r in replicas))
        return dict(zip(replicas, found, strict=True))

    async def prefetch(self, targets: Sequence[Target], *, run: str, version: int, seconds: float) -> None:
        """Tell every replica which of its members are sampled next; each is told, some with none, and may refuse.

        A replica that does not answer costs only that its adapters are loaded when they are needed.
        """
        replicas = await self.replicas()
        shares: dict[str, list[Target]] = {r: [] for r in replicas}
        for t in targets:
            shares[replica_of(t.member, replicas)].append(t)
        head = {"namespace": self._namespace, "population": self._population, "run": run, "version": version}

        async def tell(replica: str, share: Sequence[Target]) -> None:
            body = Prefetch.model_validate(head | {"targets": tuple(share), "seconds": seconds})
            async with asyncio.timeout(PREFETCH_SECONDS):
                await wire.post(self._session, f"{replica}/v1/prefetch", body.model_dump_json().encode())

        found = await asyncio.gather(*(tell(r, share) for r, share in shares.items()), return_exceptions=True)
        for replica, outcome in zip(shares, found, strict=True):
            if isinstance(outcome, Exception):
                PREFETCH_FAILURES.inc()
                log.info("prefetch refused by %s: %s: %s", replica, type(outcome).__name__, outcome)

    async def _probe_one(self, replica: str, body: ProbeRequest) -> list[ProbeResult]:
        data = body.model_dump_json().encode()

        async def ask() -> bytes:
            return await wire.post(self._session, f"{replica}/v1/probe", data)

        try:
            reply = await self._patience.until("gateway", ask, seconds=PROBE_SECONDS)
        except TRANSIENT as e:
            silent = f"{replica}: no answer in {PROBE_SECONDS:g} s: {type(e).__name__}: {e}"
            return [
                ProbeResult(member=t.member, revision=t.revision, verdict="LoadFailed", message=silent, outage=True)
                for t in body.targets
            ]
        return list(ProbeReply.model_validate_json(reply).results)
