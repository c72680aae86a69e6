"""Oracle: one adapter in Hugging Face + PEFT with torch's AdamW and clip, code that shares nothing with ours.

Hugging Face keeps the experts of a layer in one tensor, on which PEFT has no adapter of their own for each; so experts
are written out here as linears, in the names of the files, and their router with them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from allele.format import AdapterShape, export_peft
from allele.protocol import commands as c


class WrittenOutExperts(nn.Module):
    """Qwen3-MoE's block, one expert after the other; `forced` `[T, k]` experts, −1 where the router chooses."""

    forced: torch.Tensor | None = None

    def __init__(self, block: Any, config: Any) -> None:
        super().__init__()
        self.gate, self.config = nn.Parameter(block.gate.weight.detach(), requires_grad=False), config
        self.experts = nn.ModuleList()
        for gate_up, down in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True):
            gate, up = gate_up.detach().chunk(2)
            expert = nn.Module()
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down.detach())):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
                setattr(expert, name, linear)
            self.experts.append(expert)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden[0]
        chances = F.linear(x, self.gate).softmax(-1)
        chosen = chances.topk(self.config.num_experts_per_tok).indices
        if self.forced is not None:
            chosen = torch.where(self.forced < 0, chosen, self.forced)
        weights = chances.gather(1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        rows = []
        for token, experts, shares in zip(x, chosen.tolist(), weights, strict=True):
            parts = []
            for number, share in zip(experts, shares, strict=True):
                e = self.experts[number]
                parts.append(share * e.down_proj(F.silu(e.gate_proj(token)) * e.up_proj(token)))
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)[None]


class PeftTwin:
    def __init__(
        self, base: pathlib.Path, shape: AdapterShape, packed: bytes, spec: c.AdapterSpec, folder: pathlib.Path
    ) -> None:
        export_peft(packed, folder, shape=shape, scale=spec.scale, base_name=str(base))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, attn_implementation="eager"
        )
        self.blocks = []
        if model.config.model_type == "qwen3_moe":
            for layer in model.model.layers:
                layer.mlp = WrittenOutExperts(layer.mlp, model.config)
                self.blocks.append(layer.mlp)
            model.config.model_type = "qwen3"  # or PEFT would look for the one tensor
        self.shape = shape
        self.model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if len(self.parameters) != len(shape.tensors):
            raise AssertionError(f"PEFT bound {len(self.parameters)} of {len(shape.tensors)} tensors")
        self.first: torch.Tensor | None = None
        """exp_avg after the first step: the first gradient, clipped, times 1 − β₁."""

    def logprobs(self, prompt: Sequence[int], completion: Sequence[int], experts: Any = None) -> torch.Tensor:
        """`experts`: `[tokens − 1, layers, k]`, flat, that the rollout chose."""
        ids = torch.tensor([[*prompt, *completion]])
        for layer, block in enumerate(self.blocks):
            block.forced = None
            if experts is not None:
                chosen = torch.tensor(experts).view(ids.shape[1] - 1, len(self.blocks), -1)[:, layer]
                block.forced = F.pad(chosen, (0, 0, 0, 1), value=-1)  # the last token is only a target
        logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]

    def train(self, steps: Sequence[Sequence[Any]], *, rate: float, rule: c.OptimizerSpec) -> list[float]:
        """GRPO steps, written out here on its own; gives the gradient norms."""
        optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=rate,
            betas=(rule.beta1, rule.beta2),
            eps=rule.eps,
            weight_decay=rule.weight_decay,
        )
        norms = []
        for found in steps:
            optimizer.zero_grad()
            total = sum(len(e.completion) for e in found)
            for e in found:
                logprobs = self.logprobs(e.prompt, e.completion, e.experts)
                ratio = (logprobs - torch.tensor(e.logprobs)).exp()
                gain = torch.minimum(ratio * e.advantage, ratio.clamp(0.8, 1.28) * e.advantage)
                if e.experts is not None:  # tokens whose experts are not known do not count
                    known = torch.tensor(e.experts).view(len(e.prompt) + len(e.completion) - 1, -1).amin(1) >= 0
                    gain = gain * known[-len(e.completion) :]
                (-gain.sum() / total).backward()
            for parameter in self.parameters.values():
                if parameter.grad is None:  # an expert without tokens: ours is a row with zeros there, and decays
                    parameter.grad = torch.zeros_like(parameter)
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), rule.clip)))
            optimizer.step()
            if self.first is None:
                self.first = self._row({n: optimizer.state[p]["exp_avg"] for n, p in self.parameters.items()})
        return norms

    def row(self) -> torch.Tensor:
        """Its parameters in the order of the shape."""
        return self._row(self.parameters)

    def _row(self, named: dict[str, Any]) -> torch.Tensor:
        tensors = {n.replace(".default", ""): t.detach().clone() for n, t in named.items()}
        return torch.cat([tensors[t.name].reshape(-1) for t in self.shape.tensors])
