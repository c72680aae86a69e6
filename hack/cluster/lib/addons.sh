# shellcheck shell=bash
# What runs in or beside the cluster: CoreDNS, the S3 server, JobSet.

apply() { render "$HERE/manifests/$1" | k apply -f - >/dev/null || fail "could not apply manifests/$1"; }
await_deployment() { # NAMESPACE NAME
  k -n "$1" rollout status "deployment/$2" --timeout=120s >/dev/null ||
    fail "deployment $2 in $1 is not ready; see: kubectl -n $1 describe pods"
}

apply_coredns() {
  wait_for image-coredns 60 has_image localhost/coredns:local
  apply coredns.yaml
}
await_coredns() { await_deployment kube-system coredns; }

# On the host and not in a pod, so that it keeps its objects and its address while pods come and go.
start_s3() {
  ROOT_ACCESS_KEY=$S3_KEY ROOT_SECRET_KEY=$S3_SECRET \
    start s3 "$(tool versitygw)/versitygw" --port "$NODE_IP:$S3_PORT" --quiet posix "$CLUSTER_DIR/s3"
  apply s3.yaml
}
await_s3() { wait_for s3 20 curl -s -o /dev/null "$S3_URL/"; }

helm() {
  KUBECONFIG=$ADMIN_KUBECONFIG HELM_CACHE_HOME=$CLUSTER_DIR/helm HELM_CONFIG_HOME=$CLUSTER_DIR/helm \
    HELM_DATA_HOME=$CLUSTER_DIR/helm "$(tool helm)/helm" "$@"
}
install_jobset() {
  [[ $(helm status jobset -n jobset-system 2>/dev/null) != *"STATUS: deployed"* ]] || return 0
  # an installation that was killed half way can be neither continued nor upgraded
  helm uninstall jobset -n jobset-system --ignore-not-found >"$LOG/helm-jobset.log" 2>&1
  wait_for image-jobset 60 has_image localhost/jobset:local
  helm install jobset "$(tool jobset)/chart" -n jobset-system --create-namespace \
    -f "$HERE/manifests/jobset-values.yaml" >"$LOG/helm-jobset.log" 2>&1 ||
    fail "helm could not install JobSet: $(tail -n 3 "$LOG/helm-jobset.log")"
}
await_jobset() {
  await_deployment jobset-system jobset-controller
  # ready is not enough: until its certificate has reached the API server, every JobSet is refused
  wait_for jobset-webhook 60 k create --dry-run=server -f "$HERE/manifests/jobset-probe.yaml"
}
