"""A vote as one request: each member answers it in a place of its own, and the winner's answer is the reply.

A vote is refused whole when there are not enough places; once they all have one, a member that fails is only left out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from allele.protocol.adapters import parse_model
from allele.protocol.errors import InvalidRequest, ProtocolError, Unavailable
from allele_rollout.gateway.bodies import ChatRequest, TextRequest, Vote
from allele_rollout.gateway.openai import BadRequest
from allele_rollout.gateway.parts import Gateway
from allele_rollout.gateway.upstream import served
from allele_rollout.gateway.votes import Answer, majority


@dataclasses.dataclass(frozen=True)
class Ballot:
    """One member's answer, and the engine's reply that holds it."""

    answer: Answer
    reply: dict[str, Any]
    revision: int | None


async def hold_vote(
    gateway: Gateway, path: str, body: dict[str, Any], asked: ChatRequest | TextRequest, vote: Vote
) -> tuple[dict[str, Any], int | None]:
    """The reply, and the revision of the member that won.

    Raises BadRequest, Overloaded without a place for each member, or the first member's error when all fail.
    """
    check(asked, vote, gateway.settings.namespace)
    scored = {**body, "logprobs": True if isinstance(asked, ChatRequest) else asked.logprobs or 0}

    async def ballot(member: str) -> Ballot | ProtocolError:
        try:
            async with served(gateway, path, {**scored, "model": member}) as one:
                reply = json.loads(one.whole or b"")
            return Ballot(_answer(member, reply["choices"][0]), reply, one.revision)
        except ProtocolError as e:
            return e

    async with gateway.tenant_bound.place(len(vote.members)):
        gateway.watch.require()
        async with asyncio.TaskGroup() as group:
            tasks = {member: group.create_task(ballot(member)) for member in vote.members}
    outcomes = {member: task.result() for member, task in tasks.items()}
    failed = {m: o for m, o in outcomes.items() if isinstance(o, ProtocolError)}
    ballots = {m: o for m, o in outcomes.items() if isinstance(o, Ballot)}
    if not ballots:
        first = failed[vote.members[0]]
        message = f"vote: all {len(failed)} members failed, the first with: {first}"
        raise type(first)(message, retry_after=first.retry_after, param=first.param)
    reply, winner = counted(ballots, failed)
    asked_logprobs = asked.logprobs if isinstance(asked, ChatRequest) else asked.logprobs is not None
    if not asked_logprobs:
        reply["choices"] = [{**c, "logprobs": None} for c in reply["choices"]]
    return {**reply, "model": asked.model}, winner.revision


def check(asked: ChatRequest | TextRequest, vote: Vote, namespace: str) -> None:
    """Raises BadRequest for what a vote cannot be about."""
    if asked.stream:
        raise BadRequest("stream: expected false with vote: the winner is known when all have answered", param="stream")
    if (asked.n or 1) > 1 or asked.prompts > 1:
        raise BadRequest("n: expected one prompt and n of 1 with vote", param="n")
    if isinstance(asked, ChatRequest) and asked.tools:
        raise BadRequest("tools: expected none with vote: answers are compared as texts", param="tools")
    population = asked.model.removeprefix(f"{namespace}/")
    if asked.model not in vote.members and not all(_within(m, population, namespace) for m in vote.members):
        raise BadRequest(
            f"model: expected one of vote.members, or the population of them all, found {asked.model!r}", param="model"
        )


def _within(member: str, population: str, namespace: str) -> bool:
    try:
        return parse_model(member, namespace).population == population
    except InvalidRequest:
        return False


def counted(ballots: Mapping[str, Ballot], failed: Mapping[str, ProtocolError]) -> tuple[dict[str, Any], Ballot]:
    """The winner's reply with the count in it, and the winner."""
    sides = majority([b.answer for b in ballots.values()])
    winner = ballots[sides[0].surest.member]
    vote = {
        "winner": winner.answer.member,
        "split": [{"text": s.text, "votes": len(s.members), "members": list(s.members)} for s in sides],
        "revisions": {m: b.revision for m, b in ballots.items()},
        "failed": {m: str(e) for m, e in failed.items()},
    }
    return {**winner.reply, "allele": {"vote": vote}}, winner


def _answer(member: str, choice: Mapping[str, Any]) -> Answer:
    """Out of a choice of either kind. Raises Unavailable for one that the engine gave up."""
    if choice["finish_reason"] == "abort":
        raise Unavailable(f"{member}: the engine aborted the answer")
    logprobs = choice["logprobs"] or {}
    if "message" in choice:
        tokens = [t["logprob"] for t in logprobs.get("content") or ()]
        return Answer(member, choice["message"]["content"] or "", _mean(tokens))
    return Answer(member, choice["text"], _mean(logprobs.get("token_logprobs") or ()))


def _mean(logprobs: Sequence[float | None]) -> float:
    known = [p for p in logprobs if p is not None]
    return math.fsum(known) / len(known) if known else -math.inf
