"""Many members in one pass give what Hugging Face, PEFT and torch's AdamW give for each of them alone."""

from __future__ import annotations

import pathlib

import pytest
import torch

from allele.protocol import commands as c
from allele_trainer.model.build import build
from tests.trainer.random_base import write_base
from tests.trainer.trainer_parts import ALL, Rig, adapter, examples, start
from tests.trainer.twin import PeftTwin

SHAPES = {
    "grouped": {},
    "odd sizes": {"vocab_size": 53, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "head_dim": 12},
    "experts": {
        "model": "qwen3_moe",
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "tied, one group": {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1},
}
RATE = 1e-4


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_five_grpo_steps_equal_peft_for_every_member(sizes: dict[str, object], tmp_path: pathlib.Path) -> None:
    base = write_base(tmp_path / "base", **sizes)
    rig = Rig(build(base), tmp_path / "store", slots=8, max_tokens=120)  # several micro-batches per command
    specs = {
        "standard": adapter(rank=8, alpha=16),
        "other-alpha": adapter(rank=8, alpha=4),
        "stabilised": adapter(rank=8, alpha=16, scaling="RankStabilised"),
        "rank-four": adapter(rank=4, alpha=8),
        "attention-only": adapter(rank=4, alpha=8, targets=("q_proj", "v_proj")),
        "up-only": adapter(rank=2, alpha=8, targets=("up_proj", "o_proj")),
    }
    rules = {m: c.OptimizerSpec(clip=0.05 if i % 2 else 100.0, weight_decay=0.1 * (i % 3)) for i, m in enumerate(specs)}
    rates = {m: RATE * (i % 4 + 1) for i, m in enumerate(specs)}
    weights = {m: rig.random_weights(m, s, seed=i) for i, (m, s) in enumerate(specs.items())}
    rig.reset([start(m, s, weights=weights[m], optimizer=rules[m]) for m, s in specs.items()])
    vocab = rig.model.config.vocab
    steps = [examples(specs, each=5, vocab=vocab, seed=s) for s in range(5)]

    norms: dict[str, list[float]] = {m: [] for m in specs}
    rig.admit(*specs)
    for found in steps:
        rig.forward_backward(found)
        for member, update in rig.optim_step(rates).items():
            norms[member].append(update.grad_norm)

    for member, spec in specs.items():
        twin = PeftTwin(base, rig.shape(spec), rig.store.read(weights[member]), spec, tmp_path / member)
        mine = [[e for e in found if e.member == member] for found in steps]
        theirs = twin.train(mine, rate=rates[member], rule=rules[member])
        assert norms[member] == pytest.approx(theirs, rel=2e-5)
        gap = (rig.row(member).weights - twin.row()).abs()
        # Adam divides a gradient by its own size: where it is almost zero, rounding decides an element's step.
        assert gap.quantile(0.999) < 3e-7, f"{member}: weights differ by {gap.quantile(0.999)}"
        assert gap.max() < rates[member], f"{member}: weights differ by {gap.max()}, more than a step"
        assert rig.row(member).step == 5


def test_gradients_of_several_commands_add_up(rig: type[Rig]) -> None:
    trainer = rig(slots=4)
    spec = adapter()
    trainer.reset([start("m", spec, weights=trainer.random_weights("m", spec, seed=1))])
    found = examples(["m"], each=4, vocab=96)
    trainer.admit("m")
    table = trainer.trainer._runs["run"].tables["m"]
    parts = []
    for e in found[:2]:
        trainer.forward_backward([e])
        parts.append(table.bank.gradient(0).clone())
    trainer.reset([start("m", spec, weights=trainer.random_weights("m", spec, seed=1))])
    trainer.admit("m")
    trainer.forward_backward([found[1]])
    torch.testing.assert_close(parts[1] - parts[0], table.bank.gradient(0), rtol=1e-4, atol=1e-6)


def test_members_start_from_their_seed_as_peft_does(rig: type[Rig]) -> None:
    trainer = rig(slots=4)
    spec = adapter(rank=8, targets=ALL)
    trainer.reset([start("a", spec, seed=5), start("b", spec, seed=6), start("c", spec, seed=5)])
    trainer.admit("b", "c", "a")
    rows = {m: trainer.row(m).weights for m in "abc"}
    assert torch.equal(rows["a"], rows["c"]) and not torch.equal(rows["a"], rows["b"])
    for tensor in trainer.shape(spec).tensors:
        values = rows["a"][tensor.offset : tensor.offset + tensor.numel]
        bound = 0.0 if "lora_B" in tensor.name else tensor.shape[1] ** -0.5
        assert values.abs().max() <= bound
        assert bound == 0 or values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
