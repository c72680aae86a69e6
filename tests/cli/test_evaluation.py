"""`allele eval` asks an endpoint as a client would, waits while its engine starts, and scores as the driver does."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from allele_cli.evaluate import Evaluation, evaluate_files
from allele_cli.failure import Failure

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/preferences"
STRICT = """
    class Strict:
        '''Refuses to score a member of which it sees what is meant for the trainer.'''

        def __init__(self, tokenizer): ...

        def prompts(self, member, rng, n, held_out):
            return [f"prompt {i}" for i in range(n)]

        def score(self, member, prompt, completion):
            assert set(member.parameters) == {"taste"}, dict(member.parameters)
            return float(completion.text == member.name)
"""


def files(folder: Path) -> list[Path]:
    """Two members with parameters of their own, one of them with a learning rate of its own."""
    (folder / "strict_environment.py").write_text(textwrap.dedent(STRICT))
    population = yaml.safe_load((EXAMPLE / "04-population.yaml").read_text())
    group = population["spec"]["groups"][0]
    group["parameters"] = {"taste": 1, "optimizer": {"learningRate": 1e-3}}
    group["members"] = {"count": 2}
    run = yaml.safe_load((EXAMPLE / "05-run.yaml").read_text())
    run["spec"]["groups"][0] |= {"select": {"group": group["name"]}}
    run["spec"]["groups"][0]["environment"] = {"path": "strict_environment:Strict"}
    found = []
    for name, body in (("population.yaml", population), ("run.yaml", run)):
        (folder / name).write_text(yaml.safe_dump(body))
        found.append(folder / name)
    return found


async def evaluated(folder: Path, refusals: list[int]) -> Evaluation:
    """Against a server that first answers with the statuses of `refusals`, then each model with its member's name."""

    async def complete(request: web.Request) -> web.Response:
        if refusals:
            return web.json_response({"error": "not now"}, status=refusals.pop(), headers={"Retry-After": "0"})
        body = await request.json()
        text = body["model"].rpartition("/")[2]
        choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, _ in enumerate(body["prompt"])]
        return web.json_response({"choices": choices})

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    async with TestServer(app) as server:
        return await evaluate_files(
            files(folder),
            endpoint=str(server.make_url("")),
            base=EXAMPLE / "base",
            base_model="base",
            prompts=3,
            temperature=1.0,
            seed=0,
        )


@pytest.fixture(autouse=True)
def _code_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)


async def test_every_member_is_scored_under_every_members_reward(tmp_path: Path) -> None:
    found = await evaluated(tmp_path, [])
    assert found.cross == [[1.0, 0.0], [0.0, 1.0]]
    assert set(found.members.values()) == {1.0} and set(found.base.values()) == {0.0}


async def test_an_engine_that_still_starts_is_waited_for(tmp_path: Path) -> None:
    refusals = [503, 503]
    found = await evaluated(tmp_path, refusals)
    assert not refusals and found.diagonal_mean == 1.0


async def test_any_other_refusal_is_told_in_the_servers_words(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"HTTP 404.*not now"):
        await evaluated(tmp_path, [404])
