"""Both ports keep to the documents that they serve, whatever is sent: requests are generated from those documents."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from allele_rollout.gateway.openapi import internal_document, tenant_document
from tests.rollout.rollout_parts import Service, StoredPopulation, call, random_adapter

Start = Callable[..., Service]
CHECKS: Any = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
NOT_DESCRIBED = {"/v1/generate", "/metrics", "/openapi.json"}
"""Arrow, Prometheus' text, and the document itself."""


@pytest.fixture
def service(gateway: Start, population: StoredPopulation) -> Service:
    population.commit({"a": random_adapter(1), "b": random_adapter(2)}, expose=True)
    return gateway()


def keep_to(document: dict[str, Any], path: str, method: str, url: str, mend: Callable[[Case], None]) -> None:
    """Send what the document allows, and bodies that it does not; each answer is one of its."""
    operation = schemathesis.openapi.from_dict(document)[path][method]
    for mode, examples in ((GenerationMode.POSITIVE, 40), (GenerationMode.NEGATIVE, 25)):
        if mode == GenerationMode.NEGATIVE and method == "GET":
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Case) -> None:
            mend(case)
            case.call_and_validate(base_url=url, checks=CHECKS, timeout=120)

        check()


def towards_the_engine(case: Case) -> None:
    """Most names would be unknown, and long answers slow."""
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and body["model"]:
        body["model"] = ("styles/a", "styles/b@1", "tiny", "styles/b")[len(body["model"]) % 4]
    if isinstance(body.get("vote"), dict) and isinstance(body["vote"].get("members"), list):
        names = [m for m in body["vote"]["members"] if isinstance(m, str)]
        body["vote"]["members"] = ["styles/a", "styles/b", *(f"styles/m{i}" for i in range(len(names) - 2))]
    for message in body["messages"] if isinstance(body.get("messages"), list) else ():
        if isinstance(message, dict) and not message.get("content"):
            message["content"] = "ab="
    if type(body.get("n")) is int and body["n"] > 4:
        body["n"] = body["n"] % 4 + 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_completions_keep_to_the_document(service: Service, path: str) -> None:
    keep_to(tenant_document(), path, "POST", service.tenant, towards_the_engine)
    assert service.complete("styles/a").status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{model}", "/healthz"])
def test_reads_of_the_tenant_port_keep_to_the_document(service: Service, path: str) -> None:
    keep_to(tenant_document(), path, "GET", service.tenant, lambda case: None)


@pytest.mark.parametrize(
    ("path", "method"), [("/v1/probe", "POST"), ("/v1/abort", "POST"), ("/v1/status", "GET"), ("/healthz", "GET")]
)
def test_the_internal_port_keeps_to_its_document(service: Service, path: str, method: str) -> None:
    keep_to(internal_document(), path, method, service.internal, lambda case: None)


def test_each_port_serves_its_document(service: Service) -> None:
    assert call(f"{service.tenant}/openapi.json").json == tenant_document()
    assert call(f"{service.internal}/openapi.json").json == internal_document()


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_wrong_method_or_path_is_an_error_in_openais_form(service: Service, method: str) -> None:
    connection = http.client.HTTPConnection(service.tenant.removeprefix("http://"))
    connection.request(method, "/v1/completions" if method == "GET" else "/v2/nothing")
    answer = connection.getresponse()
    assert answer.status == (405 if method == "GET" else 404) and answer.headers["Content-Type"].startswith(
        "application/json"
    )
    assert b'"invalid_request_error"' in answer.read()
    connection.close()
