"""User code: found and checked before the run, and never able to hurt it."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from allele_driver.environments import Lesson, MemberView, Prompt, Score
from allele_driver.environments.calls import Start
from allele_driver.environments.load import EnvironmentLoadError, code_digest, load_class
from allele_driver.environments.scoring import Dropped, EnvironmentFailed, Scorer
from allele_driver.failures import Failures
from allele_driver.rollouts import Drawn
from tests.driver.driver_parts import BASE

CODE = """
import os, time
from allele_driver.environments import Answer, Lesson, Pair, Prompt, Said, Score


class Good:
    def __init__(self, tokenizer, factor=1.0):
        self.tokenizer, self.factor = tokenizer, factor

    def prompts(self, member, rng, n, held_out):
        print("user code may print")
        return ["".join(rng.sample("abcdef", 3)) + "=" for _ in range(n)]

    def score(self, member, prompt, completion):
        return Score(self.factor * len(completion.text), {"tokens": len(completion.ids)})


class WithData(Good):
    data_digest = "sha256:0123"


class WithNumber(Good):
    data_digest = 123


class Naughty(Good):
    def prompts(self, member, rng, n, held_out):
        if member.name == "wordless":
            raise LookupError("no words")
        return super().prompts(member, rng, n, held_out)[: n - (member.name == "short")]

    def score(self, member, prompt, completion):
        print("and print again", flush=True)
        if completion.text == "a":
            raise RuntimeError("letter a")
        if completion.text == "b":
            time.sleep(100)
        if completion.text == "c":
            os._exit(3)
        if completion.text == "d":
            return "one"
        return 1


class Teacher(Good):
    def answers(self, member, rng, n):
        return [Answer("abc=", "cba"), Answer(Prompt(ids=(3, 2)), Said(ids=(4, 4)))][:n]

    def pairs(self, member, rng, n):
        return [Pair("ab=", "ba", Said(ids=(4, 1), reference=(-1.0, -2.0)))] * n

    def teach(self, member, prompt, completion):
        if completion.text == "a":
            return Lesson((1, 1) * len(completion.ids), (-1.0, -2.0) * len(completion.ids))
        if completion.text == "b":
            return Lesson((1, 2), (-1.0, -2.0))
        return Lesson((1, 2) * len(completion.ids), (-1.0, -2.0) * len(completion.ids))


class Misspelt:
    def __init__(self, tokenizer): ...
    def prompt(self, member, rng, n, held_out): ...
    def score(self, member, prompt, completion): ...


class TooFew(Good):
    def score(self, prompt, completion): ...


class Async(Good):
    async def score(self, member, prompt, completion): ...


not_a_class = 3
"""
MEMBER = MemberView("m", "g", 0, {})
LETTERS = {"a": 3, "b": 4, "c": 5, "d": 6, "e": 7}


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `user_code` on the path of this process and of workers."""
    (tmp_path / "user_code.py").write_text(CODE)
    (tmp_path / "unimportable.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delitem(sys.modules, "user_code", raising=False)
    return tmp_path


@pytest_asyncio.fixture
async def scorer() -> AsyncIterator[Callable[..., Scorer]]:
    made: list[Scorer] = []

    def make(path: str, *, timeout: float = 20.0, methods: tuple[str, ...] = (), **parameters: object) -> Scorer:
        start = Start(path, parameters, (BASE / "tokenizer.json").read_text(), (1,), methods)
        made.append(Scorer(start, timeout=timeout))
        return made[-1]

    yield make
    for s in made:
        await s.close()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("no_such_module:Good", "importable module 'no_such_module' on the run's code path, found ModuleNotFoundError"),
        ("unimportable:Good", "No module named 'no_such_library'"),
        ("user_code:Missing", "expected a class 'Missing', found NoneType"),
        ("user_code:not_a_class", "expected a class 'not_a_class', found int"),
        (
            "user_code:Misspelt",
            "expected prompts(self, member, rng, n, held_out) -> list[Prompt | str], found no method",
        ),
        (
            "user_code:TooFew",
            "expected score(self, member, prompt, completion) -> Score | float, found TooFew.score(self",
        ),
        ("user_code:Async", "found an async method Async.score"),
        ("nothing-installed", "module:Class or an entry point of group 'allele.environments'"),
    ],
)
def test_what_does_not_fit_is_refused_with_path_module_and_signature(path: str, expected: str) -> None:
    with pytest.raises(EnvironmentLoadError) as refused:
        load_class(path)
    assert expected in str(refused.value)
    assert f"environment {path!r}" in str(refused.value)


def test_the_digest_of_code_follows_its_source(code: Path) -> None:
    before = code_digest("user_code:Good")
    assert before == code_digest("user_code:Naughty")
    (code / "user_code.py").write_text(CODE + "# changed\n")
    assert code_digest("user_code:Good") != before


async def test_an_environment_may_say_what_its_data_is(scorer: Callable[..., Scorer]) -> None:
    silent, telling = scorer("user_code:Good"), scorer("user_code:WithData")
    await silent.start()
    await telling.start()
    assert (silent.data_digest, telling.data_digest) == ("", "sha256:0123")
    with pytest.raises(EnvironmentLoadError, match="data_digest: expected text, found 123"):
        await scorer("user_code:WithNumber").start()


async def test_a_constructor_that_refuses_its_parameters_is_an_error_at_start(scorer: Callable[..., Scorer]) -> None:
    with pytest.raises(EnvironmentLoadError, match=r"accept parameters \['colour'\].*unexpected keyword"):
        await scorer("user_code:Good", colour="red").start()


