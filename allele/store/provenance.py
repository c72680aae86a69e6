"""Provenance: where the revisions of one commit come from. Stored once per commit, addressed by its sha256.

Documents outlive versions of this code as facts do: fields are only ever added, with a default, and a reader leaves
out those that it does not know.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Any

from pydantic import AwareDatetime, Field

from allele.protocol.commands import OptimizerSpec, ProbeSequence, TrainerSetting
from allele.protocol.initialisation import BaseMode, InitKind, Scaling, scale_of, stored_rank
from allele.protocol.serving import Gate
from allele.protocol.wire import Wire


class BaseRef(Wire):
    uri: str
    digest: str


class ShapeRef(Wire):
    """What an adapter of one group is."""

    digest: str
    rank: int
    """Of the part that trains."""
    alpha: float
    scaling: Scaling
    targets: tuple[str, ...]
    init: InitKind
    base_mode: BaseMode = "Untouched"
    factors: str = ""
    """Digest of the factors of the base that the adapter started from."""
    seed: int = 0
    """Of the group: with a member's name it seeds what it began as."""
    residual_of: str = ""
    """Digest of the base that `Provenance.base` is the residual of."""

    @property
    def scale(self) -> float:
        return scale_of(alpha=self.alpha, rank=self.rank, scaling=self.scaling)

    @property
    def stored_rank(self) -> int:
        """Of the matrices in the store."""
        return stored_rank(self.rank, self.base_mode)


class DataRange(Wire):
    """Prompts that the step consumed: the environment's cursor after it, and how many."""

    cursor: int
    prompts: int
    digest: str = ""
    """Of the data, as the environment says; empty where it says nothing."""


class SamplingRef(Wire):
    """How completions were drawn."""

    temperature: float
    top_p: float
    max_tokens: int
    """Longest completion."""
    stop_token_ids: tuple[int, ...]


class ImportRef(Wire):
    """The folder that a revision was imported from."""

    folder: str
    sha256: str
    """Of its adapter_model.safetensors."""


class Versions(Wire):
    allele: str
    sglang: str = ""


class Provenance(Wire):
    """What the rows of a commit share."""

    namespace: str
    population: str
    population_uid: str
    run: str
    run_uid: str
    fence: int
    step: int
    run_generation: int = 0
    """Of the spec that the driver was given, as of the population's; 0: there is none."""
    population_generation: int = 0
    base: BaseRef
    tokenizer_digest: str
    chat_template_digest: str = ""
    """Of chat_template.jinja in the base's folder, or of the one in tokenizer_config.json; empty without one."""
    shapes: dict[str, ShapeRef]
    """By group."""
    environment: str
    environment_parameters: dict[str, Any] = Field(default_factory=dict)
    """What it was made with, such as the name of a data set."""
    reward: str
    code_digest: str = ""
    """Of the user's code on the Python path; empty without any."""
    data: DataRange
    sampling: SamplingRef | None = None
    """None: nothing was sampled."""
    policy_lag: dict[int, int] = Field(default_factory=dict)
    """Lag in revisions → samples."""
    image: str = ""
    """Of the driver."""
    trainer: TrainerSetting | None = None
    versions: Versions
    optimizer: OptimizerSpec
    loss: dict[str, Any]
    probes: tuple[ProbeSequence, ...] = ()
    gate: Gate | None = None
    """By which the probes are judged, on any replica and at any time; None: by the usual one."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """What the step cost by stage; of commit and expose, which come later, it has those of the step before."""
    imported: ImportRef | None = None
    """Instead of a run that trained."""
    time: AwareDatetime | datetime

    def encode(self) -> bytes:
        """Canonical JSON: equal provenance has equal bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Provenance:
        """Also of a document that a later version wrote."""
        return cls.model_validate_json(data, extra="ignore")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()
