"""`allele watch`: a run of the cluster on the terminal until it ends."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from allele.protocol.progress import Progress, Reward
from allele_cli.access import NamespaceOption, get
from allele_cli.display import Display
from allele_cli.failure import Failure

POLL_SECONDS = 2.0
ENDED = ("Succeeded", "Failed")


def watch(
    run: Annotated[str, typer.Argument(help="Name of the RLRun.")],
    namespace: NamespaceOption = "default",
) -> None:
    """Follow a run until it succeeds or fails; says why it waits.

    Example: `allele watch preferences --namespace allele-demo`
    """
    said = ""
    with Display(f"{namespace}/{run}") as display:
        while True:
            obj = get("rlrun", run, namespace)
            status = obj.get("status", {})
            why = waiting(status)
            if why and why != said:
                said = why
                display.say(why)
            display.show(progress_of(obj))
            for ended in (c for c in status.get("conditions", ()) if c["type"] in ENDED and c["status"] == "True"):
                if ended["type"] == "Failed":
                    raise Failure(f"{namespace}/{run}: {ended['reason']}: {ended['message']}")
                display.say(f"{namespace}/{run}: {ended['message'] or ended['reason']}")
                return
            time.sleep(POLL_SECONDS)


def waiting(status: dict[str, Any]) -> str:
    """The first condition that is not well, as a sentence."""
    for condition in status.get("conditions", ()):
        if condition["status"] != "True" and condition["type"] not in ENDED:
            return f"{condition['type']} is {condition['status']}: {condition['reason']}: {condition['message']}"
    return ""


def progress_of(obj: dict[str, Any]) -> Progress:
    """Status of an RLRun in the words of its driver's reports."""
    status, meta = obj.get("status", {}), obj["metadata"]
    progress, reward = status.get("progress") or {}, status.get("reward") or {}
    phases = {"Succeeded": "Succeeded", "Failed": "Failed", "Running": "Training"}
    return Progress.model_validate(
        {
            "namespace": meta["namespace"],
            "run": meta["name"],
            "uid": meta["uid"],
            "epoch": 0,
            "phase": phases.get(status.get("phase", ""), "Starting"),
            "step": progress.get("step", 0),
            "steps": progress.get("steps") or obj["spec"]["stop"]["steps"],
            "reward": Reward(**{k: float(reward[k]) for k in ("mean", "best", "worst")})
            if reward.get("mean")
            else None,
            "committed": status.get("committed", 0),
            "exposed": status.get("exposed", 0),
        }
    )
