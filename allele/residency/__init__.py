"""Which adapters are where, and which requests run: pure policies. Decisions in, decisions out."""

from allele.residency.schedule import Schedule
from allele.residency.tier import Tier, TierFull

__all__ = ["Schedule", "Tier", "TierFull"]
