"""What a trainer tells Prometheus; never a label per member or run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from allele_trainer.server.trainer import Trainer


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
            "Seconds a command ran, without its time in the queue; of shared micro-batches, its part by tokens.",
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
        self.micro_batches = Counter(
            "allele_trainer_micro_batches",
            "Micro-batches trained, shared by several runs or of one run's own.",
            ["company"],
            registry=self.registry,
        )
        self.rows = Gauge(
            "allele_trainer_rows_moved",
            "Rows since the start that were loaded into slots, written_back from them, left_clean, dropped from host "
            "memory (they can be read again) or spilled from it to the store.",
            ["how"],
            registry=self.registry,
        )
        self.bank = Gauge(
            "allele_trainer_bank_bytes", "Device memory of the rows of all banks.", registry=self.registry
        )
        self._moved: dict[str, int] = {}
        self.host = Gauge("allele_trainer_host_bytes", "Host memory of rows in no slot.", registry=self.registry)

    def observe(self, trainer: Trainer, *, runs: int) -> None:
        """Bring the gauges up to date."""
        self.slots.set(trainer.limits.slots)
        self.used.set(trainer.used)
        self.runs.set(runs)
        self.bank.set(trainer.bank_bytes)
        self.host.set(trainer.host.used)
        for how, count in trainer.moved().items():
            if self._moved.get(how) != count:  # seldom: asked after every micro-batch
                self._moved[how] = count
                self.rows.labels(how).set(count)
