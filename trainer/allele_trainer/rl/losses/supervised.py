"""Supervised fine-tuning and preferences: losses without a reward."""

from __future__ import annotations

from allele.protocol.losses import PreferenceLoss, SupervisedLoss
from allele_trainer.rl.losses.tokens import Terms, Tokens, given, softplus


def supervised(tokens: Tokens, _spec: SupervisedLoss) -> Terms:
    """−log π(y_t)."""
    return Terms(-tokens.logprobs)


def preference(tokens: Tokens, spec: PreferenceLoss) -> Terms:
    """DPO over sequences 0 and 1, 2 and 3, …: of each two the first is the chosen one.

    Both sequences of a pair carry its loss on each of their tokens: their mean over sequences is the mean over pairs.
    """
    sequences = tokens.sequences
    rewards = spec.beta * sequences.sums(tokens.logprobs - given(tokens.reference, "reference logprobs"))
    margin = rewards[0::2] - rewards[1::2]
    loss = softplus(-margin)
    ranked = (margin > 0).detach().to(loss.dtype)
    return Terms(
        sequences.spread(loss.repeat_interleave(2)),
        ranked=sequences.spread(ranked.repeat_interleave(2)),
    )
