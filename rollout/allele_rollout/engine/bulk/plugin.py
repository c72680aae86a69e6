"""SGLang plugin: any number of adapters in one call, straight from mapped files (`POST /allele/upsert`).

SGLang takes one adapter a call, tens of milliseconds each and more with every one that is loaded. Three hooks: a route
on the server, a message to the schedulers, and the filling of a slot from a row. When a function of SGLang that this
stands in for has changed, nothing is hooked but the route, which answers 501 and why.
"""

from __future__ import annotations

import logging
from typing import Any

from allele_rollout.engine.bulk.seen import CONTROL, POOL, changed
from allele_rollout.engine.plugin import applied_once

PLUGIN = "allele_bulk"
_log = logging.getLogger(__name__)


def register() -> None:
    """Entry point; called in each process of the server."""
    applied_once(PLUGIN, _apply)


def _apply() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from allele_rollout.engine.bulk.upsert import BulkUpsert, add_route

    init = CONTROL + "init_communicators"
    if names := changed():
        why = f"bulk upsert is off: expected the SGLang that it was written for, found changes in {', '.join(names)}"
        _log.error("%s; adapters are loaded one by one", why)
        if init not in names:
            HookRegistry.register(init, lambda _result, _manager: add_route(why), HookType.AFTER)
        return
    from sglang.srt.managers.io_struct import hook_custom_types

    from allele_rollout.engine.bulk.scheduler import AlleleRows, add_handler, fill_slot

    def offer(_result: Any, tokenizer_manager: Any) -> None:
        add_route(BulkUpsert(tokenizer_manager))

    hook_custom_types(AlleleRows)
    HookRegistry.register(init, offer, HookType.AFTER)
    dispatcher = "sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher"
    HookRegistry.register(dispatcher, add_handler, HookType.AFTER)
    HookRegistry.register(POOL + "load_lora_weight_to_buffer", fill_slot, HookType.AROUND)
