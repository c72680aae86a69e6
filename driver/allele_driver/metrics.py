"""What a driver counts. Labels are bounded: never a member, never a step."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

STEP = Gauge("allele_run_step_number", "Last committed step")
REWARD = Gauge("allele_run_reward_mean", "Mean reward of the last step")
STAGE_SECONDS = Histogram(
    "allele_run_stage_seconds",
    "Seconds of a step by stage",
    ["stage"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
)
SAMPLES = Counter("allele_run_samples_total", "Samples scored")
DROPPED = Counter("allele_run_dropped_samples_total", "Samples dropped", ["reason"])
SKIPPED = Counter("allele_run_skipped_updates_total", "Updates of a member skipped for a gradient that is not finite")
COMMITTED = Counter("allele_run_committed_revisions_total", "Revisions committed")
EXPOSED = Counter("allele_run_exposed_revisions_total", "Revisions exposed")
VERDICTS = Counter("allele_run_probe_verdicts_total", "Verdicts of probes, all replicas together", ["verdict"])
EXPOSURE_GAP = Gauge("allele_run_exposure_gap", "Largest |served − trained| log-probability of the last probes")
RECOVERIES = Counter("allele_run_recoveries_total", "Resets of the trainer after the first", ["reason"])
RETRIES = Counter("allele_run_retries_total", "Calls repeated after a transient failure", ["role"])
PREFETCH_FAILURES = Counter(
    "allele_run_prefetch_failures_total", "Announcements of the next cohort that a replica did not take"
)
REPORT_FAILURES = Counter("allele_run_report_failures_total", "Progress reports that were not taken")
