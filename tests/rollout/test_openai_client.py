"""OpenAI's own client meets what it knows: answers, streams, and its typed exceptions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.pagination import SyncCursorPage
from openai.types import Model

from tests.rollout.rollout_parts import Service, StoredPopulation, random_adapter

Start = Callable[..., Service]
MESSAGES: Any = [{"role": "user", "content": "kbdac="}]
GREEDY: Any = {"max_tokens": 8, "temperature": 0}
TOOL: Any = {
    "type": "function",
    "function": {"name": "lookup", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}


@pytest.fixture
def client(gateway: Start, population: StoredPopulation) -> openai.OpenAI:
    population.commit({"a": random_adapter(1)}, expose=True)
    population.commit({"hidden": random_adapter(2)})
    return client_of(gateway())


def client_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.tenant}/v1", api_key="none", max_retries=0)


def test_a_chat_and_a_text_get_the_same_answer_from_the_revision_that_the_header_names(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="styles/a", messages=MESSAGES, **GREEDY)
    chat = raw.parse()
    text = client.completions.create(model="styles/a", prompt="kbdac=", **GREEDY)
    assert chat.choices[0].message.content == text.choices[0].text
    assert chat.model == text.model == "styles/a" and raw.headers["x-allele-revision"] == "1"
    assert chat.usage is not None and chat.usage.prompt_tokens == 6
    assert chat.usage.total_tokens == 6 + chat.usage.completion_tokens
    assert chat.choices[0].finish_reason in ("stop", "length")
    base = client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, **GREEDY)
    assert base.parse().model == "tiny" and "x-allele-revision" not in base.headers


def test_a_stream_is_the_whole_answer_in_pieces_with_usage_last_when_asked(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="styles/a", messages=MESSAGES, **GREEDY)
    stream = client.chat.completions.create(
        model="styles/a", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert stream.response.headers["x-allele-revision"] == "1"
    *chunks, last = stream
    assert len(chunks) > 3 and {c.model for c in chunks} == {"styles/a"}
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks)
    plain = list(client.completions.create(model="styles/a", prompt="kbdac=", stream=True, **GREEDY))
    assert "".join(c.choices[0].text for c in plain) == text and all(c.usage is None for c in plain)


def test_a_stream_ends_with_done(client: openai.OpenAI) -> None:
    create = client.completions.with_streaming_response.create
    with create(model="styles/a", prompt="kbdac=", stream=True, **GREEDY) as answer:
        assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"


def test_a_stop_text_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="styles/a", prompt="kbdac=", **GREEDY).choices[0].text
    for stop in (whole[2], [whole[2], "never"]):
        choice = client.completions.create(model="styles/a", prompt="kbdac=", stop=stop, **GREEDY).choices[0]
        assert choice.text == whole[: whole.index(whole[2])] and choice.finish_reason == "stop"


def test_n_answers_to_each_prompt_are_numbered(client: openai.OpenAI) -> None:
    sampled: Any = {"max_tokens": 8, "temperature": 1, "n": 3}
    chat = client.chat.completions.create(model="styles/a", messages=MESSAGES, **sampled)
    assert [c.index for c in chat.choices] == [0, 1, 2] and len({c.message.content for c in chat.choices}) > 1
    text = client.completions.create(model="styles/a", prompt=["kbdac=", "ab="], **sampled)
    assert [c.index for c in text.choices] == [*range(6)]
    chunks = list(client.chat.completions.create(model="styles/a", messages=MESSAGES, stream=True, **sampled))
    assert {c.choices[0].index for c in chunks} == {0, 1, 2}


def test_logprobs_are_those_of_the_likeliest_tokens_and_the_same_for_chat_and_text(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="styles/a", messages=MESSAGES, logprobs=True, top_logprobs=3, seed=7, **GREEDY
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    content = chat.choices[0].logprobs.content
    assert chat.usage is not None and len(content) == chat.usage.completion_tokens
    for token in content:  # greedy: the chosen one is the likeliest
        assert len(token.top_logprobs) == 3 and token.logprob == max(t.logprob for t in token.top_logprobs) < 0
    text = client.completions.create(model="styles/a", prompt="kbdac=", logprobs=3, **GREEDY).choices[0].logprobs
    assert text is not None and text.tokens == [t.token for t in content]
    assert text.token_logprobs == pytest.approx([t.logprob for t in content], abs=1e-5)
    assert text.top_logprobs is not None and all(len(top) == 3 for top in text.top_logprobs)


def test_tools_are_taken_and_wrong_ones_are_a_bad_request(client: openai.OpenAI) -> None:
    create: Any = client.chat.completions.create
    answer = create(model="styles/a", messages=MESSAGES, tools=[TOOL], **GREEDY)
    assert answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="tools"):
        create(model="styles/a", messages=MESSAGES, tools=[{"type": "function"}], **GREEDY)
    with pytest.raises(openai.BadRequestError, match="'other' not found"):
        choice = {"type": "function", "function": {"name": "other"}}
        create(model="styles/a", messages=MESSAGES, tools=[TOOL], tool_choice=choice, **GREEDY)


def test_models_are_listed_page_by_page_and_found_one_by_one(
    gateway: Start, population: StoredPopulation, client: openai.OpenAI
) -> None:
    population.commit({f"m{i}": random_adapter(i) for i in range(5)}, expose=True)
    client = client_of(gateway())  # one that has read the catalogue since
    pages = client.get_api_list("/models", model=Model, page=SyncCursorPage[Model], options={"params": {"limit": 3}})
    assert [m.id for m in pages] == ["styles/a", *(f"styles/m{i}" for i in range(5)), "tiny"]
    assert [m.id for m in client.models.list()] == [m.id for m in pages]
    assert client.models.retrieve("styles/a").owned_by == "team" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("styles/nobody")
    with pytest.raises(openai.ConflictError):
        client.models.retrieve("styles/hidden")


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="styles/nobody", messages=MESSAGES, **GREEDY)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.ConflictError, match="no revision is exposed") as hidden:
        create(model="styles/hidden", messages=MESSAGES, **GREEDY)
    assert hidden.value.code == "NotExposed"
    with pytest.raises(openai.NotFoundError, match="describes this port"):
        client.embeddings.create(model="tiny", input="x")


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("n", {"n": "2"}),
        ("n", {"n": True}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": -1}),
        ("temperature", {"temperature": 2.5}),
        ("temperature", {"temperature": "warm"}),
        ("top_p", {"top_p": 0}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("stop", {"stop": ["x"] * 33}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "wizard", "content": "x"}]}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("stop_regex", {"extra_body": {"stop_regex": "("}}),
        ("top_k", {"extra_body": {"top_k": 1.5}}),
    ],
)
def test_a_field_out_of_bounds_is_a_bad_request_that_names_it(
    client: openai.OpenAI, param: str, fields: dict[str, Any]
) -> None:
    request = {"model": "styles/a", "messages": MESSAGES, "max_tokens": 4, **fields}
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**request)
    assert bad.value.param == param and bad.value.code == "InvalidRequest"
    assert bad.value.type == "invalid_request_error" and param in bad.value.message


def test_a_null_counts_as_absent(client: openai.OpenAI) -> None:
    nulls: Any = dict.fromkeys(("n", "temperature", "stop", "logprobs", "stream", "tools", "seed"))
    answer = client.chat.completions.create(model="styles/a", messages=MESSAGES, max_tokens=2, **nulls)
    assert len(answer.choices) == 1


def test_more_logprobs_than_the_vocabulary_has_do_not_reach_the_engine(client: openai.OpenAI) -> None:
    """48 tokens; SGLang's scheduler ends itself over 49."""
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="styles/a", prompt="ab=", logprobs=49)
    assert bad.value.param == "logprobs"
    assert client.completions.create(model="styles/a", prompt="ab=", logprobs=20).choices[0].text


