"""Mixture-of-experts layers: routing that a rollout may dictate, and experts with adapters.

Megatron's dispatcher moves tokens to the ranks of their experts; the number of each token's adapter goes with it, as a
column of integers through the same exchange. A rank then holds tokens of every data rank in an order of its own, so it
sorts each expert's tokens by adapter and makes a plan per expert.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, permute, sort_chunks_by_idxs
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from allele_trainer.bank.layout import linear_name
from allele_trainer.lora.linear import Adapters, adapted, outputs, with_stacks
from allele_trainer.lora.plan import Part, parts_of
from allele_trainer.model.batch import Carried, current_batch
from allele_trainer.model.packed import swiglu

_PAD = 64
"""Tokens of an expert are padded to a multiple of this on CPU, whose kernels for few rows give other bits."""


class CarriedRouting:
    """Experts of the rollout, from the micro-batch itself.

    In place of Megatron's RouterReplay, which keeps a process-wide queue per layer: that would replay another
    micro-batch's experts as soon as forwards, recomputes and backwards of several interleave.
    """

    def __init__(self, layer: int, *, sequence_parallel: bool) -> None:
        self._layer, self._sequence_parallel = layer, sequence_parallel

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores `[T, experts]` → the values and indices `[T, k]` of each token's experts; weights keep a gradient."""
        values, chosen = default_compute_topk(scores, topk, num_groups, group_topk)
        routing = current_batch().routing
        if routing is None:
            return values, chosen
        wanted = local_tokens(routing[self._layer], sequence_parallel=self._sequence_parallel)
        chosen = torch.where(wanted < 0, chosen, wanted)
        return scores.gather(1, chosen), chosen


class PackedRouter(TopKRouter):
    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        self.router_replay = CarriedRouting(layer_number - 1, sequence_parallel=self.config.sequence_parallel)

    def gating(self, input: Tensor) -> Tensor:
        """Without Transformer Engine, Megatron 0.16 fails in its own gating: the name it calls is not defined."""
        return F.linear(input, self.weight)


class CarryingDispatcher(MoEAlltoAllTokenDispatcher):
    def carry(self, column: Tensor) -> Tensor:
        """`[T]` integers of this rank's tokens → `[n]` of the tokens that `dispatch_postprocess` gave, in its order."""
        found = permute(column[:, None], self.routing_map, num_out_tokens=self.num_out_tokens)[0]
        found = all_to_all(self.ep_group, found, self.output_splits, self.input_splits)
        if self.num_local_experts > 1:
            counts = self.num_global_tokens_per_local_expert.ravel()
            found, _ = sort_chunks_by_idxs(found, counts, self.sort_input_by_local_experts)
        return found[:, 0]


class PackedMoELayer(MoELayer):
    def __init__(self, config: Any) -> None:
        groups = get_default_pg_collection()
        parts = MoESubmodules(experts=GroupedExperts, router=PackedRouter)
        super().__init__(config, parts, pg_collection=groups)
        self.token_dispatcher = CarryingDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=groups
        )

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        self.experts.layer = layer_number - 1

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        batch, dispatcher = current_batch(), self.token_dispatcher
        tokens, counts, weights = dispatcher.dispatch_postprocess(hidden_states, probs)
        carried = batch.carried
        if carried is not None:
            owners = local_tokens(carried.owners, sequence_parallel=self.config.sequence_parallel)
            carried = dataclasses.replace(carried, owners=dispatcher.carry(owners))
        output = self.experts(tokens, counts.tolist(), weights, carried)
        return dispatcher.combine_preprocess(output), None


