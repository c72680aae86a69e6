"""What is wrong is refused when it is applied, in words that tell what to do; its neighbour is accepted."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from allele.api.algorithm import Name
from tests.api.kubectl import Kubectl
from tests.api.manifests import SPECS, TRAIN, manifest


def _train(**select: Any) -> dict[str, Any]:
    return {**TRAIN, "select": {"group": "g", **select}}


def _group(name: str, kind: str, mode: str, **adapter: Any) -> dict[str, Any]:
    init = {"init": {"kind": kind, "baseMode": mode}}
    return {"name": name, "members": {"count": 4}, "adapter": init | adapter}


LONG = "x" * 64
OWN_POOL = {"poolRef": None, "runtimeRef": "rt", "baseUri": "s3://adapters/bases/tiny"}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("AdapterStore", {"name": "x" * 41}, "metadata.name must be at most 40 characters"),
    ("AdapterStore", {"name": "1x"}, "metadata.name must begin with a letter"),
    ("AdapterStore", {"name": "a.b"}, "metadata.name must begin with a letter and hold only a-z, 0-9 and -"),
    ("AdapterStore", {"bucket": "Ab"}, "spec.bucket"),
    ("AdapterStore", {"bucket": None}, "spec.bucket: Required value"),
    ("AdapterStore", {"prefix": "/a"}, "spec.prefix"),
    ("AdapterStore", {"endpoint": "s3:7070"}, "spec.endpoint"),
    ("AdapterStore", {"credentials__secretName": "A B"}, "spec.credentials.secretName"),
    ("AdapterStore", {"buckets": "x"}, 'unknown field "spec.buckets"'),
    ("AdapterStore", {"provider": "Swift"}, "spec.provider: Unsupported value"),
    ("AdapterStore", {"bucket": "a_b"}, "only GCS has names with _"),
    ("AdapterStore", {"account": "alleles"}, "account belongs to Azure"),
    ("AdapterStore", {"provider": "Azure"}, "Azure needs the name of the storage account"),
    ("AdapterStore", {"provider": "Azure", "account": "Alleles"}, "spec.account"),
    ("AdapterStore", {"provider": "Azure", "account": "alleles", "bucket": "a.b"}, "a container has no dots"),
    ("AdapterStore", {"provider": "GCS", "account": "alleles"}, "account belongs to Azure"),
    ("AdapterStore", {"provider": "GCS", "region": "us-east-1"}, "region belongs to S3"),
    ("AdapterRuntime", {"name": LONG}, "metadata.name must be at most 63 characters"),
    ("AdapterRuntime", {"images__engine": None}, "spec.images.engine: Required value"),
    ("AdapterRuntime", {"images__pullPolicy": "Sometimes"}, "spec.images.pullPolicy: Unsupported value"),
    ("AdapterRuntime", {"resources__trainer__requests": {"cpu": "4 cores"}}, "spec.resources.trainer.requests.cpu"),
    ("AdapterRuntime", {"sharedMemory": "lots"}, "spec.sharedMemory"),
    ("AdapterRuntime", {"engine__maxTotalTokens": 5}, "should be greater than or equal to 1024"),
    ("BasePool", {"name": "x" * 33}, "metadata.name must be at most 32 characters"),
    ("BasePool", {"base__uri": "http://x"}, "uri must begin with s3://, gs://, az:// or file:///"),
    ("BasePool", {"base__digest": "sha256:abc"}, "spec.base.digest"),
    ("BasePool", {"adapters__maxRank": 12}, "rank must be a power of two from 1 to 256"),
    ("BasePool", {"adapters__maxRank": 512}, "should be less than or equal to 256"),
    ("BasePool", {"adapters__targets": ["q_proj", "q_proj"]}, 'Duplicate value: "q_proj"'),
    ("BasePool", {"adapters__targets": []}, "should have at least 1 items"),
    ("BasePool", {"trainer__slots": 0}, "slots must be a number from 1 to 65536, or auto"),
    ("BasePool", {"trainer__slots": "many"}, "slots must be a number from 1 to 65536, or auto"),
    ("BasePool", {"rollout__replicas": -1}, "should be greater than or equal to 0"),
    ("BasePool", {"trainer__slotz": 1}, 'unknown field "spec.trainer.slotz"'),
    ("BasePool", {"storeRef": None}, "spec.storeRef: Required value"),
    ("AdapterPopulation", {"name": LONG}, "metadata.name must be at most 63 characters"),
    ("AdapterPopulation", {"groups": []}, "should have at least 1 items"),
    ("AdapterPopulation", {"groups__0__members": {}}, "exactly one of count and manifest must be set"),
    (
        "AdapterPopulation",
        {"groups__0__members": {"count": 3, "manifest": {"configMap": "m"}}},
        "exactly one of count and manifest must be set",
    ),
    ("AdapterPopulation", {"groups__0__members__count": 0}, "should be greater than or equal to 1"),
    ("AdapterPopulation", {"groups__0__adapter": {"rank": 3}}, "rank must be a power of two from 1 to 256"),
    ("AdapterPopulation", {"groups__0__adapter": {"alpha": 0}}, "should be greater than 0"),
    ("AdapterPopulation", {"groups__0__adapter": {"init": {"kind": "SVD"}}}, 'Unsupported value: "SVD"'),
    ("AdapterPopulation", {"groups__0__adapter": {"scaling": "None"}}, 'Unsupported value: "None"'),
    *(
        (
            "AdapterPopulation",
            {"groups__0__adapter": {"init": {"kind": kind, "baseMode": mode}}},
            "baseMode must be Untouched with kind Standard or MiCA",
        )
        for kind in ("Standard", "MiCA")
        for mode in ("SharedResidual", "Rank2r")
    ),
    *(
        (
            "AdapterPopulation",
            {"groups__0__adapter": {"init": {"kind": kind}}},
            "baseMode must be SharedResidual or Rank2r with kind PiSSA, MiLoRA, OLoRA or OLoRATail",
        )
        for kind in ("PiSSA", "MiLoRA", "OLoRA", "OLoRATail")
    ),
    (
        "AdapterPopulation",
        {"groups__0__adapter": {"rank": 256, "init": {"kind": "PiSSA", "baseMode": "Rank2r"}}},
        "rank must be at most 128 with baseMode Rank2r",
    ),
    (
        "AdapterPopulation",
        {"groups": [_group("g", "PiSSA", "SharedResidual"), _group("h", "Standard", "Untouched")]},
        "with baseMode SharedResidual all groups must have the same adapter",
    ),
    (
        "AdapterPopulation",
        {"groups": [_group("g", "PiSSA", "SharedResidual"), _group("h", "PiSSA", "SharedResidual", rank=4)]},
        "with baseMode SharedResidual all groups must have the same adapter",
    ),
    ("AdapterPopulation", {"groups__0__name": "x" * 57}, "name of a group by count must be at most 56 characters"),
    (
        "AdapterPopulation",
        {"groups": [SPECS["AdapterPopulation"]["groups"][0]] * 2},
        'spec.groups[1]: Duplicate value: {"name":"g"}',
    ),
    ("AdapterPopulation", {"exposure__maxGap": 0}, "should be greater than 0"),
    ("AdapterPopulation", {"deletionPolicy": "Erase"}, 'Unsupported value: "Erase"'),
    *(
        ("AdapterPopulation", {"retention__schedule": text}, "schedule must be five fields of cron in UTC (minute hour")
        for text in ("@daily", "", "17 3 * *", "17 3 * * * *", "TZ=UTC 17 3 * * *", "17 3 ? * #1")
    ),
    ("RLRun", {"name": "x" * 41}, "metadata.name must be at most 40 characters"),
    ("RLRun", {"name": "x" * 28, **OWN_POOL}, "metadata.name must be at most 27 characters with runtimeRef"),
    ("RLRun", {"poolRef": None}, "exactly one of poolRef and runtimeRef must be set"),
    ("RLRun", {"runtimeRef": "rt", "baseUri": "s3://b/x"}, "exactly one of poolRef and runtimeRef must be set"),
    ("RLRun", {"poolRef": None, "runtimeRef": "rt"}, "baseUri is required with runtimeRef"),
    ("RLRun", {"baseUri": "s3://b/x"}, "baseUri is required with runtimeRef and not allowed without it"),
    ("RLRun", {"groups": []}, "should have at least 1 items"),
    (
        "RLRun",
        {"groups": [_train(range={"count": 2}, names=["a"])]},
        "at most one of range and names may be set",
    ),
    ("RLRun", {"groups": [_train(names=["a/b"])]}, "spec.groups[0].select.names[0]"),
    ("RLRun", {"groups": [_train(names=["a", "a"])]}, 'Duplicate value: "a"'),
    ("RLRun", {"groups": [_train(), _train(range={"count": 2})]}, "can be selected only once"),
    (
        "RLRun",
        {"groups": [_train(range={"count": 4}), _train(range={"first": 3, "count": 2})]},
        "ranges of the same group must not overlap",
    ),
    ("RLRun", {"groups__0__environment__path": "a b"}, "spec.groups[0].environment.path"),
    ("RLRun", {"groups__0__optimizer__learningRate": 0}, "should be greater than 0"),
    ("RLRun", {"groups__0__optimizer__beta1": 1}, "should be less than 1"),
    ("RLRun", {"groups__0__algorithm": {"name": "PPO"}}, 'Unsupported value: "PPO"'),
    ("RLRun", {"groups__0__algorithm": {"groupSize": 0}}, "should be greater than or equal to 1"),
    ("RLRun", {"groups__0__algorithm": {"groupSize": 1}}, "groupSize must be at least 2 with GRPO, DrGRPO"),
    ("RLRun", {"groups__0__algorithm": {"name": "SFT", "groupSize": 4}}, "groupSize goes with GRPO, DrGRPO, DAPO"),
    ("RLRun", {"groups__0__algorithm": {"name": "CISPO", "clipLow": 0.1}}, "clipLow goes with GRPO, DrGRPO"),
    ("RLRun", {"groups__0__algorithm": {"name": "DPO", "clipHigh": 0.1}}, "clipHigh goes with GRPO, DrGRPO"),
    ("RLRun", {"groups__0__algorithm": {"name": "GSPO", "mean": "Token"}}, "mean goes with GRPO, DrGRPO, DAPO, CISPO"),
    ("RLRun", {"groups__0__algorithm": {"name": "SFT", "oldPolicy": "Trainer"}}, "oldPolicy goes with GRPO"),
    ("RLRun", {"groups__0__algorithm": {"name": "SFT", "correction": {"kind": "MIS"}}}, "correction goes with GRPO"),
    ("RLRun", {"groups__0__algorithm": {"name": "Distillation", "kl": {"coefficient": 1}}}, "kl goes with GRPO"),
    ("RLRun", {"groups__0__algorithm": {"name": "REINFORCE++", "refills": 1}}, "refills goes with GRPO"),
    ("RLRun", {"groups__0__algorithm": {"name": "SFT", "overlong": {}}}, "overlong goes with GRPO"),
    ("RLRun", {"groups__0__algorithm": {"beta": 0.1}}, "beta goes with DPO only"),
    ("RLRun", {"groups__0__algorithm": {"divergence": "Reverse"}}, "divergence goes with Distillation only"),
    ("RLRun", {"groups__0__algorithm": {"teacher": "Base"}}, "teacher goes with Distillation only"),
    ("RLRun", {"groups__0__algorithm": {"topK": 4}}, "topK goes with Distillation only"),
    ("RLRun", {"groups__0__algorithm": {"correction": {"kind": "TIS"}}}, "correction TIS needs oldPolicy Trainer"),
    (
        "RLRun",
        {"groups__0__algorithm": {"correction": {"kind": "MIS", "low": 0.5, "high": 0.5}}},
        "low (0.5 with IcePop and Rejection if it is not given) must be less than high",
    ),
    (
        "RLRun",
        {"groups__0__algorithm": {"correction": {"kind": "IcePop", "high": 0.4}}},
        "low (0.5 with IcePop and Rejection if it is not given) must be less than high",
    ),
    (
        "RLRun",
        {"groups__0__algorithm": {"kl": {"coefficient": 0.1, "estimator": "K1"}}},
        "kl.estimator K1 goes with REINFORCE++ only: use K2 or K3",
    ),
    (
        "RLRun",
        {"groups__0__optimizer": {"learningRate": 0.1, "warmupSteps": 9, "horizon": 9}},
        "warmupSteps must be less than horizon",
    ),
    ("RLRun", {"pace__maxPolicyLag": 65}, "should be less than or equal to 64"),
    ("RLRun", {"startFrom__revision": "Oldest"}, 'Unsupported value: "Oldest"'),
    ("RLRun", {"stop": None}, "spec.stop: Required value"),
    ("RLRun", {"stop__steps": 0}, "should be greater than or equal to 1"),
]
GOOD: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in SPECS),
    ("AdapterStore", {"name": "x" * 40, "prefix": "a/b_c", "credentials": None, "endpoint": None}),
    ("AdapterStore", {"region": "eu-west-1"}),
    ("AdapterStore", {"provider": "GCS", "bucket": "a_b.c", "endpoint": None}),
    ("AdapterStore", {"provider": "Azure", "account": "alleles", "endpoint": None}),
    ("AdapterRuntime", {"resources__trainer__requests": {"cpu": 2, "memory": "1.5Gi", "nvidia.com/gpu": "1"}}),
    ("AdapterRuntime", {"podTemplate__tolerations": [{"key": "gpu", "operator": "Exists"}]}),
    ("BasePool", {"name": "x" * 32, "base__uri": "file:///models/tiny", "trainer": None, "rollout__replicas": 0}),
    ("BasePool", {"adapters__maxRank": 256, "adapters__targets": ["q_proj"]}),
    ("AdapterPopulation", {"groups__0__members": {"manifest": {"configMap": "m"}}, "groups__0__name": "x" * 63}),
    ("AdapterPopulation", {"groups__0__parameters": {"any": {"thing": [1, "a"]}}}),
    *(
        ("AdapterPopulation", {"groups__0__adapter": {"init": {"kind": kind, "baseMode": mode}}})
        for kind in ("PiSSA", "MiLoRA", "OLoRA", "OLoRATail")
        for mode in ("SharedResidual", "Rank2r")
    ),
    ("AdapterPopulation", {"groups__0__adapter": {"init": {"kind": "MiCA"}, "scaling": "Fixed", "rank": 256}}),
    ("AdapterPopulation", {"groups__0__adapter": {"rank": 128, "init": {"kind": "OLoRA", "baseMode": "Rank2r"}}}),
    ("AdapterPopulation", {"groups": [_group(n, "PiSSA", "SharedResidual") for n in "gh"]}),
    ("AdapterPopulation", {"groups": [_group("g", "PiSSA", "Rank2r"), _group("h", "MiCA", "Untouched")]}),
    ("AdapterPopulation", {"deletionPolicy": "Delete", "retention__schedule": "*/15 0-6,22 1 JAN Mon-Fri"}),
    ("RLRun", {"name": "x" * 40}),
    ("RLRun", {"name": "x" * 27, **OWN_POOL}),
    ("RLRun", {"groups": [_train(range={"count": 4}), _train(range={"first": 4, "count": 2})]}),
    ("RLRun", {"groups": [_train(range={"count": 4}), _train(names=["g-0009"])]}),
    ("RLRun", {"groups": [_train(), {**TRAIN, "select": {"group": "h"}}]}),
    *(("RLRun", {"groups__0__algorithm": {"name": name}}) for name in get_args(Name)),
    *(("RLRun", {"groups__0__algorithm": {"name": name, "groupSize": 1}}) for name in ("REINFORCE++", "Distillation")),
    (
        "RLRun",
        {
            "groups__0__algorithm": {
                "name": "REINFORCE++",
                "oldPolicy": "Trainer",
                "correction": {"kind": "TIS", "level": "Geometric", "high": 2},
                "kl": {"coefficient": 0.1, "estimator": "K1"},
            }
        },
    ),
    ("RLRun", {"groups__0__algorithm": {"correction": {"kind": "MIS", "high": 0.4}}}),
    ("RLRun", {"groups__0__algorithm": {"name": "Distillation", "teacher": "Environment", "topK": 4, "mean": "Token"}}),
    (
        "RLRun",
        {"groups__0__optimizer": {"learningRate": 0.1, "schedule": "Cosine", "warmupSteps": 8, "horizon": 9}},
    ),
    ("RLRun", {"groups__0__environment__path": "exact-match", "pace__cohort": 4, "code": {"configMap": "c"}}),
]


@pytest.mark.parametrize(("kind", "changes", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_wrong_is_refused_with_its_message(
    kubectl: Kubectl, kind: str, changes: dict[str, Any], message: str
) -> None:
    answer = kubectl.try_create(manifest(kind, **changes))
    assert answer.code != 0, f"accepted: {answer.out}"
    assert message in answer.err


@pytest.mark.parametrize(("kind", "changes"), GOOD)
def test_what_is_right_is_accepted(kubectl: Kubectl, kind: str, changes: dict[str, Any]) -> None:
    answer = kubectl.try_create(manifest(kind, **changes))
    assert answer.code == 0, answer.err
