#!/usr/bin/env bash
# The project's images from this checkout, built into the running cluster.
set -euo pipefail
cd "$(dirname "$0")/.."
hack/cluster/build.sh . allele-operator:dev images/operator/Dockerfile
hack/cluster/build.sh . allele-gateway:dev images/rollout/Dockerfile
hack/cluster/build.sh . allele:dev images/trainer/Dockerfile
