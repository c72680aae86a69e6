"""What a base's folder says beside its weights: where completions end, and how a chat becomes a prompt."""

from __future__ import annotations

import hashlib
import json

import pytest

from allele_driver.tokenizer import chat_template_digest, stop_tokens

TEMPLATE = "{{ messages[0]['content'] }} é"
NAMED = [{"template": "b", "name": "tool_use"}, {"name": "default", "template": "a"}]


def digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@pytest.mark.parametrize(
    ("jinja", "config", "expected"),
    [
        (None, {"chat_template": TEMPLATE}, digest(TEMPLATE)),
        (TEMPLATE.encode(), None, digest(TEMPLATE)),
        (TEMPLATE.encode(), {"chat_template": "older"}, digest(TEMPLATE)),
        (
            None,
            {"chat_template": NAMED},
            digest('[{"name":"tool_use","template":"b"},{"name":"default","template":"a"}]'),
        ),
        (None, {"pad_token": "x"}, ""),
        (None, None, ""),
    ],
)
def test_the_chat_template_has_one_digest_wherever_it_lies(
    jinja: bytes | None, config: dict[str, object] | None, expected: str
) -> None:
    assert chat_template_digest(jinja, None if config is None else json.dumps(config).encode()) == expected


def test_completions_end_where_the_generation_config_says() -> None:
    config = b'{"eos_token_id": 1}'
    assert stop_tokens(b'{"eos_token_id": [2, 3]}', config) == (2, 3)
    assert stop_tokens(b"{}", config) == stop_tokens(None, config) == (1,)
    assert stop_tokens(None, b"{}") == ()
