"""`allele eval`: what clients of the OpenAI endpoint get, scored by the run's environment on held-out prompts.

It knows nothing of the driver's numbers: it asks the endpoint as any client would, and scores the text that comes
back. Every member's answers are scored under every member's reward, so that a population that merely learned one
common trick shows as a bright matrix instead of a bright diagonal.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from pydantic import BaseModel, ConfigDict

from allele.api.run import TrainGroup
from allele_cli.failure import Failure
from allele_cli.output import Format, show
from allele_cli.resources import load
from allele_driver.environments import Completion, Environment, MemberView, Prompt, Score
from allele_driver.environments.load import build
from allele_driver.members import Member, members_of, select
from allele_driver.recipes import view
from allele_driver.tokenizer import HfTokenizer, stop_tokens

CONCURRENT_REQUESTS = 4
"""Requests in flight: a request holds all prompts of one member, and engines batch best by adapter."""
PATIENCE = 180.0
"""Seconds that an endpoint may answer 503: an engine takes one or two minutes to start."""


class Evaluation(BaseModel):
    """Rewards on held-out prompts."""

    model_config = ConfigDict(frozen=True)

    population: str
    prompts: int
    temperature: float
    base: dict[str, float]
    """Member → reward of the base model under that member's reward."""
    members: dict[str, float]
    """Member → reward of its own adapter."""
    cross: list[list[float]]
    """cross[i][j]: adapter of member i under the reward of member j, in the order of `members`."""

    @property
    def diagonal_mean(self) -> float:
        return sum(self.members.values()) / len(self.members)

    @property
    def off_diagonal_mean(self) -> float:
        n = len(self.cross)
        return (sum(map(sum, self.cross)) - sum(self.cross[i][i] for i in range(n))) / max(1, n * (n - 1))


class Endpoint:
    """The completions route of an OpenAI-compatible server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, temperature: float, max_tokens: int) -> None:
        self._session = session
        self._url = f"{url.rstrip('/')}/v1/completions"
        self._options = {"temperature": temperature, "max_tokens": max_tokens}
        self._gate = asyncio.Semaphore(CONCURRENT_REQUESTS)

    async def complete(self, model: str, prompts: Sequence[str]) -> list[tuple[str, str]]:
        """(text, finish_reason) of each prompt. Raises Failure with the server's words.

        An engine that still starts is waited for.
        """
        body = {"model": model, "prompt": list(prompts), **self._options}
        until = time.monotonic() + PATIENCE
        async with self._gate:
            while True:
                async with self._session.post(self._url, json=body) as reply:
                    if reply.status == 200:
                        choices = (await reply.json())["choices"]
                        break
                    pause = float(reply.headers.get("Retry-After", "2"))
                    told = f"{self._url}: model {model}: HTTP {reply.status}: {(await reply.text())[:500]}"
                if reply.status != 503 or time.monotonic() > until:
                    raise Failure(told)
                await asyncio.sleep(pause)
        ordered = sorted(choices, key=lambda c: int(c["index"]))
        return [(str(c["text"]), str(c["finish_reason"])) for c in ordered]


class Judge:
    """One part of a run: its environment, and its members as the environment sees them."""

    def __init__(self, part: TrainGroup, members: Sequence[Member], tokenizer: HfTokenizer, *, prompts: int, seed: int):
        self.members = [view(m) for m in members]
        self._environment: Environment = build(part.environment.path, tokenizer, dict(part.environment.parameters))
        self._tokenizer = tokenizer
        drawn = self._environment.prompts(self.members[0], random.Random(seed), prompts, True)
        self.prompts = [Prompt(text=p) if isinstance(p, str) else p for p in drawn]

    def score(self, answers: Sequence[tuple[str, str]]) -> list[float]:
        """Mean reward of the answers to all prompts under each member's reward."""
        completions = [self._completion(text, finish) for text, finish in answers]
        return [
            sum(self._reward(m, p, c) for p, c in zip(self.prompts, completions, strict=True)) / len(completions)
            for m in self.members
        ]

    def _reward(self, member: MemberView, prompt: Prompt, completion: Completion) -> float:
        found = self._environment.score(member, prompt, completion)
        return found.reward if isinstance(found, Score) else float(found)

    def _completion(self, text: str, finish: str) -> Completion:
        """The endpoint returns text, so ids are those of the text, with the stop token that ended it."""
        ended = self._tokenizer.stop_token_ids[:1] if finish == "stop" else ()
        return Completion(ids=(*self._tokenizer.encode(text), *ended), text=text, finish=finish)


