"""Many adapters over few slots while their revisions change: traffic, a publisher, and the truth about every answer."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import http.client
import random
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from allele.protocol.errors import Overloaded, Unavailable
from allele.store.errors import StoreUnavailable
from tests.rollout.rollout_parts import ALPHA, BASE, SHAPE, Service, StoredPopulation, random_adapter

PROMPT = (13, 4, 6, 3, 5, 2)
TEXT = "kbdac="
TOKENS = 8
CLOSE = 1e-4
"""Largest difference of logprobs between the engine and the reference, both in float32."""
LAG = 3.0
"""Seconds after which a gateway must serve what was exposed."""
RETURN = 10.0
"""Seconds after an outage in which it may still wait to ask again, and is not held to that."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """An answer, from whichever port."""

    member: str
    revision: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Truth:
    """Logprobs of any adapter by Hugging Face, its product added to the weights."""

    def __init__(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
        self._base = dict(self._model.named_parameters())

    @torch.no_grad()
    def faults(self, packed: bytes, answers: Sequence[Seen]) -> list[str]:
        """What is wrong with greedy answers of one adapter."""
        tensors = load(packed)
        weights = dict(self._base)
        for name, a in tensors.items():
            if ".lora_A." in name:
                target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                b = tensors[name.replace(".lora_A.", ".lora_B.")]
                weights[target] = self._base[target] + ALPHA / SHAPE.rank * b @ a
        found = []
        for answer in answers:
            ids = torch.tensor([PROMPT + answer.ids])
            logprobs = torch.log_softmax(functional_call(self._model, weights, (ids,)).logits[0].float(), -1)
            at = logprobs[len(PROMPT) - 1 : -1]
            own = at.gather(1, ids[0, len(PROMPT) :, None])[:, 0]
            gap = float((own - torch.tensor(answer.logprobs)).abs().max())
            short = float((at.max(-1).values - own).max())
            if gap > CLOSE or short > CLOSE:
                found.append(f"{answer}: logprobs differ by {gap:g}, and {short:g} below the greedy choice")
        return found


class Churn:
    """Clients and a publisher of one population; `check` says what was answered wrongly."""

    def __init__(self, service: Service, population: StoredPopulation, *, members: int, seed: int) -> None:
        self._service = service
        self._population = population
        self._seed = seed
        self.members = [f"m{i}" for i in range(members)]
        self._exposed: dict[str, list[tuple[float, int]]] = {}
        """Member → (time after its commit, revision), oldest first."""
        self._answers: dict[object, Seen] = {}
        """One of each kind since the last check: those that differ in the last bits only are the same."""
        self._truth = Truth()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._back = -float("inf")
        """When the store is back; infinite during an outage."""
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._tokens = Tokenizer.from_file(str(BASE / "tokenizer.json"))
        self.publish(self.members)

    def publish(self, members: Sequence[str]) -> None:
        """The next revision of each, exposed, as one commit a revision number."""
        by_revision: dict[int, dict[str, bytes]] = {}
        for m in members:
            revision = self.newest(m) + 1
            by_revision.setdefault(revision, {})[m] = adapter(m, revision)
        for revision, adapters in by_revision.items():
            self._population.commit(adapters, revision=revision, parent=revision - 1 or None, expose=True)
            for m in adapters:
                self._exposed.setdefault(m, []).append((time.monotonic(), revision))

    def newest(self, member: str) -> int:
        history = self._exposed.get(member)
        return history[-1][1] if history else 0

    def start(self, *, clients: int, publish_every: float, publish: int) -> None:
        """`publish`: members that get a new revision every `publish_every` seconds."""
        for i in range(clients):
            self._run(functools.partial(self._client, random.Random(self._seed * 1000 + i)))
        self._run(functools.partial(self._publisher, random.Random(self._seed), publish_every, publish))

    @contextlib.contextmanager
    def without_store(self) -> Iterator[None]:
        """Nothing new can be seen inside the block."""
        self._back = float("inf")
        try:
            yield
        finally:
            self._back = time.monotonic()

    def stop(self) -> None:
        self._stop.set()
        for t in self._threads:
            t.join(300)
            assert not t.is_alive(), "a request hangs"

    def check(self) -> list[str]:
        """What was wrong until now; every answer is compared with the reference of its member and revision."""
        by_adapter: dict[tuple[str, int], list[Seen]] = {}
        answers, self._answers = self._answers, {}
        for seen in answers.values():
            by_adapter.setdefault((seen.member, seen.revision), []).append(seen)
        for (member, revision), some in by_adapter.items():
            self.wrong += self._truth.faults(adapter(member, revision), some)
        return self.wrong

    @property
    def answers(self) -> int:
        return self.outcomes["generate"] + self.outcomes["complete"]

    def _run(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _publisher(self, dice: random.Random, every: float, publish: int) -> None:
        while not self._stop.wait(every):
            try:
                self.publish(dice.sample(self.members, publish))
                self.outcomes["publish"] += 1
            except StoreUnavailable:  # the bytes of a revision follow from its number, so it may be tried again
                self.outcomes["publish failed"] += 1

    def _client(self, dice: random.Random) -> None:
        while not self._stop.is_set():
            try:
                if dice.random() < 0.5:
                    self._generate(dice)
                else:
                    self._complete(dice.choice(self.members))
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError):
                self.outcomes["no answer"] += 1
                time.sleep(0.2)
            except Exception as e:
                self.wrong.append(f"{type(e).__name__}: {e}")
                raise

    def _generate(self, dice: random.Random) -> None:
        chosen = [dice.choice(self.members) for _ in range(dice.randint(1, 6))]
        rows = [(m, max(1, self.newest(m) - dice.randint(0, 1)), PROMPT) for m in chosen]
        status, samples = self._service.try_generate(rows, temperature=0.0, max_tokens=TOKENS)
        if samples is None:
            return self._refused("generate", status)
        for sample, (member, revision, _) in zip(samples, rows, strict=True):
            if sample.error is None:
                self._keep(Seen(member, revision, tuple(sample.completion), tuple(sample.logprobs)))
                self.outcomes["generate"] += 1
            elif not sample.error.startswith((Unavailable.__name__, Overloaded.__name__)):
                # The gateway tails the catalogue, and may not have seen the newest revision.
                if not (f"no revision {revision}" in sample.error and revision == self.newest(member)):
                    self.wrong.append(f"{member}@{revision}: {sample.error}")
            else:
                self.outcomes[f"generate {sample.error.split(':')[0]}"] += 1

    def _complete(self, member: str) -> None:
        begun = time.monotonic()
        answer = self._service.complete(f"styles/{member}", TEXT, max_tokens=TOKENS, logprobs=0)
        if answer.status != 200:
            return self._refused("complete", answer.status)
        revision = int(answer.headers["x-allele-revision"])
        history = self._exposed[member]
        seen = begun - LAG if begun > self._back + RETURN else -float("inf")
        least = max((r for at, r in history if at < seen), default=history[0][1])
        if not least <= revision <= self.newest(member) + 1:  # a commit may be seen before its writer says so
            self.wrong.append(f"{member}: served revision {revision}, exposed were {history} at {begun}")
        found: dict[str, Any] = answer.json["choices"][0]["logprobs"]
        ids = tuple(self._tokens.token_to_id(t) for t in found["tokens"])
        self._keep(Seen(member, revision, ids, tuple(found["token_logprobs"])))
        self.outcomes["complete"] += 1

    def _refused(self, what: str, status: int) -> None:
        self.outcomes[f"{what} {status}"] += 1
        if status not in (429, 503):
            self.wrong.append(f"{what}: status {status}")
        time.sleep(0.1)

    def _keep(self, seen: Seen) -> None:
        rounded = tuple(round(p, 3) for p in seen.logprobs)
        self._answers[seen.member, seen.revision, seen.ids, rounded] = seen


def adapter(member: str, revision: int) -> bytes:
    """The bytes of a revision, by its name alone."""
    return random_adapter(int(member[1:]) * 100_003 + revision)
