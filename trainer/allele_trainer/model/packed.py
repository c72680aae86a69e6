"""Megatron modules for packed sequences: attention, rotary positions, a layer with its batch, logits of wanted rows.

Megatron's local attention takes one sequence per batch column. Adapters need tokens ordered by slot, and padding every
sequence to the longest wastes most of a batch; so hidden states are `[T, 1, h]` and attention alone sees sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from allele_trainer.lora.plan import routed
from allele_trainer.model.batch import PackedBatch, running


class SequenceParallelRMSNorm(nn.RMSNorm):
    """Megatron's wrapper of torch's norm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - torch does not declare it


class PackedRotary(nn.Module):
    """Rotary table of each token's own position."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._batch: PackedBatch | None = None

    def get_rotary_seq_len(self, _context: Any, _block: Any, _input: Any, _config: Any, batch: PackedBatch) -> int:
        """Megatron asks for the length right before the table; the batch is kept for that call."""
        self._batch = batch
        return batch.longest

    def forward(self, length: int, **_: Any) -> Tensor:
        batch, self._batch = self._batch, None
        assert batch is not None
        table: Tensor = self.inner.get_emb(length).flatten(1)  # type: ignore[operator]
        return table.index_select(0, batch.positions)[:, None, None, :]


class PackedAttention(MegatronModule):
    """Causal attention within each sequence: one kernel per bucket of equal width.

    A sequence's width depends on its own length alone, never on its neighbours, and with it the bits of the result.
    """

    def __init__(self, config: Any, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self._scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedBatch,
        **_: Any,
    ) -> Tensor:
        """query `[T, 1, heads, d]`, key and value `[T, 1, groups, d]` → `[T, 1, heads·d]`."""
        tokens, _one, heads, dim = query.shape
        padded = [F.pad(x.reshape(tokens, -1), (0, 0, 0, 1)) for x in (query, key, value)]
        outputs = []
        for bucket in packed_seq_params.buckets:
            q, k, v = (
                x.index_select(0, bucket.gather).view(-1, bucket.width, x.shape[1] // dim, dim).transpose(1, 2)
                for x in padded
            )
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=self._scale)
            outputs.append(o.transpose(1, 2).reshape(-1, heads * dim))
        outputs.append(query.new_zeros(1, heads * dim))
        return torch.cat(outputs).index_select(0, packed_seq_params.scatter)[:, None, :]


class PackedLayer(TransformerLayer):
    """Enters the micro-batch that it was called with and its plan, also when it is run again for its backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch: PackedBatch = kwargs["packed_seq_params"]
        with running(batch), routed(batch.plan):
            return super().forward(*args, **kwargs)


class PackedGPTModel(GPTModel):
    """Computes logits only of the rows that the batch asks for: prompts and padding cost no vocabulary GEMM."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        if self.post_process:
            self.output_layer.sequence_parallel = False  # wanted rows are taken from the tokens of all tensor ranks

    def _postprocess(self, hidden_states: Tensor, *args: Any, packed_seq_params: PackedBatch, **kwargs: Any) -> Tensor:
        if self.post_process:
            if self.config.sequence_parallel:
                # The head sums the gradients of tensor ranks itself: each takes its own tokens' part of that sum.
                hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
            hidden_states = hidden_states.index_select(0, packed_seq_params.rows)
        return super()._postprocess(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
