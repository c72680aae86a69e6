#!/usr/bin/env bash
# Proves the running cluster: an image built with pip, a restricted pod with DNS, identity and S3, a JobSet
# whose pods find each other, a ClusterIP from the host, logs. Cleans up after itself; under two minutes.
set -euo pipefail
. "$(dirname "$0")/env.sh"
. "$HERE/lib/process.sh"

# boto3 is for pods only; the host makes and empties the bucket with what curl knows of S3 (which leaves out the digest of no content)
NOTHING=$(sha256sum </dev/null | cut -d' ' -f1)
s3() {
  curl -sS --fail --aws-sigv4 aws:amz:us-east-1:s3 --user "$S3_KEY:$S3_SECRET" -H "x-amz-content-sha256: $NOTHING" -o /dev/null "$@"
}
clean() {
  k delete namespace selftest --ignore-not-found --timeout=60s >/dev/null
  s3 -X DELETE "$S3_URL/selftest/k" 2>/dev/null || true
  s3 -X DELETE "$S3_URL/selftest" 2>/dev/null || true
}
show_pods() { k -n selftest describe pods | tail -n 30 >&2; k -n selftest logs job/probe >&2 || true; }

k get --raw /readyz >/dev/null 2>&1 || fail "no cluster answers with $ADMIN_KUBECONFIG; run up.sh first"
clean
trap clean EXIT

"$HERE/build.sh" "$HERE/selftest" selftest:local >"$LOG/selftest-build.log" 2>&1 ||
  fail "build.sh failed: $(tail -n 5 "$LOG/selftest-build.log")"
say "image built with a pip install, and imported"
build_again=$("$HERE/build.sh" "$HERE/selftest" selftest:local 2>&1 | tail -n 1)
[[ $build_again == *"up to date"* ]] || fail "an unchanged image was built again: $build_again"
say "unchanged image left alone"

s3 -X PUT "$S3_URL/selftest" || fail "S3 at $S3_URL did not make a bucket"
if s3 --user "$S3_KEY:wrong" "$S3_URL/selftest" 2>/dev/null; then fail "S3 accepted a wrong signature"; fi
say "S3 from the host, a wrong signature refused"
curl -s -o /dev/null "http://$(k -n s3 get service s3 -o 'jsonpath={.spec.clusterIP}')/" || fail "a ClusterIP does not answer on the host"
say "ClusterIP from the host"

render "$HERE/selftest/pods.yaml" | k apply -f - >/dev/null
k -n selftest wait --for=condition=Complete job/probe --timeout=60s >/dev/null || { show_pods; fail "the probe pod did not succeed"; }
k -n selftest logs job/probe | sed 's/^/         /'
say "restricted pod: DNS, ServiceAccount, S3; its logs"
k -n selftest wait --for=condition=Completed jobset/pair --timeout=90s >/dev/null || { show_pods; fail "the pods of the JobSet did not find each other"; }
say "JobSet of two pods that found each other"
clean
trap - EXIT
say "selftest: passed"
