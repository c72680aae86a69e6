"""RLRun: reinforcement learning of some members of a population, in a pool."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from allele.api.algorithm import Algorithm
from allele.api.schema import DottedPath, FreeForm, MemberName, Model, Name, Status, cel, schema


class Range(Model):
    first: int = Field(0, description="Index of the first member.", ge=0, le=1_000_000)
    count: int = Field(description="Number of members.", ge=1, le=1_000_000)


class Select(Model):
    model_config = ConfigDict(
        json_schema_extra=schema(
            cel(
                "!(has(self.range) && has(self.names))",
                "at most one of range and names may be set",
                reason="FieldValueInvalid",
            )
        )
    )
    group: Name = Field(description="Group of the population.")
    range: Range | None = Field(None, description="Part of the group by index; absent, with names absent: all of it.")
    names: list[MemberName] | None = Field(
        None, description="Members by name.", min_length=1, max_length=1024, json_schema_extra=schema(list_type="set")
    )


class Environment(Model):
    path: DottedPath = Field(
        description="module:Class on the run's code path, or the name of an `allele.environments` entry point."
    )
    parameters: FreeForm = Field(default_factory=dict, description="Keyword arguments of the environment.")
    timeout_seconds: int = Field(30, description="Longest time that scoring of one sample may take.", ge=1, le=86400)


class Optimizer(Model):
    model_config = ConfigDict(
        json_schema_extra=schema(
            cel(
                "!has(self.horizon) || self.warmupSteps < self.horizon",
                "warmupSteps must be less than horizon",
                path=".warmupSteps",
                reason="FieldValueInvalid",
            )
        )
    )
    learning_rate: float = Field(description="Highest learning rate: at the first step after the warm-up.", gt=0, le=1)
    schedule: Literal["Constant", "Linear", "Cosine"] = Field(
        "Constant",
        description="How the rate goes from learningRate to finalFraction of it at the horizon. Steps are the member's "
        "own in this run: those that another member had do not count, nor those that were skipped.",
    )
    warmup_steps: int = Field(
        0, description="Steps over which the rate rises linearly to learningRate.", ge=0, le=10_000_000
    )
    horizon: int | None = Field(
        None,
        description="Own steps after which the rate is final. Default: the turns that the member has in stop.steps.",
        ge=1,
        le=10_000_000,
    )
    final_fraction: float = Field(0.0, description="Fraction of learningRate left at the horizon.", ge=0, le=1)
    beta1: float = Field(0.9, description="AdamW's first decay.", ge=0, lt=1)
    beta2: float = Field(0.999, description="AdamW's second decay.", ge=0, lt=1)
    eps: float = Field(1e-8, description="AdamW's epsilon.", gt=0, le=1)
    weight_decay: float = Field(0.0, description="Decoupled weight decay.", ge=0, le=1)
    clip: float = Field(1.0, description="Largest norm of a member's gradient.", gt=0, le=1e6)


class Sampling(Model):
    temperature: float = Field(1.0, description="Temperature of the rollouts.", gt=0, le=10)
    top_p: float = Field(1.0, description="Nucleus of the rollouts.", gt=0, le=1)
    max_tokens: int = Field(128, description="Longest completion, tokens.", ge=1, le=1_000_000)


class TrainGroup(Model):
    select: Select = Field(description="Members that this part trains.")
    algorithm: Algorithm = Field(
        default_factory=Algorithm,
        description="How rewards become gradients. A member's `parameters.algorithm` overrides fields of it, but for "
        "name, promptsPerStep, groupSize, refills and teacher, which say what is sampled.",
    )
    environment: Environment = Field(description="Where prompts and rewards come from.")
    optimizer: Optimizer = Field(
        description="How gradients become updates. A member's `parameters.optimizer` overrides fields of it, e.g. "
        '{"optimizer": {"learningRate": 0.001}} in its row of the manifest.'
    )
    sampling: Sampling = Field(default_factory=Sampling, description="How completions are drawn.")


class Pace(Model):
    max_policy_lag: int = Field(
        0, description="Steps that a sample's revision may be behind; 0: every sample is from the newest.", ge=0, le=64
    )
    cohort: int | None = Field(None, description="Members trained in one step; absent: all.", ge=1, le=1_000_000)


class Checkpoints(Model):
    every_steps: int = Field(
        1, description="Steps between saved optimizer states; a crash repeats at most that many.", ge=1, le=10_000
    )


class StartFrom(Model):
    revision: Literal["Newest", "Exposed", "Base"] = Field(
        "Newest", description="Revision that each member starts from; Base: from its initialisation."
    )
    optimizer: Literal["Resume", "Fresh"] = Field("Resume", description="Whether the optimizer state is taken over.")


class Stop(Model):
    steps: int = Field(description="Optimizer steps of the run.", ge=1, le=10_000_000)
    reward: float | None = Field(None, description="Ends earlier when the mean reward of a step reaches this.")


class Evaluation(Model):
    prompts: int = Field(
        32, description="Held-out prompts of each member at the start and at the end; 0: none.", ge=0, le=65536
    )


class FailurePolicy(Model):
    backoff_limit: int = Field(6, description="Restarts of the driver before the run fails.", ge=0, le=1000)


class Code(Model):
    config_map: Name = Field(
        description="ConfigMap of this namespace whose files are put on the Python path of the driver."
    )


_FIXED = (
    "populationRef",
    "poolRef",
    "runtimeRef",
    "baseUri",
    "groups",
    "pace",
    "checkpoints",
    "startFrom",
    "evaluation",
    "failurePolicy",
    "code",
)
_WHOLE_ONCE = (
    "self.all(a, has(a.select.range) || has(a.select.names) || self.exists_one(b, b.select.group == a.select.group))"
)
_RANGES_APART = (
    "self.all(a, !has(a.select.range) || self.exists_one(b, b.select.group == a.select.group && has(b.select.range)"
    " && b.select.range.first < a.select.range.first + a.select.range.count"
    " && a.select.range.first < b.select.range.first + b.select.range.count))"
)


def _same(*fields: str) -> str:
    """CEL: each field is as it was, absent ones included."""
    return " && ".join(
        f"has(self.{f}) == has(oldSelf.{f}) && (!has(self.{f}) || self.{f} == oldSelf.{f})" for f in fields
    )


class RLRunSpec(Model):
    model_config = ConfigDict(
        json_schema_extra=schema(
            cel(
                "has(self.poolRef) != has(self.runtimeRef)",
                "exactly one of poolRef and runtimeRef must be set",
                reason="FieldValueInvalid",
            ),
            cel(
                "has(self.runtimeRef) == has(self.baseUri)",
                "baseUri is required with runtimeRef and not allowed without it: a pool knows its base",
                reason="FieldValueInvalid",
            ),
            cel(_same(*_FIXED), "a run is immutable but for stop and suspend: create another run"),
        )
    )
    population_ref: Name = Field(description="AdapterPopulation of this namespace.")
    pool_ref: Name | None = Field(None, description="BasePool of this namespace to train in.")
    runtime_ref: Name | None = Field(
        None, description="AdapterRuntime to make a pool of the run's own from; it is deleted with the run."
    )
    base_uri: str | None = Field(
        None,
        description="With runtimeRef: where the population's base lies.",
        max_length=1024,
        pattern=r"^(s3|gs|az|file)://.+$",
    )
    groups: list[TrainGroup] = Field(
        description="Who is trained, and how.",
        min_length=1,
        max_length=16,
        json_schema_extra=schema(
            cel(_WHOLE_ONCE, "a group selected as a whole (no range, no names) can be selected only once"),
            cel(_RANGES_APART, "ranges of the same group must not overlap"),
        ),
    )
    pace: Pace = Field(default_factory=Pace, description="How sampling and training interleave.")
    checkpoints: Checkpoints = Field(default_factory=Checkpoints, description="How often the optimizer state is kept.")
    start_from: StartFrom = Field(default_factory=StartFrom, description="Where members start.")
    stop: Stop = Field(description="When the run ends.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="Held-out evaluation by the driver.")
    failure_policy: FailurePolicy = Field(default_factory=FailurePolicy, description="How failures are met.")
    code: Code | None = Field(None, description="The user's code.")
    suspend: bool = Field(False, description="True: the driver stops after the step in flight; false resumes.")


class ProgressStatus(Model):
    step: int = Field(0, description="Last committed step.", ge=0)
    steps: int = Field(0, description="Steps in all.", ge=0)
    percentage: int = Field(0, description="Of the steps.", ge=0, le=100)
    eta_seconds: int | None = Field(None, description="Estimated seconds left.", ge=0)


class RewardStatus(Model):
    mean: str = Field("", description="Mean reward of the last step.", max_length=16)
    best: str = Field("", description="Reward of the best member.", max_length=16)
    worst: str = Field("", description="Reward of the worst member.", max_length=16)


Count = Annotated[int, Field(ge=0)]


class RLRunStatus(Status):
    progress: ProgressStatus | None = Field(None, description="How far the run is.")
    reward: RewardStatus | None = Field(None, description="Rewards of the last step.")
    members: Count = Field(0, description="Members that the run trains.")
    trained: Count = Field(0, description="Of these, with a revision committed by this run.")
    failed: Count = Field(0, description="Of these, stopped by an error.")
    policy_lag: Count = Field(0, description="Largest lag of a sample in the last step, steps.")
    committed: Count = Field(0, description="Revisions committed by this run.")
    exposed: Count = Field(0, description="Exposures by this run.")
    restarts: Count = Field(0, description="Starts of the driver after the first.")
    job: str = Field("", description="Job of the driver.", max_length=63)
