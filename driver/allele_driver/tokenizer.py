"""The base model's tokenizer, read from the base's folder in the store: the driver needs nothing else of the base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as RustTokenizer  # type: ignore[import-untyped]  # it has no stubs


class HfTokenizer:
    """tokenizer.json of a Hugging Face model."""

    def __init__(self, content: str, stop_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = RustTokenizer.from_str(content)
        self.content = content
        self.stop_token_ids = stop_token_ids

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.content.encode()).hexdigest()}"

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without the special tokens that a template adds."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def chat_template_digest(jinja: bytes | None, tokenizer_config: bytes | None) -> str:
    """Digest of chat_template.jinja, or else of `chat_template` in tokenizer_config.json (a list of named ones as
    canonical JSON); empty when the base has none."""
    found: Any = jinja
    if found is None and tokenizer_config:
        found = json.loads(tokenizer_config).get("chat_template")
    if not found:
        return ""
    if isinstance(found, list):
        found = json.dumps(found, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(found if isinstance(found, bytes) else found.encode()).hexdigest()}"


def stop_tokens(generation_config: bytes | None, config: bytes) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, or else of config.json: one id or several."""
    for data in (generation_config, config):
        found: Any = json.loads(data).get("eos_token_id") if data else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()
