"""How rewards, answers or a teacher become gradients: the algorithm of a part of a run, and which field it takes.

One table says what each algorithm takes; the CEL rules that the API server applies and `unfit`, which drivers apply to
what a member overrides, both come from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from allele.api.schema import Model, cel, schema

Name = Literal[
    "GRPO",
    "DrGRPO",
    "DAPO",
    "GSPO",
    "CISPO",
    "RLOO",
    "REINFORCE++",
    "REINFORCE++Baseline",
    "SFT",
    "DPO",
    "Distillation",
]
Mean = Literal["Token", "Sequence", "Length"]
Level = Literal["Token", "Sequence", "Geometric"]


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What an algorithm is where the spec says nothing."""

    group_size: int = 8
    smallest_group: int = 2
    """2 where the samples of a prompt are compared with each other."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    mean: Mean = "Token"
    ratio: Level = "Token"
    refills: int = 0
    overlong: bool = False
    kl_estimator: Literal["K1", "K2", "K3"] = "K3"


DEFAULTS: Mapping[str, Defaults] = {
    "GRPO": Defaults(clip_high=0.28),
    "DrGRPO": Defaults(mean="Length"),
    "DAPO": Defaults(clip_high=0.28, refills=3, overlong=True),
    "GSPO": Defaults(clip_low=3e-4, clip_high=4e-4, mean="Sequence", ratio="Geometric"),
    "CISPO": Defaults(clip_high=4.0),
    "RLOO": Defaults(mean="Sequence", ratio="Sequence"),
    "REINFORCE++": Defaults(smallest_group=1, kl_estimator="K1"),
    "REINFORCE++Baseline": Defaults(kl_estimator="K2"),
    "SFT": Defaults(group_size=1, smallest_group=1),
    "DPO": Defaults(group_size=1, smallest_group=1, mean="Sequence"),
    "Distillation": Defaults(group_size=1, smallest_group=1),
}

GROUPED = ("GRPO", "DrGRPO", "DAPO", "GSPO", "CISPO", "RLOO")
"""Advantages compare the samples of a prompt, so a prompt whose samples are all alike teaches nothing."""
REWARDED = (*GROUPED, "REINFORCE++", "REINFORCE++Baseline")
COMPARED = tuple(name for name, d in DEFAULTS.items() if d.smallest_group == 2)

TAKES: Mapping[str, tuple[str, ...]] = {
    "groupSize": (*REWARDED, "Distillation"),
    "clipLow": tuple(n for n in REWARDED if n != "CISPO"),
    "clipHigh": REWARDED,
    "mean": tuple(n for n in (*REWARDED, "SFT", "Distillation") if DEFAULTS[n].ratio == "Token"),
    "oldPolicy": REWARDED,
    "correction": REWARDED,
    "kl": REWARDED,
    "refills": GROUPED,
    "overlong": REWARDED,
    "beta": ("DPO",),
    "divergence": ("Distillation",),
    "teacher": ("Distillation",),
    "topK": ("Distillation",),
}
"""Field → the algorithms that it goes with; fields that are not here go with all."""

TOP_K = 64
"""Of a teacher's tokens, unless the spec says otherwise."""

BOUNDS: Mapping[str, tuple[float | None, float]] = {
    "TIS": (None, 2.0),
    "MIS": (None, 2.0),
    "IcePop": (0.5, 5.0),
    "Rejection": (0.5, 2.0),
}
"""Kind of correction → its default low and high."""

_IN_ORDER = "low (0.5 with IcePop and Rejection if it is not given) must be less than high"


