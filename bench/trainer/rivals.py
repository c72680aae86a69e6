"""The same step with code that is not ours. Each class times whole steps: forward, backward, clip and AdamW.

PEFT and torch are the installed packages, unmodified. Stacking is how Megatron-Bridge's MultiLoRA does it; that package
cannot be installed without CUDA, so its scheme is written out here over the same Hugging Face model.
"""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from bench.trainer.workload import ALPHA, CLIP, RANK, RATE, TARGETS, Workload, grpo

SAMPLED = 16
"""Members that are really stepped one after the other; the rest take the same time."""
MOST_GROUPS = 1023
"""torch's grouped GEMM on CUDA takes no more."""
MOST_PEFT_ADAPTERS = 256
"""PEFT looks adapters up in dictionaries of modules: more take minutes to make."""


class Contender(Protocol):
    name: str
    scale: float

    def ready(self) -> Callable[[], None]:
        """A step, all but done."""


class Rival(abc.ABC):
    name: str
    scale = 1.0
    """A step is so many times what `step` does."""

    @abc.abstractmethod
    def step(self) -> None: ...

    def ready(self) -> Callable[[], None]:
        return self.step


class Sequential(Rival):
    """(a) N steps one after the other. One adapter and one optimizer stand for all: no cost of changing them."""

    name = "sequential PEFT"

    def __init__(self, base: pathlib.Path, work: Workload) -> None:
        self._work, self._model = work, _peft(base, work)
        self._ids, self._old, self._advantages = (
            t.to(work.device) for t in (work.ids(), work.logprobs(), work.advantages())
        )
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=RATE, weight_decay=0.0)
        self._steps = min(work.members, SAMPLED)
        self.scale = work.members / self._steps

    def step(self) -> None:
        for i in range(self._steps):
            self._member(i)

    def _member(self, i: int) -> None:
        self._optimizer.zero_grad()
        logits = self._model(input_ids=self._ids[i]).logits
        grpo(logits, self._ids[i], self._old[i], self._advantages[i], prompt=self._work.prompt).mean().backward()
        nn.utils.clip_grad_norm_(self._parameters, CLIP)
        self._optimizer.step()


class Swapping(Sequential):
    """(d) One live adapter; weights and both moments of each member are copied in and out around its step."""

    name = "swapping"

    def __init__(self, base: pathlib.Path, work: Workload) -> None:
        super().__init__(base, work)
        super()._member(0)  # makes the optimizer's state
        self._live = [t for p in self._parameters for t in (p.data, *self._moments(p))]
        self._kept = [[t.clone() for t in self._live] for _ in range(self._steps)]

    def _moments(self, p: nn.Parameter) -> tuple[Tensor, Tensor]:
        state = self._optimizer.state[p]
        return state["exp_avg"], state["exp_avg_sq"]

    def _member(self, i: int) -> None:
        torch._foreach_copy_(self._live, self._kept[i])
        super()._member(i)
        torch._foreach_copy_(self._kept[i], self._live)


class Loop(Rival):
    """(b) One batch, PEFT's forward for mixed batches: in every linear a loop over the adapters that are there."""

    name = "per-adapter loop"

    def __init__(self, base: pathlib.Path, work: Workload) -> None:
        if work.members > MOST_PEFT_ADAPTERS:
            raise TooMany
        self._model = _peft(base, work)
        names = ["default", *(f"m{i}" for i in range(1, work.members))]
        for name in names[1:]:
            self._model.add_adapter(name, _config())
        # The forward for mixed batches is refused in training mode; without dropout the modes do not differ.
        self._model.eval()
        parameters: dict[str, list[nn.Parameter]] = {n: [] for n in names}
        for path, p in self._model.named_parameters():
            if ".lora_" in path:
                parameters[path.split(".")[-2]].append(p.requires_grad_(True))
        self._parameters = list(parameters.values())
        self._stepper = PerAdapter(self._parameters)
        sequences = work.tokens // work.length
        self._names = [n for n in names for _ in range(sequences)]
        self._batch = Batch(work)

    def step(self) -> None:
        logits = self._model(input_ids=self._batch.ids, adapter_names=self._names).logits
        self._batch.loss(logits).backward()
        self._stepper.step()


class Stacking(Rival):
    """(c) One batch; every linear stacks the A and B of all adapters at each call, then one grouped GEMM for each."""

    name = "stacking at each call"

    def __init__(self, base: pathlib.Path, work: Workload) -> None:
        if work.device != "cpu" and work.members > MOST_GROUPS:
            raise TooMany
        self._model = _hf(base, work).requires_grad_(False)
        tokens = work.tokens
        ends = torch.arange(tokens, tokens * work.members + 1, tokens, dtype=torch.int32)
        self._offsets = ends.to(work.device)
        stacked = []
        for module in list(self._model.modules()):
            for child, linear in list(module.named_children()):
                if child in TARGETS:
                    stacked.append(_Stacked(linear, work.members, self._offsets))
                    setattr(module, child, stacked[-1])
        per_adapter = [[p for s in stacked for p in (s.a[i], s.b[i])] for i in range(work.members)]
        self._stepper = PerAdapter(per_adapter)
        self._batch = Batch(work)

    def step(self) -> None:
        self._batch.loss(self._model(input_ids=self._batch.ids).logits).backward()
        self._stepper.step()


class TooMany(Exception):
    """The rival cannot hold so many adapters in a time that anyone would wait."""


class Batch:
    """All sequences of all members at once; the loss is the sum of the members' means."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self.ids, self._old, self._advantages = (
            t.flatten(0, 1).to(work.device) for t in (work.ids(), work.logprobs(), work.advantages())
        )

    def loss(self, logits: Tensor) -> Tensor:
        found = grpo(logits, self.ids, self._old, self._advantages, prompt=self._work.prompt)
        return found.unflatten(0, (self._work.members, -1)).mean(dim=1).sum()


class PerAdapter:
    """torch's AdamW and clip_grad_norm_, an optimizer object for each adapter."""

    def __init__(self, parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        self._parameters = parameters
        self._optimizers = [torch.optim.AdamW(ps, lr=RATE, weight_decay=0.0) for ps in parameters]

    def step(self) -> None:
        for parameters, optimizer in zip(self._parameters, self._optimizers, strict=True):
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()


class _Stacked(nn.Module):
    def __init__(self, linear: nn.Linear, members: int, offsets: Tensor) -> None:
        super().__init__()
        self.linear, self._offsets = linear, offsets
        like = linear.weight
        self.a = nn.ParameterList(like.new_empty(RANK, linear.in_features).normal_(std=0.02) for _ in range(members))
        self.b = nn.ParameterList(like.new_zeros(linear.out_features, RANK) for _ in range(members))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h = F.grouped_mm(flat, torch.stack(list(self.a)).transpose(1, 2), offs=self._offsets) * (ALPHA / RANK)
        delta = F.grouped_mm(h, torch.stack(list(self.b)).transpose(1, 2), offs=self._offsets)
        return self.linear(x) + delta.view(*x.shape[:-1], -1)


def _hf(base: pathlib.Path, work: Workload) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=work.dtype).to(work.device)


def _config() -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), lora_dropout=0.0)


def _peft(base: pathlib.Path, work: Workload) -> peft.PeftModel:
    return peft.get_peft_model(_hf(base, work), _config())
