"""Dynamic sampling: prompts that say nothing are drawn again, for their members only, and not for ever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allele.api.run import RLRunSpec
from allele.protocol.commands import AdapterSpec
from allele_driver.environments import Prompt
from allele_driver.environments.calls import Start
from allele_driver.environments.scoring import Scorer
from allele_driver.loop.rollout import ActivePart, Draw
from allele_driver.loop.roster import Roster
from allele_driver.loop.stages import Stages
from allele_driver.members import Member, Part
from allele_driver.recipes import recipes
from allele_driver.rollouts import Drawn, PromptGroup, Rollouts, joined

TELLING = {"easy": (0, 0, 0, 0), "hard": (1, 1, 1, 1), "plain": (4, 4, 4, 4)}
"""Member → telling prompts in its first draw and in each refill."""


class Script:
    """Answers draws as written down and remembers them."""

    def __init__(self) -> None:
        self.draws: list[tuple[str, int, list[str]]] = []

    async def roll_out(self, active: ActivePart, members: Sequence[Member], *, draw: Draw, **_: Any) -> Rollouts:
        self.draws.append((draw.salt, draw.prompts, [m.name for m in members]))
        groups = []
        for m in members:
            telling = TELLING[m.name][sum(m.name in names for _, _, names in self.draws) - 1]
            for i in range(draw.prompts):
                rewards = (0.0, 1.0) if i < telling else (1.0, 1.0)
                drawn = tuple(Drawn((n, 1), (-1.0, -1.0), "stop") for n in (3, 4))
                groups.append(PromptGroup(m.name, 1, Prompt(ids=(9, len(self.draws), i)), drawn, rewards))
        return Rollouts(tuple(groups), wanted={m.name: draw.prompts * draw.samples for m in members})


def roster(algorithm: Mapping[str, Any]) -> Roster:
    spec = RLRunSpec.model_validate(
        {
            "populationRef": "p",
            "poolRef": "pool",
            "stop": {"steps": 3},
            "groups": [
                {
                    "select": {"group": "g"},
                    "algorithm": algorithm,
                    "environment": {"path": "a:B"},
                    "optimizer": {"learningRate": 0.1},
                }
            ],
        }
    )
    adapter = AdapterSpec(rank=8, alpha=16, targets=("q_proj",))
    members = tuple(Member(m, "g", i, {}, adapter, seed=i) for i, m in enumerate(TELLING))
    (group,) = spec.groups
    scorer = Scorer(Start("a:B", {}, "", ()), timeout=1)
    return Roster([ActivePart(Part(group, members), scorer, recipes(group, members))], spec)


async def rolled(found: Roster) -> tuple[Script, Rollouts]:
    script = Script()
    rollouts = await found.to_train_on(
        script,  # type: ignore[arg-type]  # it has the one method that sampling needs
        found.members,
        step=7,
        revisions={},
        version=1,
        stages=Stages(),
    )
    return script, rollouts


async def test_members_get_as_many_prompts_again_as_the_worst_of_them_lacks() -> None:
    found = roster({"name": "DAPO", "promptsPerStep": 4, "groupSize": 2, "refills": 2})
    script, rollouts = await rolled(found)
    assert script.draws == [
        ("7", 4, ["easy", "hard", "plain"]),
        ("7/1", 4, ["easy", "hard"]),
        ("7/2", 4, ["easy", "hard"]),
    ]
    turns = {t.member: t for t in found.turns(7, rollouts, done={})}
    assert {m: len(t.rows) for m, t in turns.items()} == {"hard": 6, "plain": 8}
    assert rollouts.wanted == {"easy": 24, "hard": 24, "plain": 8}


async def test_without_refills_everything_is_drawn_once() -> None:
    script, _ = await rolled(roster({"name": "GRPO", "promptsPerStep": 4, "groupSize": 2}))
    assert script.draws == [("7", 4, ["easy", "hard", "plain"])]


async def test_the_rate_and_the_number_of_a_step_are_the_members_own() -> None:
    found = roster({"name": "GRPO", "promptsPerStep": 4, "groupSize": 2})
    _, rollouts = await rolled(found)
    turns = {t.member: t.own_step for t in found.turns(7, rollouts, done={"plain": 4})}
    assert turns == {"hard": 1, "plain": 5}


def test_what_members_have_in_several_draws_adds_up() -> None:
    one = Rollouts(wanted={"a": 2}, dropped={"a": {"raised": 1}})
    two = Rollouts(wanted={"a": 3, "b": 1}, dropped={"a": {"raised": 2, "hung": 1}})
    both = joined([one, two])
    assert both.wanted == {"a": 5, "b": 1}
    assert both.dropped == {"a": {"raised": 3, "hung": 1}}