class GroupedExperts(MegatronModule):
    """The experts of this rank: `fc1` `[E, 2f, h]` holds gate then up of each, `fc2` `[E, h, f]`."""

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any) -> None:
        super().__init__(config=config)
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        ffn, hidden = config.moe_ffn_hidden_size, config.hidden_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_local_experts, *shape, dtype=config.params_dtype, device=device))

        self.fc1, self.fc2 = parameter(2 * ffn, hidden), parameter(hidden, ffn)
        self._first = parallel_state.get_expert_model_parallel_rank() * num_local_experts
        self._outputs = {
            "linear_fc1": outputs("linear_fc1", (ffn, ffn)),
            "linear_fc2": outputs("linear_fc2", (hidden,)),
        }
        self.layer = 0

    @property
    def sites(self) -> list[tuple[int, str]]:
        """(layer, linear) of each expert's linears, all of which take adapters."""
        experts = range(self._first, self._first + self.fc1.shape[0])
        return [(self.layer, linear_name(name, expert)) for expert in experts for name in self._outputs]

    def forward(self, tokens: Tensor, counts: list[int], weights: Tensor, carried: Carried | None) -> Tensor:
        """tokens `[n, h]` ordered by expert, `counts` of them each, weights `[n]` → `[n, h]`."""
        order = padded_order(counts, carried.owners if carried else None, device=tokens.device)
        parts = _parts(carried, counts, order) if carried else []
        x = F.pad(tokens, (0, 0, 0, 1)).index_select(0, order.gather)
        inner = swiglu(self._linear("linear_fc1", self.fc1, x, order, parts))
        y = self._linear("linear_fc2", self.fc2, inner, order, parts)
        return y.index_select(0, order.scatter) * weights[:, None].to(y.dtype)

    def _linear(self, name: str, weight: Tensor, x: Tensor, order: Order, parts: Sequence[tuple[Part, ...]]) -> Tensor:
        if x.is_cuda:
            y: Tensor = F.grouped_mm(x, weight.transpose(1, 2), offs=order.ends)
        else:
            y = torch.cat([F.linear(part, w) for part, w in zip(x.split(order.sizes), weight, strict=True)])
        found = [
            pair
            for expert, mine in enumerate(parts, start=self._first)
            for pair in with_stacks(mine, (self.layer, linear_name(name, expert)))
        ]
        return adapted(x, y, Adapters(found, found, self._outputs[name])) if found else y


@dataclasses.dataclass(frozen=True)
class Order:
    """Tokens of a rank's experts, each expert's ordered by owner and padded.

    `gather` `[N]` indexes tokens (n = a zero row), `scatter` `[n]` says where each token went; `owners` `[N]`, −1
    without adapter; `sizes` and `ends` of the experts.
    """

    gather: Tensor
    scatter: Tensor
    owners: Tensor
    sizes: list[int]
    ends: Tensor


def padded_order(counts: list[int], owners: Tensor | None, *, device: torch.device) -> Order:
    """Order of `[n]` tokens that come expert by expert, `counts` of each; tokens without adapter come last."""
    pad = _PAD if device.type == "cpu" else 1
    sizes = [-(-n // pad) * pad for n in counts]
    begins = torch.tensor([0, *itertools.accumulate(sizes)], device=device)
    firsts = torch.tensor([0, *itertools.accumulate(counts)], device=device)
    total = sum(counts)
    expert = torch.repeat_interleave(
        torch.arange(len(counts), device=device), torch.tensor(counts, device=device), output_size=total
    )
    owners = torch.full((total,), -1, device=device) if owners is None else owners
    last = torch.iinfo(torch.int32).max
    key = expert * (last + 1) + torch.where(owners < 0, last, owners)
    tokens = torch.argsort(key, stable=True)
    places = begins[expert] + torch.arange(total, device=device) - firsts[expert]
    gather, scatter = torch.full((sum(sizes),), total, device=device), torch.empty_like(tokens)
    gather[places] = tokens
    scatter[tokens] = places
    placed = torch.full((sum(sizes),), -1, device=device)
    placed[places] = owners[tokens]
    return Order(gather, scatter, placed, sizes, begins[1:].to(torch.int32))


def _parts(carried: Carried, counts: list[int], order: Order) -> list[tuple[Part, ...]]:
    """Of the tokens of each expert."""
    found, begin = [], 0
    for size, owners, count in zip(order.sizes, order.owners.cpu().split(order.sizes), counts, strict=True):
        mine, tokens = (t.tolist() for t in owners[:count].unique_consecutive(return_counts=True))
        some = [(owner, n) for owner, n in zip(mine, tokens, strict=True) if owner >= 0]
        found.append(parts_of(carried.banks, some, gradients=carried.gradients, begin=begin))
        begin += size
    return found


def local_tokens(column: Tensor, *, sequence_parallel: bool) -> Tensor:
    """Of something per token `[T, …]`, the part of the tokens whose residual this tensor rank has."""
    if not sequence_parallel:
        return column
    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    return column.chunk(size)[rank]
