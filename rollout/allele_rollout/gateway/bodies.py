"""Bodies of the tenant port: the models that check a request are the ones that its OpenAPI document is made from.

A field is bounded here where the engine does not bound it: SGLang 0.5.21 takes `n` of −1, and a `top_logprobs` above
the size of the vocabulary ends its scheduler, and with it the server. Fields that are not named here pass to the engine
as they are, so that what it can do beyond OpenAI's API stays within reach; those of `ENGINE_ONLY` do not.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_SEQUENCES = 1024
"""Prompts times `n` of one request."""
MOST_LOGPROBS = 20
_INT32 = 2**31 - 1


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is the integer 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"expected a regular expression: {e}") from e
    return pattern


_WHOLE = BeforeValidator(_whole)
"""Stands after the bounds: before them it would keep them out of the document."""
Token = Annotated[int, Field(ge=0, le=_INT32), _WHOLE]
Pattern = Annotated[str, Field(max_length=256), AfterValidator(_compiles)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(json_schema_extra={"additionalProperties": False}),
]


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="A last chunk with the token counts.")


class Function(Body):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments.")
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: dict[str, Any] | None = None


class Vote(Body):
    """Several members answer, one answer wins: no streaming, `n` of 1, no tools."""

    model_config = ConfigDict(extra="forbid")

    members: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        min_length=2, max_length=64, description="Models that answer, each once."
    )
    rule: Literal["majority"] = Field("majority", description="How the answer is chosen.")

    @model_validator(mode="after")
    def _once(self) -> Self:
        if len(set(self.members)) < len(self.members):
            raise ValueError("members: expected each once")
        return self


class Request(Body):
    """What both kinds of completion share. A field that is null is one that is not there."""

    model: str = Field(
        min_length=1,
        max_length=256,
        description="`population/member`, `population/member@revision`, or the name of the base.",
    )
    n: Annotated[int, Field(ge=1, le=128), _WHOLE] | None = Field(None, description="Answers to each prompt; 1.")
    max_tokens: Annotated[int, Field(ge=1, le=_INT32), _WHOLE] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT32), _WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32), _WHOLE] | None = Field(None, description="−1: all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = None
    logit_bias: Biases | None = Field(None, description="By token id.")
    stop: str | Annotated[list[str], Field(max_length=32)] | None = None
    stop_token_ids: list[Token] | None = None
    stop_regex: Pattern | Annotated[list[Pattern], Field(max_length=32)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), _WHOLE] | None = Field(
        None, description="Passed on; the engine keeps to it only where it was started to."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = None
    ebnf: str | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    vote: Vote | None = None

    @property
    def prompts(self) -> int:
        """Prompts in it."""
        return 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.prompts * (self.n or 1) > MOST_SEQUENCES:
            found = f"{self.prompts} × {self.n or 1}"
            raise ValueError(f"n: expected at most {MOST_SEQUENCES} answers in all, found {found}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected only with stream")
        return self


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT32), _WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), _WHOLE] | None = Field(
        None, description="With logprobs."
    )
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: expected only with logprobs true")
        return self


class TextRequest(Request):
    """`POST /v1/completions`."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_SEQUENCES)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_SEQUENCES)]
    ) = Field(description="A text or token ids, or a list of either.")
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), _WHOLE] | None = Field(
        None, description="0: of the chosen tokens; k: of the k likeliest too."
    )
    echo: bool | None = None

    @property
    def prompts(self) -> int:
        return len(self.prompt) if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else 1
