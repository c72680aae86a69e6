"""What a gateway counts. Labels are bounded: a route, an outcome class, a tier; never a member."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class GatewayMetrics:
    """One registry for each gateway, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "allele_gateway_requests", "Requests by route and outcome.", ["route", "outcome"], registry=self.registry
        )
        self.seconds = Histogram(
            "allele_gateway_request_seconds",
            "Time of a request, queue included.",
            ["route"],
            registry=self.registry,
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300),
        )
        self.queued = Gauge(
            "allele_gateway_queue_requests", "Requests running or waiting.", ["port"], registry=self.registry
        )
        self.turns = Gauge(
            "allele_gateway_turns", "Engine calls running, or waiting for a slot.", ["state"], registry=self.registry
        )
        self.wait = Histogram(
            "allele_gateway_wait_seconds",
            "Time until an adapter was loaded and its turn had come.",
            registry=self.registry,
            buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60),
        )
        self.reads = Counter(
            "allele_gateway_reads", "Adapters read, by the place that had them.", ["place"], registry=self.registry
        )
        self.read_bytes = Counter(
            "allele_gateway_read_bytes", "Bytes read, by the place that had them.", ["place"], registry=self.registry
        )
        self.bulk = Gauge("allele_gateway_bulk", "1 while adapters are published in bulk.", registry=self.registry)
        self.residency = Counter(
            "allele_gateway_residency_events",
            "Adapters loaded, evicted, or failing to load.",
            ["event"],
            registry=self.registry,
        )
        self.adapters = Gauge(
            "allele_gateway_tier_adapters", "Adapters in each tier.", ["tier"], registry=self.registry
        )
        self.tier_bytes = Gauge("allele_gateway_tier_bytes", "Bytes in each tier.", ["tier"], registry=self.registry)
        self.ready = Gauge("allele_gateway_engine_ready", "1 while the engine answers.", registry=self.registry)
        self.samples = Counter("allele_gateway_samples", "Samples by outcome.", ["outcome"], registry=self.registry)
        self.probes = Counter("allele_gateway_probes", "Probes by verdict.", ["verdict"], registry=self.registry)
        self.peer_adapters = Counter(
            "allele_gateway_peer_adapters",
            "Adapters asked of the trainer: found, missing there, or failed: no answer in time.",
            ["outcome"],
            registry=self.registry,
        )
        self.report_failures = Counter(
            "allele_gateway_report_failures", "Reports that were not taken.", registry=self.registry
        )
        self.tail_failures = Counter(
            "allele_gateway_tail_failures", "Looks at a Delta log that failed, to be repeated.", registry=self.registry
        )
