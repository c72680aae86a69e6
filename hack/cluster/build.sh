#!/usr/bin/env bash
# Builds a Dockerfile without a container engine and puts the image into the running cluster:
#   build.sh CONTEXT NAME:TAG [DOCKERFILE]        the image is then localhost/NAME:TAG
# The Dockerfile must take its base by `ARG BASE` and `FROM ${BASE}`; here that is the local Debian with Python 3.11.
# Unchanged steps come from the layer cache, and an image that the cluster has already is not imported again.
set -euo pipefail
. "$(dirname "$0")/env.sh"

fail() { printf 'build: %s\n' "$*" >&2; exit 1; }
bud() { buildah --root "$BUILD_STORE/root" --runroot "$BUILD_STORE/run" --storage-driver overlay "$@"; }

[ $# -ge 2 ] || fail "usage: build.sh CONTEXT NAME:TAG [DOCKERFILE]"
context=$1 ref=localhost/$2 dockerfile=${3:-$1/Dockerfile}
[ -d "$context" ] || fail "the context $context is not a folder"
[ -f "$dockerfile" ] || fail "there is no Dockerfile at $dockerfile"
[ -S "$CRI" ] || fail "no cluster in $CLUSTER_DIR to put the image into; run up.sh first"
scratch=$(mktemp -d)   # private: the pip configuration may hold credentials
trap 'rm -rf "$scratch"' EXIT

"$HERE/images.sh" pybase
bud inspect --type image "$PYBASE" >/dev/null 2>&1 || bud pull -q "docker-archive:$(image_archive pybase)" >/dev/null

SECONDS=0
volumes=()
while read -r volume; do volumes+=(--volume "$volume"); done < <(python3 "$HERE/pip_config.py" "$scratch/pip.conf")
# chroot isolation, because others need more capabilities than a container of a CI has; proxies are passed on by buildah itself
log=$LOG/build-${2//[:\/]/-}.log
echo "build: $ref from $dockerfile (log: ${log/#$PWD\//})"
bud build --isolation chroot --pull-never --layers --format docker "${volumes[@]}" \
  --iidfile "$scratch/id" --build-arg "BASE=$PYBASE" -t "$ref" -f "$dockerfile" "$context" >"$log" 2>&1 || {
  tail -n 20 "$log" >&2
  fail "$ref was not built; the whole log is $log"
}
id=$(<"$scratch/id")
mkdir -p "$CLUSTER_DIR/built"
echo "$id" >"$CLUSTER_DIR/built/$2"   # tells who deploys whether a tag means the same as last time

if [ -n "$(ctr_k8s images ls -q "name==$ref,labels.\"allele-build\"==$id")" ]; then
  echo "build: $ref is up to date (${SECONDS}s)"
  exit
fi
bud push -q "$ref" "docker-archive:$scratch/image.tar:$ref"
ctr_k8s images import --digests=false "$scratch/image.tar" >/dev/null
ctr_k8s images label "$ref" "allele-build=$id" >/dev/null
echo "build: $ref built and imported (${SECONDS}s)"
