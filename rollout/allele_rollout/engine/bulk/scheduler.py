"""The scheduler's side of a bulk upsert: one message puts adapters in, or takes some out.

Exceptions must not leave the handler: one that does ends the server.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import BaseReq, LoRAUpdateOutput

from allele_rollout.engine.bulk.rows import RowAdapter, Shelf

_log = logging.getLogger(__name__)
_SHELF = "_allele_shelf"


class AlleleRows(BaseReq, kw_only=True):  # type: ignore[call-arg]  # msgspec's, which mypy does not see
    """Tokenizer manager to schedulers; answered by a LoRAUpdateOutput. All of `files` is taken, or none."""

    files: list[tuple[str, str, list[tuple[str, str, int]]]] = msgspec.field(default_factory=list)
    """(path, adapter_config JSON, [(lora id, name, offset)])."""
    drop: list[str] = msgspec.field(default_factory=list)
    """lora ids; unknown ones are ignored."""


def add_handler(_result: Any, scheduler: Any) -> None:
    """After `Scheduler.init_request_dispatcher`."""
    from sglang.utils import TypeBasedDispatcher

    def handle(message: AlleleRows) -> LoRAUpdateOutput:
        return apply(scheduler.tp_worker.model_runner.lora_manager, message)

    scheduler._request_dispatcher += TypeBasedDispatcher([(AlleleRows, handle)])


def apply(manager: Any, message: AlleleRows) -> LoRAUpdateOutput:
    try:
        _load(manager, message.files)
        _drop(manager, message.drop)
    except Exception as e:
        _log.exception("Bulk upsert refused")
        return LoRAUpdateOutput(success=False, error_message=f"{type(e).__name__}: {e}")
    return LoRAUpdateOutput(success=True)


def _load(manager: Any, files: list[tuple[str, str, list[tuple[str, str, int]]]]) -> None:
    from sglang.srt.lora.lora_registry import LoRARef

    shelf: Shelf = manager.__dict__.setdefault(_SHELF, Shelf())
    opened = [
        (path, rows, shelf.adapters(manager, path, config, [offset for _, _, offset in rows]))
        for path, config, rows in files
    ]
    for path, rows, adapters in opened:
        for (lora_id, name, _), adapter in zip(rows, adapters, strict=True):
            manager.loras[lora_id] = adapter
            manager.configs[lora_id] = adapter.config
            manager.lora_refs[lora_id] = LoRARef(lora_id, name, path, False)


def _drop(manager: Any, ids: list[str]) -> None:
    """LoRAManager._unload_lora_adapter for many, without its list of all adapters and its query of free memory."""
    slots = set()
    for lora_id in ids:
        event = manager.pending_lora_load_events.pop(lora_id, None)
        if event is not None:
            event.synchronize()
        slots.add(manager.memory_pool.remove_lora(lora_id))
        manager.loras.pop(lora_id, None)
        manager.configs.pop(lora_id, None)
        ref = manager.lora_refs.pop(lora_id, None)
        manager.num_pinned_loras -= bool(ref and ref.pinned)
    slots.discard(None)
    if slots:
        manager._notify_lora_slots_updated(slots)


def fill_slot(original: Any, pool: Any, uid: Any, buffer_id: int, adapter: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `LoRAMemoryPool.load_lora_weight_to_buffer`: ours from the row, all others as before."""
    if isinstance(adapter, RowAdapter):
        return adapter.fill(pool, buffer_id)
    return original(pool, uid, buffer_id, adapter, *args, **kwargs)
