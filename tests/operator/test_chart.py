"""The chart renders what the operator needs and no more: rights, hardening, definitions, settings."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import yaml
from pydantic.alias_generators import to_camel

from allele_operator.settings import PREFIX, Settings
from tests.operator.helm_chart import CHART, Yaml12, of_kind, render
from tests.operator.operator_harness import ROOT

BY_TEMPLATE = {"kubeconfig", "namespace", "listen", "advertise", "operator_url", "lease_name", "lease_namespace"}
"""Settings that the chart derives from the release."""
pytestmark = pytest.mark.cluster  # Helm is built with the cluster's tools


def by_name(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in objects}


def rules(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for o in of_kind(objects, "Role", "ClusterRole") for r in o["rules"]]


def test_lint_is_clean(helm: str) -> None:
    done = subprocess.run([helm, "lint", "--strict", str(CHART)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout


@pytest.mark.parametrize("scope", [(), ("scope.namespaces={a,b}",)], ids=["cluster", "namespaces"])
def test_no_right_on_secrets_exec_or_wildcards(helm: str, scope: tuple[str, ...]) -> None:
    for rule in rules(render(helm, *scope)):
        assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"], rule
        assert not {"secrets", "pods/exec", "nodes", "roles"} & set(rule["resources"]), rule


def test_whether_a_namespace_is_deleted_may_be_asked_and_namespaces_not_listed(helm: str) -> None:
    for scope in ((), ("scope.namespaces={a,b}",)):
        found = [r["verbs"] for r in rules(render(helm, *scope)) if "namespaces" in r["resources"]]
        assert found and all(verbs == ["get"] for verbs in found)


def test_with_namespaces_the_only_cluster_wide_right_is_to_review_tokens(helm: str) -> None:
    objects = render(helm, "scope.namespaces={a,b}")
    (cluster,) = of_kind(objects, "ClusterRole")
    assert [r["resources"] for r in cluster["rules"]] == [["tokenreviews"]]
    places = {(o["metadata"]["namespace"], o["metadata"]["name"]) for o in of_kind(objects, "Role")}
    assert places == {("a", "allele-operator"), ("b", "allele-operator"), ("allele-system", "allele-operator-lease")}


def test_the_pod_passes_restricted(helm: str) -> None:
    (deployment,) = of_kind(render(helm), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (
        pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    )
    security = container["securityContext"]
    assert security == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["livenessProbe"] and container["readinessProbe"] and container["resources"]["limits"]["memory"]


def test_the_definitions_are_those_of_the_repository_and_are_kept(helm: str) -> None:
    expected = [yaml.load(p.read_text(), Yaml12) for p in (ROOT / "crds").glob("*.yaml")]
    found = of_kind(render(helm), "CustomResourceDefinition")
    assert len(found) == 5
    for crd in found:
        assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert by_name(found) == by_name(expected)
    assert not of_kind(render(helm, "crds.enabled=false"), "CustomResourceDefinition")


def test_settings_in_values_are_the_operators_settings(helm: str) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    listed = schema["properties"]["settings"]["propertyNames"]["enum"]
    assert listed == sorted(to_camel(n) for n in Settings.model_fields if n not in BY_TEMPLATE)

    chosen = ("settings.statusInterval=3", "settings.logLevel=DEBUG", "scope.namespaces={a,b}")
    (deployment,) = of_kind(render(helm, *chosen), "Deployment")
    env = {e["name"]: e.get("value", "") for e in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert {n.removeprefix(PREFIX).lower() for n in env if n.startswith(PREFIX)} <= set(Settings.model_fields)
    settings = Settings.load([], env)
    assert (settings.status_interval, settings.log_level, settings.namespace) == (3, "DEBUG", ("a", "b"))
    assert settings.operator_url == "http://allele-operator.allele-system.svc:8080"
    assert settings.image == "allele/operator:0.1.0"


@pytest.mark.parametrize(
    "value", ["settings.statusIntervall=3", "image.repo=x", "replicaCount=0", "scope.namespaces={A}"]
)
def test_values_that_are_misspelt_or_out_of_range_are_refused(helm: str, value: str) -> None:
    done = subprocess.run([helm, "template", "allele", str(CHART), "--set", value], capture_output=True, check=False)
    assert done.returncode and b"specifications of the schema" in done.stderr