def test_a_grammar_that_no_token_fits_ends_that_request_only(client: openai.OpenAI) -> None:
    """The base's vocabulary has no brace; SGLang's scheduler ends itself over having nothing to sample from."""
    create: Any = client.chat.completions.create
    ask = {"model": "styles/a", "messages": MESSAGES, "max_tokens": 4, "temperature": 1, "top_p": 0.9}
    assert create(response_format={"type": "json_object"}, **ask).choices[0].finish_reason == "abort"
    assert create(**ask).choices[0].finish_reason in ("stop", "length")


def test_what_the_engine_can_do_beyond_openai_passes(client: openai.OpenAI) -> None:
    extra = {"regex": "[ab]{4}", "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1}
    answer = client.completions.create(
        model="styles/a", prompt="kbdac=", max_tokens=4, temperature=1, user="u", extra_body=extra
    )
    assert len(answer.choices[0].text) == 4 and set(answer.choices[0].text) <= {"a", "b"}


def test_a_full_queue_is_a_rate_limit_with_the_time_to_wait(gateway: Start, population: StoredPopulation) -> None:
    population.commit({"a": random_adapter(1)}, expose=True)
    client = client_of(gateway(running=1, requests=2))
    refused: list[openai.RateLimitError] = []
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(
                client.completions.create(
                    model="styles/a", prompt="kbdac=", max_tokens=40, temperature=1, extra_body={"ignore_eos": True}
                )
            )
        except openai.RateLimitError as e:
            refused.append(e)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers and refused and len(answers) + len(refused) == 8
    assert int(refused[0].response.headers["Retry-After"]) >= 1 and refused[0].type == "rate_limit_error"