async def test_prompts_follow_from_the_seed(scorer: Callable[..., Scorer]) -> None:
    good = scorer("user_code:Good")
    first = await good.prompts(MEMBER, seed=1, n=3, held_out=False)
    assert first == await good.prompts(MEMBER, seed=1, n=3, held_out=False)
    assert first != await good.prompts(MEMBER, seed=2, n=3, held_out=False)
    assert all(len(p.ids) == 4 and p.ids[-1] == 2 for p in first)


async def test_scores_see_the_text_and_the_parameters(scorer: Callable[..., Scorer]) -> None:
    good = scorer("user_code:Good", factor=0.5)
    assert await good.scores([item("ab"), item("abc")]) == [
        Score(1.0, {"tokens": 3.0}),
        Score(1.5, {"tokens": 4.0}),
    ]


async def test_a_sample_whose_scoring_raises_hangs_or_dies_is_dropped_alone(
    scorer: Callable[..., Scorer], caplog: pytest.LogCaptureFixture
) -> None:
    naughty = scorer("user_code:Naughty", timeout=1.0)
    await naughty.start()
    found = await naughty.scores([item(c) for c in "eaebecede"])
    assert [f.reason if isinstance(f, Dropped) else f.reward for f in found] == [
        1.0, "raised", 1.0, "hung", 1.0, "died", 1.0, "raised", 1.0,
    ]  # fmt: skip
    assert "letter a" in caplog.text and "Traceback" in caplog.text
    assert "expected a number or a Score, found str" in caplog.text


async def test_a_member_that_always_hangs_costs_a_few_timeouts_only(scorer: Callable[..., Scorer]) -> None:
    naughty = scorer("user_code:Naughty", timeout=0.3)
    await naughty.start()
    other = MemberView("other", "g", 1, {})
    found = await naughty.scores([*[item("b")] * 50, *[item("e", other)] * 2])
    reasons = [f.reason for f in found if isinstance(f, Dropped)]
    assert (reasons.count("hung"), reasons.count("skipped")) == (3, 47)
    assert found[50:] == [Score(1.0), Score(1.0)]


async def test_prompts_that_fail_are_told_with_the_traceback(scorer: Callable[..., Scorer]) -> None:
    naughty = scorer("user_code:Naughty")
    with pytest.raises(EnvironmentFailed, match=r"(?s)prompts of wordless: LookupError: no words.*Traceback"):
        await naughty.prompts(MemberView("wordless", "g", 0, {}), seed=1, n=2, held_out=False)
    with pytest.raises(EnvironmentFailed, match="expected 2, found 1"):
        await naughty.prompts(MemberView("short", "g", 0, {}), seed=1, n=2, held_out=False)
    assert len(await naughty.prompts(MEMBER, seed=1, n=2, held_out=False)) == 2


async def test_answers_and_pairs_end_with_the_stop_token(scorer: Callable[..., Scorer]) -> None:
    teacher = scorer("user_code:Teacher", methods=("answers", "pairs", "teach"))
    first, second = await teacher.given(MEMBER, seed=1, n=2, what="answers")
    assert (first.prompt, first.completion) == ((3, 4, 5, 2), (5, 4, 3, 1))
    assert (second.prompt, second.completion) == ((3, 2), (4, 4))
    chosen, rejected = await teacher.given(MEMBER, seed=1, n=1, what="pairs")
    assert (chosen.completion, chosen.reference) == ((4, 3, 1), ())
    assert (rejected.completion, rejected.reference) == ((4, 1), (-1.0, -2.0))
    with pytest.raises(EnvironmentFailed, match="answers of m: ValueError: answers: expected 3, found 2"):
        await teacher.given(MEMBER, seed=1, n=3, what="answers")


async def test_lessons_that_do_not_fit_are_dropped_alone(
    scorer: Callable[..., Scorer], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = scorer("user_code:Teacher", methods=("teach",))
    found = await teacher.lessons([item("a"), item("b"), item("c")], top_k=2)
    assert [getattr(f, "reason", f) for f in found] == ["raised", "raised", Lesson((1, 2) * 2, (-1.0, -2.0) * 2)]
    assert "expected the ids of a place to be different" in caplog.text
    assert "2 ids and logprobs (topK) at each of 2 places" in caplog.text


async def test_what_an_algorithm_needs_is_asked_for_at_the_start(scorer: Callable[..., Scorer]) -> None:
    with pytest.raises(EnvironmentLoadError, match=r"expected pairs\(self, member, rng, n\) -> list\[Pair\], found no"):
        await scorer("user_code:Good", methods=("pairs",)).start()


def test_a_member_stops_after_two_bad_steps_in_a_row() -> None:
    failures = Failures()
    failures.note("m", dropped={"raised": 20}, samples=32)
    failures.note("m", dropped={"raised": 16}, samples=32)
    failures.note("m", dropped={"hung": 17}, samples=32)
    assert not failures.stopped
    failures.note("other", dropped={}, samples=32)
    failures.note("m", dropped={"hung": 3, "skipped": 29}, samples=32)
    assert failures.stopped.keys() == {"m"}
    assert "3 hung, 29 skipped" in failures.stopped["m"]


def item(text: str, member: MemberView = MEMBER) -> tuple[MemberView, Prompt, Drawn]:
    ids = (*(LETTERS[c] for c in text), 1)
    return member, Prompt(text="abc=", ids=(3, 4, 5, 2)), Drawn(ids, (0.0,) * len(ids), "stop")
