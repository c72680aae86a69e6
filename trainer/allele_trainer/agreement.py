"""The same outcome on every rank of what may go wrong on one: a store that answers one process and not another.

Ranks execute the same commands and must refuse the same ones, or their rows part. So reads and writes, the only steps
whose failure is not decided by the command alone, are agreed upon before anything follows from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from allele.protocol.errors import ErrorReply, ProtocolError, raise_reply
from allele_trainer.parallel import Ranks

T = TypeVar("T")


def agreed(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` gives here; raises on every rank, if it raises a ProtocolError on any, that of the lowest rank.

    Collective. Any other exception is raised where it happens: the process ends, and the other ranks with it.
    """
    if ranks.size == 1:
        return work()
    error: ProtocolError | None = None
    try:
        found = work()
    except ProtocolError as e:
        error = e
    told = ranks.gather(error.reply().model_dump_json().encode() if error is not None else b"")
    first = next((data for data in told if data), None)
    if first is not None:
        raise_reply(ErrorReply.model_validate_json(first))
    return found
