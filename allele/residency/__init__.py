"""Which adapters are where: policies of the hot, warm and cold tiers. Pure: decisions in, decisions out."""

from allele.residency.slots import Slots, TierFull

__all__ = ["Slots", "TierFull"]
