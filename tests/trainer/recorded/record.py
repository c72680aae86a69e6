"""Records rollouts of 64 members from a running pool, for test_same_bits.py: the engine's own ids and logprobs.

    .venv/bin/python tests/trainer/recorded/record.py http://GATEWAY:8001 NAMESPACE POPULATION

The base answers for every member, as its untrained adapter would; each member's own preference gives the reward.
"""

from __future__ import annotations

import random
import sys
import urllib.request
from pathlib import Path

import pyarrow as pa
from pyarrow import feather

from allele.protocol.samples import COMPLETIONS, PROMPTS, TRAIN, Generate, Generated, decode, encode
from allele_driver.advantages import group_normalised
from allele_driver.tokenizer import HfTokenizer

OUT = Path(__file__).with_name("rollouts.feather")
EXAMPLE = Path(__file__).parents[3] / "examples/preferences"
MEMBERS, PROMPTS_EACH, SAMPLES, STEPS = 64, 2, 8, 2
END = 1


def main(gateway: str, namespace: str, population: str) -> None:
    sys.path.insert(0, str(EXAMPLE))
    from environment import draw_word, preference_of

    tokenizer = HfTokenizer((EXAMPLE / "base/tokenizer.json").read_text(), (END,))
    rng = random.Random(7)
    rows: list[dict[str, object]] = []
    for step in range(STEPS):
        asked = [(m, draw_word(rng, held=False)) for m in range(MEMBERS) for _ in range(PROMPTS_EACH)]
        ids = [tokenizer.encode(word + "=") for _, word in asked]
        header = Generate(namespace=namespace, population=population, n=SAMPLES, max_tokens=8, stop_token_ids=(END,))
        columns = {"member": [f"m{m}" for m, _ in asked], "revision": [None] * len(asked), "prompt": ids}
        with urllib.request.urlopen(f"{gateway}/v1/generate", encode(header, PROMPTS, columns), timeout=300) as reply:
            answers = decode(reply.read(), Generated, COMPLETIONS)[1].to_pylist()
        for i, (member, word) in enumerate(asked):
            group = answers[i * SAMPLES : (i + 1) * SAMPLES]
            assert all(a["request"] == i and a["error"] is None for a in group)
            texts = [tokenizer.decode(a["completion"]) + ("" if a["finish"] == "stop" else "?") for a in group]
            rewards = [preference_of(member).reward(word, text) for text in texts]
            for answer, advantage in zip(group, group_normalised(rewards), strict=True):
                if advantage is not None:
                    kept = {k: answer[k] for k in ("completion", "logprobs")}
                    rows.append({"step": step, "member": f"m{member}", "prompt": ids[i], "advantage": advantage} | kept)
    schema = TRAIN.insert(0, pa.field("step", pa.int32()))
    feather.write_feather(pa.Table.from_pylist(rows, schema=schema), OUT, compression="zstd")
    print(f"{OUT}: {len(rows)} samples of {len({r['member'] for r in rows})} members, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
