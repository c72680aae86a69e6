"""What of the example depends on the cluster: images, credentials, endpoint. Population and run never do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

EXAMPLE = Path(__file__).parent.parent.parent / "examples/preferences"
FILES = ("01-store.yaml", "02-runtime.yaml", "03-pool.yaml", "04-population.yaml", "05-run.yaml")
Obj = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """Objects to apply, by kind, and values of the chart."""

    objects: Mapping[str, Obj]
    chart: Mapping[str, str]

    @property
    def store_environment(self) -> dict[str, str]:
        """Variables with which this machine reaches the store as the pods do."""
        spec = self.objects["AdapterStore"]["spec"]
        found = dict(self.objects["Secret"]["stringData"]) | {"AWS_REGION": spec.get("region", "us-east-1")}
        if endpoint := spec.get("endpoint"):
            found |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": str(endpoint.startswith("http://")).lower()}
        return found


def read_example() -> dict[str, Obj]:
    documents = (d for name in FILES for d in yaml.safe_load_all((EXAMPLE / name).read_text()))
    return {d["kind"]: d for d in documents if d}


def local() -> Target:
    """The cluster of hack/cluster: the files as they are."""
    return Target(
        read_example(),
        {"image.repository": "localhost/allele-operator", "image.tag": "dev", "image.pullPolicy": "Never"},
    )


def existing(environ: Mapping[str, str]) -> Target:
    """Somebody's cluster: images and bucket by the variables that hack/demo.sh demands; no mounted environment."""
    images, tag, bucket = (
        environ["ALLELE_IMAGES"].rstrip("/"),
        environ.get("ALLELE_TAG", "dev"),
        environ["ALLELE_BUCKET"],
    )
    objects = read_example()
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    objects["Secret"]["stringData"] = {k: environ[k] for k in keys}
    store = objects["AdapterStore"]["spec"]
    store |= {"bucket": bucket, "region": environ.get("AWS_REGION", "us-east-1")}
    store.pop("endpoint")
    if endpoint := environ.get("AWS_ENDPOINT_URL"):
        store["endpoint"] = endpoint
    runtime = objects["AdapterRuntime"]["spec"]
    del runtime["environment"]
    for role, image in runtime["images"].items():
        name = image.removeprefix("localhost/").removesuffix(":dev")
        runtime["images"][role] = f"{images}/{name}:{tag}"
    runtime["images"]["pullPolicy"] = "IfNotPresent"
    objects["BasePool"]["spec"]["base"]["uri"] = f"s3://{bucket}/bases/preferences"
    return Target(objects, {"image.repository": f"{images}/allele-operator", "image.tag": tag})
