"""Replies of the tenant port as its OpenAPI document describes them; the engine writes them, so more may be in them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int


class TokenLogprob(BaseModel):
    token: str
    bytes: list[int] | None = None
    logprob: float


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob] | None = None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int]


Finish = Literal["stop", "length", "tool_calls", "content_filter", "function_call", "abort"]


class Message(BaseModel):
    role: Literal["assistant"]
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Finish | None


class Side(BaseModel):
    text: str = Field(description="The answer, in the words of the surest member.")
    votes: int
    members: list[str]


class VoteCount(BaseModel):
    winner: str = Field(description="The member whose answer this is.")
    split: list[Side] = Field(description="Who said what, the winning side first.")
    revisions: dict[str, int | None] = Field(description="The revision that answered, by member.")
    failed: dict[str, str] = Field(description="Why a member has no vote.")


class Extension(BaseModel):
    vote: VoteCount


class Reply(BaseModel):
    id: str
    created: int
    model: str = Field(description="As the client sent it; the header x-allele-revision holds the revision.")
    usage: Usage
    allele: Extension | None = Field(None, description="With vote only.")


class ChatCompletion(Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Completion(Reply):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelPage(BaseModel):
    object: Literal["list"]
    data: list[Model]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Error(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    error: Error


class Health(BaseModel):
    engine: Literal["Starting", "Ready", "Failed"]
