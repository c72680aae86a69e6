"""Packing loses no token, keeps each slot's order, and gives a slot the same share whoever else is there."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from allele_trainer.rl.packing import PAD, Sample, micro_batches, pack, width

ids = st.integers(0, 99)
samples = st.lists(
    st.builds(
        Sample,
        owner=st.integers(0, 6),
        prompt=st.lists(ids, min_size=1, max_size=40),
        completion=st.lists(ids, min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=30,
)


@given(samples, st.integers(1, 300))
@settings(deadline=None)
def test_micro_batches_keep_every_sample_within_the_limit_and_depend_on_the_slot_alone(
    found: list[Sample], limit: int
) -> None:
    batches = micro_batches(found, max_tokens=limit)
    for b in batches:
        assert [s.owner for s in b] == sorted(s.owner for s in b)
        assert sum(s.inputs for s in b) <= limit or len(b) == 1
    for slot in {s.owner for s in found}:
        mine = [s for s in found if s.owner == slot]
        shares = [share for b in batches if (share := [s for s in b if s.owner == slot])]
        assert [s for share in shares for s in share] == mine
        assert shares == micro_batches(mine, max_tokens=limit)


@given(samples, st.integers(1, 300))
@settings(deadline=None)
def test_a_pair_is_never_split(found: list[Sample], limit: int) -> None:
    pairs = [dataclasses.replace(s, pair=i) for i, s in enumerate(found) for _ in range(2)]
    batches = micro_batches(pairs, max_tokens=limit)
    for b in batches:
        assert [s.pair for s in b[0::2]] == [s.pair for s in b[1::2]]
        assert sum(s.inputs for s in b) <= limit or len(b) == 2
    assert sorted(s.pair or 0 for b in batches for s in b) == sorted(s.pair or 0 for s in pairs)


@given(samples)
@settings(deadline=None)
def test_each_logit_row_sees_its_sequence_and_predicts_its_token(found: list[Sample]) -> None:
    (batch,) = micro_batches(found, max_tokens=1 << 20)
    p = pack(batch)
    assert p.tokens.size % PAD == 0 and p.rows.size % PAD == 0
    assert p.counts == tuple(sorted(p.counts)) and sum(n for _, n in p.counts) == sum(s.inputs for s in batch)
    row = start = 0
    for s in batch:
        tokens = [*s.prompt, *s.completion[:-1]]
        assert p.tokens[start : start + s.inputs].tolist() == tokens
        assert p.positions[start : start + s.inputs].tolist() == list(range(s.inputs))
        for k, target in enumerate(s.completion):
            assert p.rows[row] == start + len(s.prompt) - 1 + k
            assert (p.targets[row], p.owners[row]) == (target, s.owner)
            row += 1
        start += s.inputs
    assert p.targets.size == row and not p.tokens[start:].any()
    assert list(p.samples) == batch


@given(samples)
@settings(deadline=None)
def test_attention_gathers_whole_sequences_and_scatters_every_token_back(found: list[Sample]) -> None:
    (batch,) = micro_batches(found, max_tokens=1 << 20)
    p = pack(batch)
    size, total = p.tokens.size, sum(s.inputs for s in batch)
    gathered = np.concatenate([b.gather for b in p.buckets] + [[size]])
    assert gathered[p.scatter[:total]].tolist() == list(range(total))
    assert (gathered[p.scatter[total:]] == size).all()
    starts = np.cumsum([0] + [s.inputs for s in batch])
    seen = []
    for bucket in p.buckets:
        for line in bucket.gather.reshape(-1, bucket.width):
            length = int((line < size).sum())
            assert bucket.width == width(length) and (np.diff(line[:length]) == 1).all()
            seen.append((int(line[0]), length))
    assert sorted(seen) == [(int(a), s.inputs) for a, s in zip(starts, batch, strict=False)]
