"""The tokenizer manager's side of a bulk upsert: names, and when weights that no name leads to may go.

    POST /allele/upsert {"files": [{"path": ..., "config": {adapter_config}, "rows": {name: offset}}], "remove": [name]}
    ─► 200 {"loaded": n, "removed": n}  |  400 {"error": ...} and nothing changed  |  501 {"error": ...}: not here

At `offset` of the file a packed adapter (a safetensors file) begins. A name that is loaded already leads to the new
weights from now on. Requests that run finish on the weights they began with; the answer comes when all that was
removed has left the engine, so that the caller may write over its bytes. An empty call changes nothing and tells
whether this way is open.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from allele_rollout.engine.bulk.scheduler import AlleleRows

PATH = "/allele/upsert"
_LOOK_AGAIN = 0.005
"""Seconds between looks at the running requests, while weights wait for them to end."""
_LATE = 60.0
"""Seconds for which the counts of dropped adapters stay, for requests that still take theirs back."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    config: dict[str, Any]
    rows: dict[str, int]


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    files: list[File] = []
    remove: list[str] = []


class BulkUpsert:
    """Upserts of one tokenizer manager."""

    def __init__(self, tokenizer_manager: Any) -> None:
        self._manager = tokenizer_manager
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, data: bytes) -> dict[str, int]:
        """Raises ValueError, and then nothing has changed."""
        self._check_server()
        try:  # the schedulers check types as they decode, and do not survive a failure there
            body = msgspec.json.decode(data, type=Body)
        except msgspec.MsgspecError as e:
            raise ValueError(f"body: {e}") from None
        names = [name for f in body.files for name in f.rows]
        if len({*names, *body.remove}) < len(names) + len(body.remove):
            raise ValueError("files, remove: expected each name once")
        refs = await self._load(body.files) if names else {}
        removed, moved = await self._switch(refs, body.remove)
        if moved:
            task = asyncio.create_task(self._drop(moved))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if removed:
            await self._drop(removed)
        return {"loaded": len(refs), "removed": len(removed)}

    def _check_server(self) -> None:
        from sglang.srt.runtime_context import get_lora, get_parallel

        self._manager.auto_create_handle_loop()
        if not get_lora().enable_lora:
            raise ValueError("expected a server with --enable-lora")
        if get_parallel().dp_size != 1 or get_parallel().enable_dp_attention:
            raise ValueError("expected a server without data parallelism")
        if get_lora().max_loaded_loras is not None:
            raise ValueError("expected a server without --max-loaded-loras: an evicted row cannot be reloaded")

    async def _load(self, files: Sequence[File]) -> dict[str, Any]:
        """Name → LoRARef of what all schedulers now hold, under ids that nobody uses yet."""
        from sglang.srt.lora.lora_registry import LoRARef

        refs: dict[str, Any] = {}
        message = AlleleRows()
        for file in files:
            rows = []
            for name, offset in file.rows.items():
                refs[name] = ref = LoRARef(lora_name=name, lora_path=file.path, pinned=False)
                rows.append((ref.lora_id, name, offset))
            message.files.append((file.path, json.dumps(file.config, sort_keys=True), rows))
        async with self._manager.lora_update_lock:
            results = await self._manager.update_lora_adapter_communicator(message)
            failed = [r.error_message for r in results if not r.success]
            if failed:
                ids = [r.lora_id for r in refs.values()]
                await self._manager.update_lora_adapter_communicator(AlleleRows(drop=ids))
                raise ValueError(" | ".join(dict.fromkeys(failed)))
        return refs

    async def _switch(self, refs: Mapping[str, Any], remove: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Point the names at their new weights, forget others; lora id → name of what is removed, and replaced."""
        from sglang.srt.utils import ConcurrentCounter

        registry = self._manager.lora_registry
        removed: dict[str, str] = {}
        moved: dict[str, str] = {}
        async with registry._registry_lock.writer_lock:
            for name in (*remove, *refs):
                if (old := registry._registry.pop(name, None)) is not None:
                    (moved if name in refs else removed)[old.lora_id] = name
                # For reloads by path after an eviction, which a row does not have.
                self._manager.lora_ref_cache.pop(name, None)
            for name, ref in refs.items():
                registry._registry[name] = ref
                registry._counters[ref.lora_id] = ConcurrentCounter()
        return removed, moved

    async def _drop(self, ids: Mapping[str, str]) -> None:
        """Take weights out of the schedulers as soon as no request uses them."""
        left = dict(ids)
        while left:
            busy = _used(self._manager.rid_to_state.values(), left)
            idle = [i for i in left if i not in busy]
            if idle:
                await self._manager.update_lora_adapter_communicator(AlleleRows(drop=idle))
                for i in idle:
                    del left[i]
                    counters = self._manager.lora_registry._counters
                    asyncio.get_running_loop().call_later(_LATE, counters.pop, i, None)
            if left:
                await asyncio.sleep(_LOOK_AGAIN)


def _used(states: Collection[Any], ids: Mapping[str, str]) -> set[str]:
    """Those of `ids` (lora id → name) that a request uses, or may have looked up: its id is not written down yet."""
    used: set[str] = set()
    unresolved: set[str] = set()
    for state in list(states):
        lora_id, path = state.obj.lora_id, state.obj.lora_path
        if lora_id is None and path is not None:
            unresolved.update([path] if isinstance(path, str) else filter(None, path))
        elif lora_id is not None:
            used.update([lora_id] if isinstance(lora_id, str) else filter(None, lora_id))
    return {i for i, name in ids.items() if i in used or name in unresolved}


def add_route(upsert: BulkUpsert | str) -> None:
    """Before the HTTP server serves; a text instead says why this way is closed."""
    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    if server is None:  # an offline Engine has no routes
        return

    async def on_upsert(request: server.Request) -> Any:  # type: ignore[name-defined]
        if isinstance(upsert, str):
            return server.ORJSONResponse({"error": upsert}, status_code=501)
        try:
            return server.ORJSONResponse(await upsert(await request.body()))
        except ValueError as e:
            return server.ORJSONResponse({"error": str(e)}, status_code=400)

    # FastAPI reads the annotation, which is a text here.
    on_upsert.__annotations__["request"] = server.Request
    level = server.auth_level(server.AuthLevel.ADMIN_OPTIONAL)
    server.app.add_api_route(PATH, level(on_upsert), methods=["POST"])
