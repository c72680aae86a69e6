"""What a trainer tells Prometheus; never a label per member or run."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
        self.packed = Counter(
            "allele_trainer_packed_adapters",
            "Adapters that gateways asked for by digest: found among the last exports, or missing.",
            ["outcome"],
            registry=self.registry,
        )
        self.micro_batches = Counter(
            "allele_trainer_micro_batches",
            "Micro-batches trained, shared by several runs or of one run's own.",
            ["company"],
            registry=self.registry,
        )

    def watch(self, trainer: Trainer, *, runs: Callable[[], int]) -> None:
        """Gauges of what there is: asked when they are read, by another thread than the one that changes it."""

        def gauge(name: str, documentation: str, ask: Callable[[], float]) -> None:
            Gauge(name, documentation, registry=self.registry).set_function(ask)

        gauge("allele_trainer_slots", "Bank slots of each adapter shape.", lambda: trainer.limits.slots)
        gauge(
            "allele_trainer_slots_used",
            "Slots that hold an adapter, all shapes together.",
            lambda: trainer.used,
        )
        gauge("allele_trainer_runs", "Runs that have reset this incarnation.", runs)
        gauge("allele_trainer_bank_bytes", "Device memory of the rows of all banks.", lambda: trainer.bank_bytes)
        gauge("allele_trainer_recent_bytes", "Exports kept for gateways.", lambda: trainer.recent.used)
        gauge("allele_trainer_host_bytes", "Host memory of rows in no slot.", lambda: trainer.host.used)
        moved = Gauge(
            "allele_trainer_rows_moved",
            "Rows since the start that were loaded into slots, written_back from them, left_clean, dropped from host "
            "memory (they can be read again) or spilled from it to the store.",
            ["how"],
            registry=self.registry,
        )
        for how in trainer.moved():
            moved.labels(how).set_function(functools.partial(lambda each: trainer.moved()[each], how))