def evaluate(
    files: Annotated[list[Path], typer.Argument(help="YAML files with the AdapterPopulation and the RLRun.")],
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible URL of the pool.")],
    base: Annotated[Path, typer.Option(help="Folder with the base's tokenizer and config.")],
    code: Annotated[Path | None, typer.Option(help="Folder put on the Python path: the run's code.")] = None,
    base_model: Annotated[str, typer.Option(help="Name under which the endpoint serves the base.")] = "base",
    prompts: Annotated[int, typer.Option(help="Held-out prompts of each member.")] = 64,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    output: Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml.")] = Format.table,
) -> None:
    """Score a population through its endpoint, each member under every member's reward.

    Example: `allele eval population.yaml run.yaml --endpoint http://10.96.1.2 --base base/ --code .`
    """
    if code is not None:
        sys.path.insert(0, str(code))
    result = asyncio.run(
        evaluate_files(
            files,
            endpoint=endpoint,
            base=base,
            base_model=base_model,
            prompts=prompts,
            temperature=temperature,
            seed=seed,
        )
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(result.model_dump_json(indent=2) + "\n")
    rows = [{"member": m, "base": result.base[m], "reward": r} for m, r in result.members.items()]
    show(rows, fmt=output)


async def evaluate_files(
    files: Sequence[Path], *, endpoint: str, base: Path, base_model: str, prompts: int, temperature: float, seed: int
) -> Evaluation:
    """What `allele eval` computes. Raises Failure, InvalidInput or EnvironmentLoadError with what to mend."""
    documents = load(files)
    population, spec = documents.population()
    _, run = documents.run()
    tokenizer = _tokenizer(base)
    groups = {g.name: g for g in spec.groups}
    if len(run.groups) != 1:
        raise Failure(f"groups: expected one part with one environment to cross-evaluate, found {len(run.groups)}")
    part = run.groups[0]
    chosen = select(members_of(groups[part.select.group], files[0].parent), part.select)
    judge = Judge(part, chosen, tokenizer, prompts=prompts, seed=seed)
    texts = [p.text for p in judge.prompts]
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        server = Endpoint(session, endpoint, temperature=temperature, max_tokens=part.sampling.max_tokens)
        models = [base_model, *(f"{population}/{m.name}" for m in chosen)]
        answers = await asyncio.gather(*(server.complete(model, texts) for model in models))
    base_row, *rows = (judge.score(a) for a in answers)
    names = [m.name for m in chosen]
    return Evaluation(
        population=population,
        prompts=prompts,
        temperature=temperature,
        base=dict(zip(names, base_row, strict=True)),
        members={name: row[i] for i, (name, row) in enumerate(zip(names, rows, strict=True))},
        cross=rows,
    )


def _tokenizer(base: Path) -> HfTokenizer:
    def read(name: str) -> bytes | None:
        path = base / name
        return path.read_bytes() if path.exists() else None

    content, config = read("tokenizer.json"), read("config.json")
    if content is None or config is None:
        raise Failure(f"{base}: expected tokenizer.json and config.json of the base model")
    return HfTokenizer(content.decode(), stop_tokens(read("generation_config.json"), config))


def read_evaluation(path: Path) -> Evaluation:
    data: dict[str, Any] = json.loads(path.read_text())
    return Evaluation.model_validate(data)
