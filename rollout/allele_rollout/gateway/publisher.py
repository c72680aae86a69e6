"""How adapters get into the engine: many in one call from shared memory, or one call each from folders.

    Bulk    arena in shared memory ─ POST /allele/upsert ─► the engine maps the rows      (plugin allele_bulk)
    Native  PEFT folder ─ POST /load_lora_adapter ─► the engine reads it                  (any SGLang)

Which one is open is asked at each start of the engine. Both hold an adapter in the host memory of the engine's side;
Bulk keeps the bytes over a restart of the engine, Native loses them with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from allele.protocol.errors import InvalidRequest, ProtocolError
from allele.residency import Tier
from allele.residency.space import pages
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.arena import Arena
from allele_rollout.gateway.client import EngineGone, EngineRefused

_log = logging.getLogger(__name__)

PublishPath = Literal["Bulk", "Native"]


class Engine(Protocol):
    """Of the engine's API, what publishing uses."""

    async def upsert(self, files: Sequence[Mapping[str, Any]], remove: Sequence[str]) -> None: ...

    async def load(self, name: str, folder: str) -> None: ...

    async def unload(self, name: str) -> None: ...


class Publisher(Protocol):
    """Puts adapters into the engine and takes them out."""

    path: PublishPath

    def tier(self) -> Tier[str]:
        """Of what the host memory can hold: empty."""
        ...

    def size(self, adapter: Adapter) -> int:
        """What an adapter takes of that."""
        ...

    def reserve(self, adapter: Adapter) -> bool:
        """Whether there is room for it now, which is then its own until `unload`; `release` if it is not loaded."""
        ...

    def release(self, adapter: Adapter) -> None: ...

    async def load(self, found: Mapping[Adapter, bytes]) -> dict[Adapter, ProtocolError]:
        """Put reserved adapters in; those that failed, and why. Does not raise."""
        ...

    async def unload(self, names: Sequence[str]) -> None:
        """Take out what no request uses. Raises EngineGone, or EngineRefused."""
        ...

    async def restore(self) -> set[str]:
        """After a start of the engine, put in again what was loaded; names of what is lost. Raises EngineGone."""
        ...


class Bulk:
    """Any number of adapters in one call."""

    path: PublishPath = "Bulk"

    def __init__(self, engine: Engine, arena: Arena) -> None:
        self._engine = engine
        self._arena = arena
        self._offsets: dict[str, int] = {}
        self._loaded: dict[str, Adapter] = {}

    def tier(self) -> Tier[str]:
        return Tier(capacity=self._arena.space.capacity)

    def size(self, adapter: Adapter) -> int:
        return pages(adapter.weights.length)

    def reserve(self, adapter: Adapter) -> bool:
        offset = self._arena.space.take(adapter.weights.length)
        if offset is None:
            return False
        self._offsets[adapter.engine_name] = offset
        return True

    def release(self, adapter: Adapter) -> None:
        self._forget(adapter.engine_name)

    async def load(self, found: Mapping[Adapter, bytes]) -> dict[Adapter, ProtocolError]:
        try:
            await asyncio.to_thread(self._write, found)
        except OSError as e:
            return dict.fromkeys(found, ProtocolError(f"host tier: {self._arena.path}: {e}"))
        return await self._upsert(list(found))

    async def unload(self, names: Sequence[str]) -> None:
        await self._engine.upsert([], names)
        for name in names:
            self._forget(name)

    async def restore(self) -> set[str]:
        failed = await self._upsert(list(self._loaded.values()))
        for adapter, error in failed.items():
            if isinstance(error, EngineGone):
                raise error
            _log.error("Lost with the engine's restart: %s: %s", adapter.name, error)
            self._forget(adapter.engine_name)
        return {a.engine_name for a in failed}

    def _write(self, found: Mapping[Adapter, bytes]) -> None:
        for adapter, data in found.items():
            self._arena.write(self._offsets[adapter.engine_name], data)

    async def _upsert(self, adapters: list[Adapter]) -> dict[Adapter, ProtocolError]:
        """The engine takes all or none; what it refuses is found by halving."""
        if not adapters:
            return {}
        try:
            await self._engine.upsert(self._files(adapters), [])
        except EngineRefused as e:
            if len(adapters) == 1:
                (adapter,) = adapters
                return {adapter: InvalidRequest(f"adapter {adapter.name}: {e}")}
            half = len(adapters) // 2
            return await self._upsert(adapters[:half]) | await self._upsert(adapters[half:])
        except EngineGone as e:
            return dict.fromkeys(adapters, e)
        self._loaded.update((a.engine_name, a) for a in adapters)
        return {}

    def _files(self, adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
        rows: dict[bytes, dict[str, int]] = {}
        for a in adapters:
            rows.setdefault(a.config, {})[a.engine_name] = self._offsets[a.engine_name]
        path = str(self._arena.path.absolute())
        return [{"path": path, "config": json.loads(config), "rows": some} for config, some in rows.items()]

    def _forget(self, name: str) -> None:
        self._loaded.pop(name, None)
        offset = self._offsets.pop(name, None)
        if offset is not None:
            self._arena.space.give_back(offset)


class Native:
    """One adapter a call, by the engine's own endpoints."""

    path: PublishPath = "Native"

    def __init__(self, engine: Engine, folder: Path, *, places: int) -> None:
        """`folder`: where the engine finds a PEFT folder while it reads it."""
        self._engine = engine
        self._folder = folder
        self._places = places
        self._taken: set[str] = set()

    def tier(self) -> Tier[str]:
        return Tier(places=self._places)

    def size(self, adapter: Adapter) -> int:
        return adapter.weights.length

    def reserve(self, adapter: Adapter) -> bool:
        if len(self._taken) >= self._places:
            return False
        self._taken.add(adapter.engine_name)
        return True

    def release(self, adapter: Adapter) -> None:
        self._taken.discard(adapter.engine_name)

    async def load(self, found: Mapping[Adapter, bytes]) -> dict[Adapter, ProtocolError]:
        failed: dict[Adapter, ProtocolError] = {}
        for adapter, data in found.items():
            folder = await asyncio.to_thread(_peft_folder, self._folder, adapter, data)
            try:
                await self._engine.load(adapter.engine_name, str(folder))
            except EngineRefused as e:
                # The name holds revision and digest, so what is there under it is right.
                if "already loaded" not in str(e):
                    failed[adapter] = InvalidRequest(f"adapter {adapter.name}: {e}")
            except EngineGone as e:
                failed[adapter] = e
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return failed

    async def unload(self, names: Sequence[str]) -> None:
        for name in names:
            await self._engine.unload(name)
            self._taken.discard(name)

    async def restore(self) -> set[str]:
        lost, self._taken = self._taken, set()
        return lost


def _peft_folder(root: Path, adapter: Adapter, data: bytes) -> Path:
    folder = root.absolute() / f".peft-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_bytes(adapter.config)
    return folder
