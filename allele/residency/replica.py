"""A replica for the simulator: what it has, and what its steps cost, each with where it is from.

Yours differ: measure, then set them.
"""

from __future__ import annotations

import dataclasses


def _check(numbers: Setup | Costs) -> None:
    """Counts are at least 1, all else at least 0."""
    for name, value in dataclasses.asdict(numbers).items():
        least = 1 if isinstance(value, int) else 0
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")


@dataclasses.dataclass(frozen=True)
class Setup:
    """A replica."""

    slots: int = 64
    """Adapters in the engine's slots."""
    warm: int = 512
    """Adapters registered, in host memory."""
    disk: int = 2048
    """Adapters on the node's disk."""
    running: int = 64
    """Sequences at once."""
    quantum: int = 16
    """Sequences that a member starts in a turn while others wait for a slot."""
    patience: float = 5.0
    """Seconds after which a request goes before the round robin."""
    loads: int = 8
    """Reads at once."""
    share: float = 0.5
    """Most of the engine's time that registering may take, and of that at most half for what nobody waits for yet."""
    waiting: int = 512
    """Requests that wait; one more is refused."""
    prompt: int = 256
    """Tokens."""
    output: int = 64
    """Tokens."""
    settle: float = 30.0
    """Seconds at the start whose requests are served and not counted: tiers begin empty."""
    stall: float = 5.0
    """Seconds to the first token of a warm request beyond which it counts as stalled."""

    def __post_init__(self) -> None:
        _check(self)
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share: expected more than 0 and at most 1, found {self.share}")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds, unless it says otherwise. The engine does nothing else while it registers, unloads or fills a slot."""

    cold_read: float = 0.020
    """An adapter out of S3. Measured: 5 to 30 ms for 76 KiB to 40 MiB, from a server on the same machine."""
    disk_read: float = 0.003
    """Out of a node's disk, digest checked. Measured: 1 to 20 ms for the same sizes."""
    call: float = 0.005
    """A call that registers adapters, however many. Measured with the bulk plugin on 2 cores."""
    batch: int = 1024
    """Adapters of a call at most."""
    register: float = 0.00003
    """Each adapter of that call. Measured: 1,024 in 15 ms, 8,192 in 77 ms."""
    unload: float = 0.00001
    """Each adapter that goes. Measured: 1,024 in 20 ms beside the reply."""
    fill: float = 0.0015
    """A slot out of host memory. Measured: 0.07 ms (76 KiB), 1.5 ms (1.3 MiB), 9 ms (40 MiB)."""
    prefill: float = 0.00004
    """A token of a prompt. Assumed: 25,000 tokens a second."""
    step: float = 0.025
    """A decoding step of a batch of one adapter. Assumed: 40 tokens a second for each sequence."""
    interleaved: float = 4.4
    """Factor on a step whose neighbours all have different adapters. Measured, against the same batch grouped."""

    def __post_init__(self) -> None:
        _check(self)


BULK = Costs()
"""Adapters come to the engine in bulk, by the plugin."""

NATIVE = Costs(call=0.0, batch=1, register=0.019, unload=0.013)
"""One call an adapter, as SGLang 0.5.21 has it. Measured: 1,024 in 21 s from paths, 13 s to unload them."""

PUBLISHED = Costs(
    cold_read=0.05,
    call=0.0,
    batch=1,
    register=1.36,
    unload=0.0,
    fill=0.009,
    prefill=0.00005,
    step=0.05,
    interleaved=1.5,
)
"""A 30 B base on four GPUs as MinT describes it (arXiv 2605.13779): loads come one after the other, 1.36 s each (16 in
1.375 to 23.267 s). What it does not give is assumed."""
