"""Drive one RLRun: sample, score, train, commit, expose, until it is done or told to stop.

All that lasts is in the store, so the driver may die at any time and be started again with the same arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import signal
import sys
from pathlib import Path

import aiohttp
import prometheus_client

from allele.protocol.bundle import RunBundle
from allele.protocol.errors import InvalidRequest, StaleEpoch
from allele.protocol.serving import GatewayStatus
from allele.store import FencedError, PopulationStore, StoreRefused
from allele.store.address import FORMS
from allele_driver import logs, wire
from allele_driver.environments.scoring import EnvironmentFailed
from allele_driver.exposure import gate_of
from allele_driver.loop import record, setup
from allele_driver.loop.announcer import Announcer
from allele_driver.loop.exposer import Exposer
from allele_driver.loop.ledger import Ledger
from allele_driver.loop.probes import with_probes
from allele_driver.loop.rollout import Roller
from allele_driver.loop.run import Equipment, Run, RunFailed
from allele_driver.loop.tally import Tally
from allele_driver.loop.voice import Voice
from allele_driver.members import InvalidInput, parts_of
from allele_driver.patience import Patience, Stopping
from allele_driver.report import Reporter
from allele_driver.sampling import Gateways
from allele_driver.trainer import Trainer

log = logging.getLogger("allele_driver")

DONE = 0
FAILED = 1
INVALID = 2
"""What the user gave cannot be run: starting again does not help."""
FENCED = 4
"""A newer driver owns the run: this one must not come back."""
STOPPED = 143
"""Ended by SIGTERM after the step in flight. Not 0: a Job would take that for the end of the run."""

EXAMPLE = """example:
  python -m allele_driver --run-dir /allele/run --store s3://allele/demo --trainer http://pool-trainer:7070 \\
      --gateways http://pool-rollout:8001 --report http://allele-operator.allele-system.svc:8080 \\
      --report-token-file /allele/token/token

exit codes: 0 done, 1 failed, 2 invalid input, 4 replaced by a newer driver, 143 stopped by SIGTERM"""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="allele_driver", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="folder with run.json and manifests/")
    parser.add_argument("--store", required=True, help=FORMS)
    parser.add_argument("--trainer", required=True, help="URL of the trainer")
    parser.add_argument("--gateways", required=True, help="internal URLs of the gateways, comma-separated")
    parser.add_argument("--report", required=True, help="URL that takes progress at /v1/progress")
    parser.add_argument("--report-token-file", type=Path, help="bearer token for it, read anew for each report")
    parser.add_argument("--metrics-port", type=int, help="port of /metrics; absent: not served")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    logs.configure()
    try:
        bundle = setup.read_bundle(args.run_dir)
        logs.configure(namespace=bundle.namespace, run=bundle.run, population=bundle.population)
        return asyncio.run(drive(args, bundle))
    except InvalidInput as e:
        log.error("%s", e)
        return INVALID
    except Exception:
        log.exception("failed; started again, the run goes on from its last commit")
        return FAILED


async def drive(args: argparse.Namespace, bundle: RunBundle) -> int:
    """The exit code of a run."""
    if args.metrics_port is not None:
        prometheus_client.start_http_server(args.metrics_port)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    tally = Tally(bundle)
    async with wire.session() as session:
        reporter = Reporter(args.report, args.report_token_file, session=session)
        reporter.start()
        try:
            return await _guarded(args, bundle, session=session, reporter=reporter, tally=tally, stopping=stopping)
        except BaseException as e:
            if isinstance(e, asyncio.CancelledError):
                raise
            tally.phase, tally.message = "Failed", str(e)
            reporter.report(tally.progress())
            raise
        finally:
            await reporter.close()


async def _guarded(
    args: argparse.Namespace,
    bundle: RunBundle,
    *,
    session: aiohttp.ClientSession,
    reporter: Reporter,
    tally: Tally,
    stopping: asyncio.Event,
) -> int:
    """Typed endings as exit codes; what is not one of them is raised."""
    try:
        ended = await _drive(args, bundle, session=session, reporter=reporter, tally=tally, stopping=stopping)
    except (FencedError, StaleEpoch) as e:
        log.error("replaced by a newer driver of this run: %s", e)
        return FENCED
    except Stopping as e:
        log.info("stopped: %s", e)
        return STOPPED
    except (InvalidRequest, StoreRefused, EnvironmentFailed) as e:
        raise InvalidInput(str(e)) from e
    except RunFailed as e:
        log.error("%s", e)
        tally.phase, tally.message = "Failed", str(e)
        reporter.report(tally.progress())
        return FAILED
    if not ended:
        log.info("stopped by SIGTERM after step %d", tally.step)
    return DONE if ended else STOPPED


async def _drive(
    args: argparse.Namespace,
    bundle: RunBundle,
    *,
    session: aiohttp.ClientSession,
    reporter: Reporter,
    tally: Tally,
    stopping: asyncio.Event,
) -> bool:
    def waiting(message: str) -> None:
        tally.message = message
        reporter.report(tally.progress())

    patience = Patience(stopping=stopping, rng=random.Random(), on_wait=waiting)
    parts = parts_of(bundle, args.run_dir / "manifests")
    base = await patience.until("store", lambda: asyncio.to_thread(setup.read_base, bundle.base_uri))
    store = PopulationStore.open(args.store, namespace=bundle.namespace, population=bundle.population)
    await patience.until("store", lambda: asyncio.to_thread(setup.claim, store, bundle, base))
    active = await setup.start_parts(parts, base.tokenizer)
    try:
        ledger = await Ledger.open(store, run=bundle.run_uid, patience=patience)
        tally.count(ledger.index.of_run(bundle.run_uid))
        trainer = Trainer(args.trainer, session=session, run=bundle.run_uid, patience=patience)
        gateways = Gateways(
            args.gateways.split(","),
            session=session,
            namespace=bundle.namespace,
            population=bundle.population,
            patience=patience,
        )
        status = await gateways.status()
        check_base(status, bundle)
        roller = Roller(gateways, run=bundle.run_uid, stop=base.tokenizer.stop_token_ids, context=base.context)
        equipment = Equipment(
            trainer=trainer,
            roller=roller,
            ledger=ledger,
            exposer=Exposer(gateways, gate_of(bundle)),
            announcer=Announcer(gateways, run=bundle.run_uid),
            origin=record.Origin(
                bundle=bundle,
                fence=ledger.fence,
                base=base,
                sglang=status.engine_version,
            ),
            voice=Voice(tally, reporter),
            stopping=stopping,
        )
        return await Run(equipment, await with_probes(active, roller, ledger)).run()
    finally:
        await asyncio.gather(*(a.scorer.close() for a in active))


def check_base(status: GatewayStatus, bundle: RunBundle) -> None:
    expected = bundle.population_spec.base.digest
    if status.base_digest != expected:
        raise InvalidInput(f"base: expected digest {expected} in the rollouts, found {status.base_digest}")


if __name__ == "__main__":
    sys.exit(main())
