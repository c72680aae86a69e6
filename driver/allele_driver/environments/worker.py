"""`python -m allele_driver.environments.worker`: the process in which user code runs.

One call at a time, in order, until stdin closes. User code that prints does so to stderr: stdout carries the answers.
"""

from __future__ import annotations

import os
import random
import traceback

from allele_driver.environments import Completion, Environment, Prompt, Score
from allele_driver.environments.calls import Answer, Call, Draw, Drawn, Failed, Judge, Start, Started, dump, read
from allele_driver.environments.load import build, code_digest
from allele_driver.tokenizer import HfTokenizer


class Worker:
    """An environment behind calls."""

    def __init__(self, start: Start) -> None:
        self._tokenizer = HfTokenizer(start.tokenizer, start.stop_token_ids)
        self._environment: Environment = build(start.path, self._tokenizer, start.parameters)
        self.started = Started(code_digest(start.path))

    def answer(self, call: Call) -> Answer:
        if isinstance(call, Draw):
            return self._draw(call)
        if isinstance(call, Judge):
            return self._judge(call)
        raise TypeError(f"call: expected Draw or Judge, found {type(call).__name__}")

    def _draw(self, call: Draw) -> Drawn:
        rng = random.Random(call.seed)
        found = list(self._environment.prompts(call.member, rng, call.n, call.held_out))
        if len(found) != call.n:
            raise ValueError(f"prompts: expected {call.n}, found {len(found)}")
        return Drawn(tuple(self._with_ids(Prompt(text=p) if isinstance(p, str) else p) for p in found))

    def _with_ids(self, prompt: Prompt) -> Prompt:
        ids = prompt.ids or tuple(self._tokenizer.encode(prompt.text))
        if not ids:
            raise ValueError(f"prompts: expected text or ids, found an empty prompt {prompt!r:.200}")
        return Prompt(text=prompt.text, ids=tuple(int(i) for i in ids), info=prompt.info)

    def _judge(self, call: Judge) -> Score:
        completion = Completion(ids=call.ids, text=self._tokenizer.decode(call.ids), finish=call.finish)
        found = self._environment.score(call.member, call.prompt, completion)
        if isinstance(found, Score):
            return Score(float(found.reward), {str(k): float(v) for k, v in found.details.items()})
        if isinstance(found, str | bytes):
            raise TypeError(f"score: expected a number or a Score, found {type(found).__name__}")
        return Score(float(found))


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    calls = os.fdopen(os.dup(0), "rb")

    def reply(value: Answer) -> None:
        answers.write(dump(value))
        answers.flush()

    try:
        worker = Worker(read(calls))
    except Exception as e:
        reply(Failed(f"{e}", traceback.format_exc()))
        return
    reply(worker.started)
    while True:
        try:
            call = read(calls)
        except EOFError:
            return
        try:
            found = worker.answer(call)
        except Exception as e:
            found = Failed(f"{type(e).__name__}: {e}", traceback.format_exc())
        reply(found)


if __name__ == "__main__":
    main()
