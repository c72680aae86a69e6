"""What a trainer tells Prometheus; never a label per member or run."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.commands = Counter(
            "allele_trainer_commands",
            "Commands answered, by outcome (ok or the error's code).",
            ["command", "outcome"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "allele_trainer_command_seconds",
            "Seconds a command ran, without its time in the queue.",
            ["command"],
            buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300),
            registry=self.registry,
        )
        self.tokens = Counter("allele_trainer_tokens", "Completion tokens trained on.", registry=self.registry)
        self.skipped = Counter(
            "allele_trainer_skipped_steps", "Member steps skipped: gradient not finite.", registry=self.registry
        )
        self.waiting = Gauge(
            "allele_trainer_waiting_commands", "Commands received and not yet answered.", registry=self.registry
        )
        self.slots = Gauge("allele_trainer_slots", "Bank slots of each adapter shape.", registry=self.registry)
        self.used = Gauge(
            "allele_trainer_slots_used", "Slots that hold an adapter, all shapes together.", registry=self.registry
        )
        self.runs = Gauge("allele_trainer_runs", "Runs that have reset this incarnation.", registry=self.registry)
