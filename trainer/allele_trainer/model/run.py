"""Runs micro-batches through this rank's part of the model: one after the other, or as a pipeline of stages.

Every stage packs the same micro-batches itself; between stages only hidden states travel. What is done with the
probabilities of a micro-batch's tokens happens on the last stage alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from allele_trainer.bank.layout import blocks
from allele_trainer.bank.shard import Shard
from allele_trainer.lora.linear import AdaptedLinear
from allele_trainer.model.batch import PackedBatch
from allele_trainer.model.config import BaseConfig
from allele_trainer.model.distribution import Distribution, distribution
from allele_trainer.model.experts import GroupedExperts
from allele_trainer.model.packed import PackedGPTModel
from allele_trainer.parallel import Ranks

Item = TypeVar("Item")


class Unbound(Exception):
    """An adapter would have tensors that no linear of this rank reads: it would train in part, or not at all."""


@dataclasses.dataclass(frozen=True)
class BaseModel:
    config: BaseConfig
    gpt: PackedGPTModel
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen parameters, and so of what kernels read of an adapter."""
        found: torch.dtype = self.gpt.config.params_dtype
        return found

    @property
    def last_stage(self) -> bool:
        return bool(self.gpt.post_process)

    @functools.cached_property
    def sites(self) -> frozenset[tuple[int, str]]:
        """(layer, linear) of every linear of this rank that takes an adapter."""
        found: set[tuple[int, str]] = set()
        for module in self.gpt.modules():
            if isinstance(module, AdaptedLinear):
                found.add(module.site)
            elif isinstance(module, GroupedExperts):
                found.update(module.sites)
        return frozenset(found)

    def bind(self, shard: Shard) -> None:
        """Raises Unbound unless this rank has a linear for each tensor of its part of the adapter, and a part."""
        wanted = blocks(shard).keys()
        missing = sorted(wanted - self.sites)
        if missing or not wanted:
            raise Unbound(
                f"adapter on {', '.join(shard.shape.targets)}: expected a linear on this rank for each of "
                f"{len(wanted)} (layer, linear), found none for {missing or 'any'}"
            )

    def logprobs(self, batch: PackedBatch, targets: Tensor) -> Tensor:
        """fp32 `[n]` log-probabilities of `targets` under the first n rows; where there is one stage."""
        return self._distribution(self._forward(batch), targets).at(targets)

    def run(
        self,
        items: Sequence[Item],
        *,
        prepare: Callable[[Item], PackedBatch],
        loss: Callable[[Item, PackedBatch, Distribution], Tensor],
        backward: bool,
    ) -> None:
        """Put each item's batch through the model, in order; collective over the ranks of all stages.

        On the last stage `loss` gets the item, its batch and the distribution at each of the batch's n targets; with
        `backward` the gradient of the scalar it gives is added to the rows of the batch's plan, on every stage, as it
        is: nothing is averaged.
        """
        with contextlib.nullcontext() if backward else torch.no_grad():
            if self.ranks.layout.pp == 1:
                for item in items:
                    batch = prepare(item)
                    value = loss(item, batch, self._distribution(self._forward(batch), batch.targets))
                    if backward:
                        value.backward()
            elif items:
                self._pipeline(items, prepare=prepare, loss=loss, backward=backward)

    def _pipeline(
        self,
        items: Sequence[Item],
        *,
        prepare: Callable[[Item], PackedBatch],
        loss: Callable[[Item, PackedBatch, Distribution], Tensor],
        backward: bool,
    ) -> None:
        """Megatron's 1F1B, which holds at most as many micro-batches in flight as there are stages."""

        def forward_step(queue: Iterator[Item], _model: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Any, ...]]]:
            item = next(queue)
            batch = prepare(item)

            def reduce(output: Tensor) -> tuple[Tensor, Tensor, None]:
                value = loss(item, batch, self._distribution(output, batch.targets))
                # With a token count beside it Megatron leaves the loss alone; with two values it would divide it.
                return value, torch.ones((), dtype=torch.int, device=self.device), None

            return self._forward(batch), reduce

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(items),
            model=self.gpt,
            num_microbatches=len(items),
            seq_length=1,  # lengths vary: stages tell each other
            micro_batch_size=1,
            forward_only=not backward,
        )

    def _forward(self, batch: PackedBatch) -> Tensor:
        """Logits `[R, vocab / tp]` on the last stage, hidden states before."""
        output: Tensor = self.gpt(batch)
        return output

    def _distribution(self, output: Tensor, targets: Tensor) -> Distribution:
        group = parallel_state.get_tensor_model_parallel_group() if self.ranks.layout.tp > 1 else None
        return distribution(output, rows=targets.numel(), vocab=self.config.vocab, group=group)
