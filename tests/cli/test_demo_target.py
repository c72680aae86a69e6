"""`make demo CLUSTER=existing` changes images, credentials and endpoint of the example, and nothing that is trained."""

from __future__ import annotations

import yaml

from hack.demo import target

ENVIRON = {
    "ALLELE_IMAGES": "registry.example.com/team/",
    "ALLELE_TAG": "v1",
    "ALLELE_BUCKET": "alleles",
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "secret",
}


def test_existing_cluster_gets_its_own_images_bucket_and_credentials() -> None:
    found = target.existing(ENVIRON)
    runtime, store = found.objects["AdapterRuntime"]["spec"], found.objects["AdapterStore"]["spec"]
    assert runtime["images"]["trainer"] == "registry.example.com/team/allele:v1"
    assert runtime["images"]["gateway"] == "registry.example.com/team/allele-gateway:v1"
    assert "environment" not in runtime
    assert store["bucket"] == "alleles" and "endpoint" not in store
    assert found.objects["Secret"]["stringData"] == {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
    assert found.objects["BasePool"]["spec"]["base"]["uri"] == "s3://alleles/bases/preferences"
    assert "localhost" not in yaml.safe_dump(dict(found.objects)) and "10.243" not in yaml.safe_dump(
        dict(found.objects)
    )
    assert "AWS_ENDPOINT_URL" not in found.store_environment


def test_population_and_run_are_the_files() -> None:
    files = target.read_example()
    for where in (target.local(), target.existing(ENVIRON)):
        for kind in ("AdapterPopulation", "RLRun"):
            assert where.objects[kind] == files[kind]
    assert target.local().objects == files
