"""What of SGLang the bulk plugin stands in for, calls or imitates, as of the version it was read in.

A difference means that the plugin has to be read again beside the new source: it is off until then, and adapters go
through the engine's own endpoints, one call each. After reading, and after tests/rollout passed,
`python -m allele_rollout.engine.bulk.seen` prints the new digests.
"""

from __future__ import annotations

import hashlib
import inspect
import pkgutil

POOL = "sglang.srt.lora.mem_pool.LoRAMemoryPool."
CONTROL = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin."
_MANAGER = "sglang.srt.lora.lora_manager.LoRAManager."
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager."

SEEN = {
    CONTROL + "init_communicators": "8144e92266a773af",
    CONTROL + "load_lora_adapter_from_tensors": "6d456cb5be3b6559",
    CONTROL + "_unload_lora_adapter_locked": "932e288dc21e492c",
    _TOKENIZER + "init_lora": "b15e6342aa371172",
    _TOKENIZER + "generate_request": "c230e6cc6990aa64",
    _TOKENIZER + "_init_req_state": "0e1a936d389a9a55",
    _TOKENIZER + "_resolve_lora_path": "2c6c7671911ca92b",
    _TOKENIZER + "_release_req_states_on_failure": "7bc8b3c8b71c8d6e",
    "sglang.srt.lora.lora_registry.LoRARegistry": "a0e1e97a77240e5d",
    "sglang.srt.managers.communicator.FanOutCommunicator": "c5b8251c211229fa",
    "sglang.srt.managers.io_struct.hook_custom_types": "5b18bee982155391",
    "sglang.srt.managers.io_struct.LoRAUpdateOutput": "8bd14cc2de174795",
    "sglang.srt.lora.lora.LoRAAdapter": "f6a4444065106be9",
    "sglang.srt.lora.lora_config.LoRAConfig": "9700e1c8f50c943e",
    _MANAGER + "validate_new_adapter": "0bf49846db3b5fd2",
    _MANAGER + "_unload_lora_adapter": "0f282464679df952",
    _MANAGER + "load_lora_weights_from_tensors": "88f8659e9311d9b4",
    _MANAGER + "_load_lora_adapter_from_tensors": "6f93637837408e9b",
    _MANAGER + "fetch_new_loras": "9b4202df6f2cecbf",
    _MANAGER + "prepare_lora_batch": "2d4ba70034864a37",
    POOL + "prepare_lora_batch": "1ef9d8c35bd9df9b",
    POOL + "remove_lora": "6cf4f74f858354b2",
    POOL + "init_buffers": "d471c1ddd318ed43",
    POOL + "load_lora_weight_to_buffer": "00085fd17b54d1bb",
    "sglang.srt.lora.utils.copy_weight_into_buffer": "309e4ff5cc4565e6",
}
"""sha256 of the source text, 16 hex digits."""


def changed() -> list[str]:
    """Names whose source is not what was read."""
    return [name for name, seen in SEEN.items() if digest(name) != seen]


def digest(name: str) -> str:
    """Of a function or class of SGLang; `missing` when there is none of this name."""
    try:
        return hashlib.sha256(inspect.getsource(pkgutil.resolve_name(name)).encode()).hexdigest()[:16]
    except (AttributeError, ImportError):
        return "missing"


if __name__ == "__main__":
    for name in SEEN:
        print(f"{digest(name)}  {name}")
