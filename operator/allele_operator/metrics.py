"""The operator's own metrics. Labels are bounded: kinds, verbs, codes, results, never a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from allele_operator.cluster.transport import Request

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """One registry per operator, so that two in one process (tests) do not meet."""

    def __init__(self, *, version: str) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._api = Counter(
            "allele_operator_api_requests", "Requests to the API server.", ["verb", "kind", "code"], registry=r
        )
        self._writes = Counter("allele_operator_api_writes", "Requests that changed something.", ["kind"], registry=r)
        self._api_seconds = Histogram(
            "allele_operator_api_request_seconds", "Duration of requests.", ["verb"], buckets=_SECONDS, registry=r
        )
        self._reconciles = Counter(
            "allele_operator_reconciles", "Reconciles by result.", ["kind", "result"], registry=r
        )
        self._reconcile_seconds = Histogram(
            "allele_operator_reconcile_seconds", "Duration of reconciles.", ["kind"], buckets=_SECONDS, registry=r
        )
        self._watch = Counter("allele_operator_watch_events", "Events received.", ["kind"], registry=r)
        self._reports = Counter("allele_operator_progress_reports", "Reports of drivers.", ["result"], registry=r)
        self._lost = Counter("allele_operator_events_lost", "Kubernetes events not written.", registry=r)
        self.leader = Gauge("allele_operator_leader", "1 while this process leads.", registry=r)
        build = Gauge("allele_operator_build_info", "Version in a label.", ["version"], registry=r)
        build.labels(version).set(1)

    def request(self, request: Request, *, code: int, seconds: float) -> None:
        self._api.labels(request.method, request.kind, str(code)).inc()
        self._api_seconds.labels(request.method).observe(seconds)
        if request.writes and 200 <= code < 300:
            self._writes.labels(request.kind).inc()

    def reconciled(self, kind: str, *, result: str, seconds: float) -> None:
        self._reconciles.labels(kind, result).inc()
        self._reconcile_seconds.labels(kind).observe(seconds)

    def watched(self, kind: str) -> None:
        self._watch.labels(kind).inc()

    def reported(self, result: str) -> None:
        self._reports.labels(result).inc()

    def event_lost(self) -> None:
        self._lost.inc()

    def follow(self, read: Callable[[], Mapping[str, float]], objects: Callable[[], Mapping[str, int]]) -> None:
        """Adds gauges that are read at each scrape: `allele_operator_<name>` and objects by kind."""
        self.registry.register(_Live(read, objects))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Live(Collector):
    def __init__(self, read: Callable[[], Mapping[str, float]], objects: Callable[[], Mapping[str, int]]) -> None:
        self._read = read
        self._objects = objects

    def collect(self) -> list[GaugeMetricFamily]:
        families = []
        for name, value in self._read().items():
            family = GaugeMetricFamily(f"allele_operator_{name}", name.replace("_", " ").capitalize() + ".")
            family.add_metric([], value)
            families.append(family)
        objects = GaugeMetricFamily("allele_operator_objects", "Objects known, by kind.", labels=["kind"])
        for kind, count in self._objects().items():
            objects.add_metric([kind], count)
        return [*families, objects]
