"""SGLang plugin that refuses token ids outside the vocabulary.

SGLang 0.5.21 checks logit_bias and the like but not the prompt's ids, which tenants may send (`prompt` of
/v1/completions): the embedding lookup then fails in the scheduler, and the whole server dies with all its adapters.
"""

from __future__ import annotations

from typing import Any

from allele_rollout.engine.plugin import applied_once

PLUGIN = "allele_guard"
_TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"


def register() -> None:
    """Entry point; called in each process of the server."""
    applied_once(PLUGIN, _apply)


def _apply() -> None:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    TokenizerManager._validate_one_request  # noqa: B018  an AttributeError here is a version that the hook does not fit
    HookRegistry.register(_TARGET, refuse_foreign_ids, HookType.BEFORE)


def refuse_foreign_ids(tokenizer_manager: Any, obj: Any, input_ids: list[int] | None) -> None:
    """Raises ValueError, which the server answers with 400."""
    size = tokenizer_manager.model_config.vocab_size
    if input_ids is not None and len(input_ids) == 0:
        raise ValueError("input_ids: expected at least one token id, found none")
    if input_ids is not None and not (min(input_ids) >= 0 and max(input_ids) < size):
        wrong = next(i for i in input_ids if not 0 <= i < size)
        raise ValueError(f"input_ids: expected ids from 0 to {size - 1}, found {wrong}")