class Correction(Model):
    model_config = ConfigDict(
        json_schema_extra=schema(
            cel(
                "!has(self.high) || self.high > (has(self.low) ? self.low : self.kind in "
                f"{sorted(k for k, (low, _) in BOUNDS.items() if low)} ? 0.5 : 0.0)",
                _IN_ORDER,
                path=".high",
                reason="FieldValueInvalid",
            ),
        )
    )
    kind: Literal["TIS", "MIS", "IcePop", "Rejection"] = Field(
        description="What is done with w, the trainer's probability over the engine's. TIS: weight min(w, high) "
        "(fengyao.notion.site/off-policy-rl). MIS: weight w, 0 outside low and high (arXiv:2510.26788). IcePop: the "
        "same with a band of two bounds (arXiv:2510.18855). Rejection: weight 1, 0 outside."
    )
    level: Level = Field(
        "Token",
        description="Of w: each token's; the product over the sequence; the product's root, one per token (Geometric).",
    )
    low: float | None = Field(
        None, description="Lower bound of w. Default: IcePop and Rejection 0.5, others none.", ge=0, le=1
    )
    high: float | None = Field(None, description="Upper bound of w. Default: IcePop 5, others 2.", gt=0, le=1e6)
    veto: float | None = Field(
        None,
        description="A sequence with a token whose w is below this is left out. Absent: none is.",
        gt=0,
        lt=1,
    )

    @property
    def bounds(self) -> tuple[float | None, float]:
        """Low and high, those of the kind where none are given."""
        low, high = BOUNDS[self.kind]
        return (low if self.low is None else self.low, high if self.high is None else self.high)


class Kl(Model):
    coefficient: float = Field(description="Factor of the distance.", gt=0, le=100)
    estimator: Literal["K1", "K2", "K3"] | None = Field(
        None,
        description="How it is estimated (joschu.net/blog/kl-approx.html). K2 and K3 are added to each token's loss; "
        "K1 is taken from the reward, token by token, and goes with REINFORCE++ only. Default: REINFORCE++ K1, "
        "REINFORCE++Baseline K2, others K3.",
    )


class Overlong(Model):
    cache_tokens: int | None = Field(
        None,
        description="Last tokens before sampling.maxTokens over which the reward falls linearly. Default: a fifth of "
        "sampling.maxTokens, at least 1, as in the paper.",
        ge=1,
        le=1_000_000,
    )
    penalty: float = Field(1.0, description="What a completion of sampling.maxTokens tokens loses.", gt=0, le=1000)


def _among(names: tuple[str, ...]) -> str:
    return f"self.name in [{', '.join(repr(n) for n in names)}]"


