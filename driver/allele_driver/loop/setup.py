"""From a bundle to a run that can begin: inputs are checked here, before any sample is drawn.

What the user can have got wrong (groups, manifests, environment, base, ownership) is refused with InvalidInput.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allele.api.algorithm import Algorithm
from allele.format import AdapterShape, ShapeMismatch
from allele.protocol.bundle import RunBundle
from allele.protocol.initialisation import RESIDUAL, InitSpec, Residual, mix_up
from allele.store import ObjectNotFound, Objects, OwnershipError, PopulationRecord, PopulationStore
from allele_driver.environments.calls import Start
from allele_driver.environments.load import EnvironmentLoadError
from allele_driver.environments.scoring import Scorer
from allele_driver.loop.rollout import ActivePart
from allele_driver.members import InvalidInput, Part, adapter_of, members_of
from allele_driver.recipes import recipes
from allele_driver.tokenizer import HfTokenizer, chat_template_digest, stop_tokens


@dataclasses.dataclass(frozen=True)
class Base:
    """What the driver needs of the base model."""

    tokenizer: HfTokenizer
    config: dict[str, Any]
    chat_template_digest: str = ""
    residual: Residual | None = None
    """What it is the residual of, if it is one."""

    @property
    def context(self) -> int:
        """Tokens that the base takes at most."""
        return int(self.config["max_position_embeddings"])


def read_base(uri: str) -> Base:
    """From the base's folder. Raises InvalidInput when a file is missing."""
    folder = Objects.open(uri)
    try:
        config = folder.get("config.json")
        tokenizer = folder.get("tokenizer.json").decode()
    except ObjectNotFound as e:
        raise InvalidInput(f"base {uri}: expected config.json and tokenizer.json: {e}") from e
    generation, residual = _optional(folder, "generation_config.json"), _optional(folder, RESIDUAL)
    return Base(
        HfTokenizer(tokenizer, stop_tokens(generation, config)),
        json.loads(config),
        chat_template_digest(_optional(folder, "chat_template.jinja"), _optional(folder, "tokenizer_config.json")),
        Residual.model_validate_json(residual) if residual is not None else None,
    )


def _optional(folder: Objects, name: str) -> bytes | None:
    try:
        return folder.get(name)
    except ObjectNotFound:
        return None


def claim(store: PopulationStore, bundle: RunBundle, base: Base) -> None:
    """Make the population's folder this population's. Raises InvalidInput when it is another's."""
    spec = bundle.population_spec
    shapes, inits = {}, {}
    for group in spec.groups:
        adapter = adapter_of(group)
        wrong = mix_up(
            adapter.init,
            rank=adapter.rank,
            scale=adapter.scale,
            targets=adapter.targets,
            base=spec.base.digest,
            residual=base.residual,
        )
        if wrong:
            raise InvalidInput(f"groups.{group.name}.adapter: {wrong}")
        try:
            shape = AdapterShape.from_model(base.config, rank=adapter.stored_rank, targets=adapter.targets)
        except ShapeMismatch as e:
            raise InvalidInput(f"groups.{group.name}.adapter: {e}") from e
        shapes[group.name] = shape.digest
        if adapter.init != InitSpec():
            inits[group.name] = f"{adapter.init.kind} {adapter.init.base_mode}"
    record = PopulationRecord(
        uid=bundle.population_uid, base_digest=spec.base.digest, shapes=shapes, inits=inits, adopt=spec.adopt
    )
    try:
        store.claim(record)
    except OwnershipError as e:
        raise InvalidInput(str(e)) from e


async def start_parts(parts: Sequence[Part], tokenizer: HfTokenizer) -> tuple[ActivePart, ...]:
    """Start the environment of each part. Raises InvalidInput when one does not load."""
    active = []
    for part in parts:
        environment = part.spec.environment
        start = Start(
            environment.path,
            environment.parameters,
            tokenizer.content,
            tokenizer.stop_token_ids,
            methods=methods_of(part.spec.algorithm),
        )
        scorer = Scorer(start, timeout=environment.timeout_seconds)
        active.append(ActivePart(part, scorer, recipes(part.spec, part.members)))
    try:
        await asyncio.gather(*(a.scorer.start() for a in active))
    except EnvironmentLoadError as e:
        await asyncio.gather(*(a.scorer.close() for a in active))
        raise InvalidInput(str(e)) from e
    return tuple(active)


def methods_of(algorithm: Algorithm) -> tuple[str, ...]:
    """What an environment must have for an algorithm, beside prompts and score."""
    if algorithm.name == "Distillation":
        return ("teach",) if algorithm.teacher == "Environment" else ()
    return {"SFT": ("answers",), "DPO": ("pairs",)}.get(algorithm.name, ())


def read_bundle(run_dir: Path) -> RunBundle:
    """`run.json`. Raises InvalidInput naming the first wrong field."""
    source = run_dir / "run.json"
    try:
        bundle = RunBundle.model_validate_json(source.read_bytes())
    except OSError as e:
        raise InvalidInput(f"{source}: expected the run's bundle: {e.strerror}") from e
    except ValueError as e:
        raise InvalidInput(f"{source}: {e}") from e
    for group in bundle.population_spec.groups:
        members_of(group, run_dir / "manifests")
    return bundle
