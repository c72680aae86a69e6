"""SGLang plugin that closes four ways in which one request stops the whole server (0.5.21), and aborts by prefix.

- Token ids outside the vocabulary, which tenants may send (`prompt` of /v1/completions), are not checked: the
  embedding lookup fails in the scheduler and the server dies.
- An adapter's count of running requests is wrong after a refused request (not taken back) and after `n` > 1 (taken back
  n + 1 times). Its unload then waits for ever with the lock that every other load needs.
- A grammar that no token of the vocabulary fits leaves nothing to sample from, and the scheduler dies of it.
- A streamed request with `n` > 1 leaves states of requests behind that were never sent. Such an unload waits for them.

`/abort_request` knows whole request ids only, although the scheduler aborts by prefix; an id that ends in `/` is one.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from typing import Any

from allele_rollout.engine.plugin import applied_once

PLUGIN = "allele_guard"
_VALIDATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
_WAIT = "sglang.srt.lora.lora_registry.LoRARegistry.wait_for_unload"
_BATCH = "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_request"
_ABORT = "sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request"
_LOGITS = "sglang.srt.layers.sampler.Sampler._preprocess_logits"
_INIT = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.init_communicators"
_LOOK_AGAIN = 0.01
"""Seconds between looks at the running requests, while an unload waits for them."""
_LATE = 60.0
"""Seconds for which the count of an unloaded adapter stays, for requests that still take theirs back."""

_managers: weakref.WeakSet[Any] = weakref.WeakSet()


def register() -> None:
    """Entry point; called in each process of the server."""
    applied_once(PLUGIN, _apply)


def _apply() -> None:
    from pkgutil import resolve_name

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook, kind in (
        (_VALIDATE, refuse_foreign_ids, HookType.BEFORE),
        (_INIT, remember_manager, HookType.AFTER),
        (_WAIT, wait_for_requests, HookType.REPLACE),
        (_BATCH, drop_unsent, HookType.AROUND),
        (_ABORT, abort_by_prefix, HookType.BEFORE),
        (_LOGITS, leave_a_choice, HookType.AFTER),
    ):
        module, name, attribute = target.rsplit(".", 2)
        getattr(resolve_name(f"{module}:{name}"), attribute)  # fails here, loudly, when the version does not fit
        HookRegistry.register(target, hook, kind)


def refuse_foreign_ids(tokenizer_manager: Any, obj: Any, input_ids: list[int] | None) -> None:
    """Raises ValueError, which the server answers with 400."""
    size = tokenizer_manager.model_config.vocab_size
    if input_ids is not None and len(input_ids) == 0:
        raise ValueError("input_ids: expected at least one token id, found none")
    if input_ids is not None and not (min(input_ids) >= 0 and max(input_ids) < size):
        wrong = next(i for i in input_ids if not 0 <= i < size)
        raise ValueError(f"input_ids: expected ids from 0 to {size - 1}, found {wrong}")


def remember_manager(_result: Any, tokenizer_manager: Any) -> None:
    _managers.add(tokenizer_manager)


def leave_a_choice(logits: Any, _sampler: Any, _logits: Any, sampling_info: Any) -> None:
    """Rows `[B, V]` that are −inf throughout become even: the grammar then refuses the token, and that request ends."""
    if sampling_info.grammars:
        logits.masked_fill_(logits.amax(-1, keepdim=True) == -float("inf"), 0.0)


async def drop_unsent(
    handle: Any, tokenizer_manager: Any, obj: Any, request: Any = None, request_rids: Any = None
) -> AsyncIterator[Any]:
    """The batch's answers; after them none of its requests is left."""
    async for answer in handle(tokenizer_manager, obj, request, request_rids):
        yield answer
    tokenizer_manager._release_req_states_on_failure(obj.rid)


def abort_by_prefix(tokenizer_manager: Any, rid: str = "", abort_all: bool = False) -> None:
    """One message to the scheduler for all requests below a prefix; the original then finds no such id."""
    if abort_all or not rid.endswith("/"):
        return
    from sglang.srt.managers.io_struct import AbortReq

    if any(live.startswith(rid) for live in tokenizer_manager.rid_to_state):
        tokenizer_manager._dispatch_to_scheduler(AbortReq(rid=rid))


async def wait_for_requests(registry: Any, lora_id: str) -> None:
    """Return when no request that is really there uses the adapter, whatever its count says."""
    while _in_use(lora_id):  # noqa: ASYNC110  requests end without telling anyone
        await asyncio.sleep(_LOOK_AGAIN)
    asyncio.get_running_loop().call_later(_LATE, registry._counters.pop, lora_id, None)


def _in_use(lora_id: str) -> bool:
    used = (state.obj.lora_id for manager in _managers for state in list(manager.rid_to_state.values()))
    return any(ids == lora_id or (isinstance(ids, list) and lora_id in ids) for ids in used)