def _words(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_TIS_WANTS_TRAINER = "correction TIS needs oldPolicy Trainer: against the rollout's policy the ratio is the weight"
_K1_IS_A_REWARD = "kl.estimator K1 goes with REINFORCE++ only: use K2 or K3"
_COMPARES = f"groupSize must be at least 2 with {_words(COMPARED)}: they compare the samples of a prompt"

RULES = (
    *(
        cel(f"!has(self.{f}) || {_among(names)}", f"{f} goes with {_words(names)} only", path=f".{f}")
        for f, names in TAKES.items()
    ),
    cel(f"!has(self.groupSize) || self.groupSize >= 2 || !({_among(COMPARED)})", _COMPARES, path=".groupSize"),
    cel(
        "!has(self.correction) || self.correction.kind != 'TIS'"
        " || (has(self.oldPolicy) && self.oldPolicy == 'Trainer')",
        _TIS_WANTS_TRAINER,
    ),
    cel(
        "!has(self.kl) || !has(self.kl.estimator) || self.kl.estimator != 'K1' || self.name == 'REINFORCE++'",
        _K1_IS_A_REWARD,
    ),
)


class Algorithm(Model):
    model_config = ConfigDict(json_schema_extra=schema(*RULES))

    name: Name = Field(
        "GRPO",
        description="GRPO (arXiv:2402.03300): advantages normalised over a prompt's samples, ratio clipped; mean over "
        "tokens. DrGRPO (arXiv:2503.20783): no deviation, constant length. DAPO (arXiv:2503.14476): refills, penalty "
        "for overlong answers. GSPO (arXiv:2507.18071): ratio of whole sequences. CISPO (arXiv:2506.13585): clipped "
        "weight, every token keeps its gradient. RLOO (arXiv:2402.14740): each sample against the mean of the others. "
        "REINFORCE++ (arXiv:2501.03262): rewards normalised over the member's tokens of the step; Baseline: less the "
        "mean of the prompt's samples before. SFT: the environment's answers. DPO (arXiv:2305.18290): its "
        "pairs. Distillation (arXiv:2306.13649): the member's own answers against a teacher's probabilities.",
    )
    prompts_per_step: int = Field(4, description="Prompts, answers or pairs of a member in one step.", ge=1, le=4096)
    group_size: int | None = Field(
        None, description="Samples of each prompt. Default: 8; Distillation 1.", ge=1, le=1024
    )
    clip_low: float | None = Field(
        None,
        description="Lower clip of the ratio: 1 − clipLow. Default: 0.2; GSPO 3e-4, less than engine and trainer "
        "differ by in bfloat16.",
        gt=0,
        lt=1,
    )
    clip_high: float | None = Field(
        None,
        description="Upper clip of the ratio: 1 + clipHigh. Default: 0.2; GRPO and DAPO 0.28 (arXiv:2503.14476), GSPO "
        "4e-4, CISPO 4 (arXiv:2510.13786).",
        gt=0,
        le=100,
    )
    mean: Mean | None = Field(
        None,
        description="What a member's loss is the mean over. Token: its tokens. Sequence: its samples, of each one's "
        "mean over tokens. Length: its samples, of each one's sum over sampling.maxTokens. Default: DrGRPO Length, "
        "GSPO, RLOO and DPO Sequence, others Token.",
    )
    old_policy: Literal["Rollout", "Trainer"] | None = Field(
        None,
        description="What the ratio is taken against. Rollout (default): the engine's logprobs. Trainer: the trainer's "
        "own before the step, so that nothing is clipped and only the gradient counts; add a correction for what the "
        "engine sampled otherwise.",
    )
    correction: Correction | None = Field(
        None, description="For samples of another policy than the one that is trained. Absent: none."
    )
    kl: Kl | None = Field(
        None, description="Distance to the base, the model without the adapter, as part of the loss. Absent: none."
    )
    refills: int | None = Field(
        None,
        description="Times that prompts are drawn again in place of those whose samples all had the same reward "
        "(dynamic sampling). Default: DAPO 3, others 0.",
        ge=0,
        le=64,
    )
    overlong: Overlong | None = Field(
        None, description="Penalty for answers near sampling.maxTokens. Default: DAPO has one, others have none."
    )
    beta: float | None = Field(
        None, description="DPO: how strongly a pair is held to the reference. Default: 0.1.", gt=0, le=100
    )
    divergence: Literal["Forward", "Reverse"] | None = Field(
        None, description="Forward: KL(teacher ‖ member). Reverse (default): KL(member ‖ teacher)."
    )
    teacher: Literal["Base", "Environment"] | None = Field(
        None,
        description="Base (default): the model without the adapter, under the prompt's own teacher prompt where the "
        "environment gives one (context distillation). Environment: the probabilities that its `teach` gives.",
    )
    top_k: int | None = Field(
        None,
        description="Most likely tokens of the teacher that are told apart; the rest counts as one. Default: 64.",
        ge=1,
        le=4096,
    )

    @property
    def defaults(self) -> Defaults:
        return DEFAULTS[self.name]

    @property
    def samples(self) -> int:
        """Of each prompt."""
        return self.defaults.group_size if self.group_size is None else self.group_size


def unfit(algorithm: Algorithm) -> str | None:
    """What is wrong with the fields together, in the words of the API server; None when nothing is."""
    found: dict[str, Any] = algorithm.model_dump(by_alias=True, exclude_none=True)
    for field, names in TAKES.items():
        if field in found and algorithm.name not in names:
            return f"{field} goes with {_words(names)} only"
    if algorithm.samples < algorithm.defaults.smallest_group:
        return _COMPARES
    correction, kl = algorithm.correction, algorithm.kl
    if correction is not None and correction.kind == "TIS" and algorithm.old_policy != "Trainer":
        return _TIS_WANTS_TRAINER
    if kl is not None and kl.estimator == "K1" and algorithm.name != "REINFORCE++":
        return _K1_IS_A_REWARD
    if correction is not None:
        low, high = correction.bounds
        if low is not None and low >= high:
            return f"correction: {_IN_ORDER}"
    return None
