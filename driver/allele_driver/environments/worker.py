"""`python -m allele_driver.environments.worker`: the process in which user code runs.

One call at a time, in order, until stdin closes. User code that prints does so to stderr: stdout carries the answers.
"""

from __future__ import annotations

import dataclasses
import os
import random
import traceback
from typing import Any

from allele_driver.environments import Answer, Completion, Lesson, Pair, Prompt, Said, Score, calls
from allele_driver.environments.calls import Call, Draw, Drawn, Failed, Give, Given, Judge, Start, Started, Text
from allele_driver.environments.load import build, code_digest, data_digest
from allele_driver.tokenizer import HfTokenizer


class Worker:
    """An environment behind calls."""

    def __init__(self, start: Start) -> None:
        self._tokenizer = HfTokenizer(start.tokenizer, start.stop_token_ids)
        # Any: which methods it has beside the usual was checked by name.
        self._environment: Any = build(start.path, self._tokenizer, start.parameters, methods=start.methods)
        self.started = Started(code_digest(start.path), data_digest(self._environment, start.path))

    def answer(self, call: Call) -> calls.Answer:
        if isinstance(call, Draw):
            return self._draw(call)
        if isinstance(call, Give):
            return self._give(call)
        if isinstance(call, Judge):
            return self._teach(call) if call.teach else self._judge(call)
        raise TypeError(f"call: expected Draw, Give or Judge, found {type(call).__name__}")

    def _draw(self, call: Draw) -> Drawn:
        rng = random.Random(call.seed)
        found = list(self._environment.prompts(call.member, rng, call.n, call.held_out))
        if len(found) != call.n:
            raise ValueError(f"prompts: expected {call.n}, found {len(found)}")
        return Drawn(tuple(self._prompt(p) for p in found))

    def _give(self, call: Give) -> Given:
        found = list(getattr(self._environment, call.what)(call.member, random.Random(call.seed), call.n))
        if len(found) != call.n:
            raise ValueError(f"{call.what}: expected {call.n}, found {len(found)}")
        wanted = Pair if call.what == "pairs" else Answer
        texts: list[Text] = []
        for item in found:
            if not isinstance(item, wanted):
                raise TypeError(f"{call.what}: expected {wanted.__name__}, found {type(item).__name__}")
            said = (item.said,) if isinstance(item, Answer) else (item.chosen, item.rejected)
            prompt = self._prompt(item.prompt).ids
            texts += [self._text(prompt, s) for s in said]
        return Given(tuple(texts))

    def _text(self, prompt: tuple[int, ...], said: Said | str) -> Text:
        said = Said(text=said) if isinstance(said, str) else said
        ids = tuple(int(i) for i in said.ids)
        ids = ids or (*self._tokenizer.encode(said.text), *self._tokenizer.stop_token_ids[:1])
        if said.reference and len(said.reference) != len(ids):
            raise ValueError(f"reference: expected {len(ids)} log-probabilities, found {len(said.reference)}")
        return Text(prompt, ids, tuple(float(v) for v in said.reference))

    def _prompt(self, prompt: Prompt | str) -> Prompt:
        prompt = Prompt(text=prompt) if isinstance(prompt, str) else prompt
        ids = prompt.ids or tuple(self._tokenizer.encode(prompt.text))
        if not ids:
            raise ValueError(f"prompts: expected text or ids, found an empty prompt {prompt!r:.200}")
        teacher = prompt.teacher_ids or tuple(self._tokenizer.encode(prompt.teacher))
        return dataclasses.replace(prompt, ids=tuple(int(i) for i in ids), teacher_ids=tuple(int(i) for i in teacher))

    def _judge(self, call: Judge) -> Score:
        found = self._environment.score(call.member, call.prompt, self._completion(call))
        if isinstance(found, Score):
            return Score(float(found.reward), {str(k): float(v) for k, v in found.details.items()})
        if isinstance(found, str | bytes):
            raise TypeError(f"score: expected a number or a Score, found {type(found).__name__}")
        return Score(float(found))

    def _teach(self, call: Judge) -> Lesson:
        found = self._environment.teach(call.member, call.prompt, self._completion(call))
        if not isinstance(found, Lesson):
            raise TypeError(f"teach: expected a Lesson, found {type(found).__name__}")
        k, places = call.teach, len(call.ids)
        if not len(found.ids) == len(found.logprobs) == k * places:
            raise ValueError(
                f"teach: expected {k} ids and logprobs (topK) at each of {places} places, {k * places} in all, found "
                f"{len(found.ids)} ids and {len(found.logprobs)} logprobs"
            )
        if any(len(set(found.ids[i : i + k])) < k for i in range(0, k * places, k)):
            raise ValueError("teach: expected the ids of a place to be different, found one twice")
        return Lesson(tuple(int(i) for i in found.ids), tuple(float(v) for v in found.logprobs))

    def _completion(self, call: Judge) -> Completion:
        return Completion(ids=call.ids, text=self._tokenizer.decode(call.ids), finish=call.finish)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    stream = os.fdopen(os.dup(0), "rb")

    def reply(value: calls.Answer) -> None:
        answers.write(calls.dump(value))
        answers.flush()

    try:
        worker = Worker(calls.read(stream))
    except Exception as e:
        reply(Failed(f"{e}", traceback.format_exc()))
        return
    reply(worker.started)
    while True:
        try:
            call = calls.read(stream)
        except EOFError:
            return
        try:
            found = worker.answer(call)
        except Exception as e:
            found = Failed(f"{type(e).__name__}: {e}", traceback.format_exc())
        reply(found)


if __name__ == "__main__":
    main()
