"""Our trainer as a driver meets it, without the socket: bodies in, replies out, through the executor's own thread."""

from __future__ import annotations

import collections
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence

from pydantic import BaseModel

from allele.protocol import commands as c
from allele.protocol import samples
from allele.protocol.losses import PolicyLoss
from allele.store import PopulationStore
from allele_trainer.bank.host import free_memory
from allele_trainer.model.build import BaseModel as FrozenModel
from allele_trainer.server.capacity import waves_of
from allele_trainer.server.executor import Executor
from allele_trainer.server.metrics import Metrics
from allele_trainer.server.session import Sessions
from allele_trainer.server.store import RunStore
from allele_trainer.server.trainer import Limits, Trainer
from bench.trainer.workload import ALPHA, CLIP, CLIP_HIGH, CLIP_LOW, RANK, RATE, TARGETS, Workload

MAX_TOKENS = 4096


class Ours:
    """A step: admit, forward_backward and optim_step of all members."""

    name = "allele"
    scale = 1.0

    def __init__(
        self,
        model: FrozenModel,
        work: Workload,
        *,
        store: pathlib.Path,
        slots: int | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        """`slots`: as many as members, or fewer; then they are stepped in waves."""
        found = PopulationStore.open(f"file://{store}", namespace="bench", population="members")
        held = slots or work.members
        wave = waves_of(held, model.device) if held < work.members else held
        limits = Limits(slots=held, wave=wave, max_rank=RANK, max_tokens=max_tokens, host_memory=free_memory() // 2)
        self.trainer = Trainer(model, open_store=lambda _namespace, _name: RunStore(found), limits=limits)
        self._executor = Executor(
            self.trainer, sessions=Sessions("bench"), base_digest="sha256:bench", metrics=Metrics()
        )
        self._executor.start()
        self._seq = itertools.count(1)
        self._members = [f"m{i}" for i in range(work.members)]
        self._waves = [self._members[i : i + wave] for i in range(0, work.members, wave)]
        self._columns = [_columns(work, some, first=i * wave) for i, some in enumerate(self._waves)]
        self.seconds: collections.Counter[str] = collections.Counter()
        """Wall time so far, by command."""
        self.mode = ""
        self._reset()

    def ready(self) -> Callable[[], None]:
        """A step whose bodies a driver has encoded, as the rivals' samples are tensors already."""
        bodies: list[tuple[str, bytes]] = []
        for i, (wave, columns) in enumerate(zip(self._waves, self._columns, strict=True)):
            after = tuple(self._waves[i + 1]) if i + 1 < len(self._waves) else ()
            bodies.append(("admit", _json(c.Admit(header=self._header(), members=tuple(wave), next=after))))
            loss = PolicyLoss(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
            command = c.ForwardBackward(header=self._header(), losses=(loss,))
            bodies.append(("forward_backward", samples.encode(command, samples.TRAIN, columns)))
            rates = dict.fromkeys(wave, RATE)
            bodies.append(("optim_step", _json(c.OptimStep(header=self._header(), learning_rates=rates))))
        return functools.partial(self._step, bodies)

    def step(self) -> None:
        self.ready()()

    def _step(self, bodies: Sequence[tuple[str, bytes]]) -> None:
        for name, body in bodies:
            reply = self._submit(name, body)
            if name == "forward_backward":
                self.mode = c.ForwardBackwardDone.model_validate_json(reply).mode

    def export(self) -> None:
        """All members, as a driver publishes a step."""
        for wave in self._waves:
            self._submit("export", _json(c.Export(header=self._header(), members=tuple(wave))))

    def close(self) -> None:
        self._executor.stop()

    def _reset(self) -> None:
        adapter = c.AdapterSpec(rank=RANK, alpha=ALPHA, targets=TARGETS)
        rule = c.OptimizerSpec(clip=CLIP)
        starts = tuple(
            c.MemberStart(member=m, adapter=adapter, optimizer=rule, seed=i) for i, m in enumerate(self._members)
        )
        reset = c.Reset(run="run", epoch=1, namespace="bench", population="members", members=starts)
        self._submit("reset", _json(reset))

    def _header(self) -> c.Header:
        return c.Header(run="run", epoch=1, incarnation="bench", seq=next(self._seq))

    def _submit(self, name: str, body: bytes) -> bytes:
        began = time.perf_counter()
        reply = self._executor.submit(name, body).result()
        self.seconds[name] += time.perf_counter() - began
        return reply


def _json(command: BaseModel) -> bytes:
    return command.model_dump_json().encode()


def _columns(work: Workload, members: list[str], *, first: int) -> dict[str, list[object]]:
    ids, old, advantages = work.ids().tolist(), work.logprobs().tolist(), work.advantages().tolist()
    at = [(first + i, j) for i in range(len(members)) for j in range(work.tokens // work.length)]
    return {
        "member": [members[i - first] for i, _ in at],
        "loss": [0] * len(at),
        "prompt": [ids[i][j][: work.prompt] for i, j in at],
        "completion": [ids[i][j][work.prompt :] for i, j in at],
        "logprobs": [old[i][j] for i, j in at],
        "advantage": [advantages[i][j] for i, j in at],
    }
