"""What a trainer minimises for a member: one specification for each row of a TRAIN batch.

    loss of a member = Σ over its rows, Σ over completion tokens of   weight of the row · value of the token

Weights follow from `mean` and from the member's own rows in the command, never from values, so every data rank can work
them out alone and a member's loss does not depend on who shares its batch. Below, π is the member being trained, π_r
the policy that sampled, as the engine recorded it, and ρ_t = π(y_t) / π_old(y_t).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from allele.protocol.wire import Wire

Level = Literal["Token", "Sequence", "Geometric"]
"""Of a ratio: each token's own; the product over the sequence; the product's |y|-th root."""

Mean = Literal["Token", "Sequence", "Length"]
"""Token: over all tokens of the member. Sequence: over its sequences, of each one's mean over tokens. Length: over its
sequences, of each one's sum over tokens divided by a constant length (Dr. GRPO, arXiv:2503.20783)."""


class Averaged(Wire):
    """How the values of a member's tokens become one number."""

    mean: Mean = "Token"
    length: int | None = Field(None, ge=1)
    """Constant length of mean Length, tokens."""

    @model_validator(mode="after")
    def _length_goes_with_its_mean(self) -> Averaged:
        if (self.mean == "Length") != (self.length is not None):
            raise ValueError(f"length: expected a number with mean Length and none without, found {self.length}")
        return self


class Kl(Wire):
    """Distance to the base (the model with adapters off), from d_t = log π(y_t) − log π_base(y_t).

    Names as in joschu.net/blog/kl-approx.html. K2 (d²/2) and K3 (e^−d + d − 1) are added to each token's loss. K1 (d)
    as a loss has a gradient of mean zero; it is taken from the reward instead: see `PolicyLoss.whiten`.
    """

    coefficient: float = Field(ge=0)
    estimator: Literal["K1", "K2", "K3"] = "K3"


class Correction(Wire):
    """For samples of a policy other than the one trained: from w = π(y) / π_r(y), without gradient, at some level.

    TIS (fengyao.notion.site/off-policy-rl): weight min(w, high), not under `low` if that is given. MIS
    (arXiv:2510.26788): weight w, 0 outside [low, high]. IcePop (arXiv:2510.18855): MIS with both bounds
    given. Rejection: weight 1, 0 outside [low, high]. With `veto`, a sequence with a token whose w is below it has
    weight 0. Tokens without weight stay in the denominator of the mean.
    """

    kind: Literal["TIS", "MIS", "IcePop", "Rejection"]
    level: Level = "Token"
    low: float | None = Field(None, ge=0)
    high: float = Field(gt=0)
    veto: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Correction:
        if self.low is not None and self.low >= self.high:
            raise ValueError(f"low: expected less than high ({self.high}), found {self.low}")
        if self.kind == "IcePop" and self.low is None:
            raise ValueError("low: expected a number with IcePop, whose band has two bounds, found none")
        return self


class PolicyLoss(Averaged):
    """Policy gradients from advantages.

    Clip: −min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A) (PPO, arXiv:1707.06347; two bounds: DAPO, arXiv:2503.14476).
    With ratio Geometric it is GSPO (arXiv:2507.18071), with Sequence TRL's RLOO.
    CISPO (arXiv:2506.13585): −sg(min(ρ, 1 + clip_high))·A·log π; no token loses its gradient.
    """

    kind: Literal["Clip", "CISPO"] = "Clip"
    ratio: Level = "Token"
    against: Literal["Rollout", "Trainer"] = "Rollout"
    """π_old. Rollout: π_r. Trainer: π itself as it stands before the step, so that ρ is 1 and only its gradient counts;
    a `correction` then weighs π / π_r apart from the clip (decoupled PPO, arXiv:2110.00641)."""
    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.28, gt=0)
    whiten: bool = False
    """The advantage column holds rewards: token t's is R − β·Σ_{i ≥ t} log π_r(y_i)/π_base(y_i) with a `kl` of K1, R
    otherwise; then mean 0 and deviation 1 over the member's tokens (REINFORCE++, arXiv:2501.03262)."""
    correction: Correction | None = None
    kl: Kl | None = None

    @model_validator(mode="after")
    def _parts_go_together(self) -> PolicyLoss:
        if self.kl is not None and self.kl.estimator == "K1" and not self.whiten:
            raise ValueError("kl.estimator: K1 is taken from rewards, so expected with whiten; K2 and K3 go with any")
        if self.whiten and self.ratio != "Token":
            raise ValueError(
                f"ratio: expected Token with whiten, whose advantages are each token's, found {self.ratio}"
            )
        if self.kind == "CISPO" and self.ratio != "Token":
            raise ValueError(f"ratio: expected Token with CISPO, found {self.ratio}")
        if self.correction is not None and self.correction.kind == "TIS" and self.against == "Rollout":
            raise ValueError("against: expected Trainer with TIS; against the rollout's policy the ratio is the weight")
        return self


class SupervisedLoss(Averaged):
    """−log π(y_t): the prompt carries no loss."""

    kind: Literal["SFT"] = "SFT"


class PreferenceLoss(Wire):
    """DPO (arXiv:2305.18290): −log σ(β·(d(chosen) − d(rejected))), d = log π(y)/π_ref(y), mean over pairs.

    π_ref is the base, or what the reference column says.
    """

    kind: Literal["DPO"] = "DPO"
    beta: float = Field(0.1, gt=0)


class DistillationLoss(Averaged):
    """Divergence of π from a teacher's distribution at each token (arXiv:2306.13649).

    Forward: KL(teacher ‖ π). Reverse: KL(π ‖ teacher). Over the teacher's `top_k` most likely tokens with all others as
    one more event: never more than the divergence over the whole vocabulary, and equal to it when top_k covers that.
    """

    kind: Literal["Distillation"] = "Distillation"
    divergence: Literal["Forward", "Reverse"] = "Reverse"
    teacher: Literal["Base", "Given"] = "Base"
    """Base: the model with adapters off, under the row's own teacher prompt if it has one (context distillation,
    arXiv:2209.15189). Given: by the teacher columns."""
    top_k: int = Field(64, ge=1, le=4096)


LossSpec = Annotated[
    PolicyLoss | SupervisedLoss | PreferenceLoss | DistillationLoss,
    Field(discriminator="kind"),
]


class MemberLoss(Wire):
    """What one command found for a member. Means are over its completion tokens; None where the loss has no such thing.

    Probabilities are the trainer's, of the member as it stood.
    """

    tokens: int
    loss: float
    entropy: float
    """Mean entropy of π, nats."""
    ratio_mean: float | None = None
    clip_fraction: float | None = None
    logprob_gap: float | None = None
    """max |log π − log π_r| over the tokens: engine against trainer, when the policies are equal."""
    rejected_fraction: float | None = None
    """Tokens whose correction is 0."""
    kl: float | None = None
    """Mean of the estimator of `kl`; of the divergence, in distillation."""
    accuracy: float | None = None
    """Pairs whose chosen answer has the greater implicit reward."""
