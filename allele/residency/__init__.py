"""Which adapters are where: policies of the hot, warm and cold tiers. Pure: decisions in, decisions out."""

from allele.residency.tier import Tier, TierFull

__all__ = ["Tier", "TierFull"]
