#!/usr/bin/env bash
# Brings up a single-node Kubernetes of real components on this host. What runs already is left alone.
# About a minute from nothing, given the tools and images (made first if absent: about 20 minutes).
set -euo pipefail
. "$(dirname "$0")/env.sh"
. "$HERE/lib/process.sh"
. "$HERE/lib/leftovers.sh"
. "$HERE/lib/host.sh"
. "$HERE/lib/pki.sh"
. "$HERE/lib/control-plane.sh"
. "$HERE/lib/node.sh"
. "$HERE/lib/addons.sh"

VERSIONS="kubernetes $KUBERNETES_VERSION, etcd $ETCD_VERSION, jobset $JOBSET_VERSION, coredns $COREDNS_VERSION, \
versitygw $VERSITYGW_VERSION, pause $PAUSE_VERSION, pybase $PYBASE_VERSION"

prepare() {
  [ "$(id -u)" = 0 ] || fail "must be root: it makes links, cgroups and iptables rules"
  "$HERE/host.sh"
  "$HERE/tools.sh" kubernetes etcd jobset helm coredns versitygw
  "$HERE/images.sh"
  take_lock
  claim_host
  mkdir -p "$LOG" "$PKI" "$CONF/cni" "$CLUSTER_DIR"/{containerd,kubelet,pods,s3}
  if [ -f "$CLUSTER_DIR/versions" ] && [ "$(<"$CLUSTER_DIR/versions")" != "$VERSIONS" ]; then
    fail "the cluster in $CLUSTER_DIR was made of $(<"$CLUSTER_DIR/versions"), now wanted are $VERSIONS. Run down.sh, then up.sh."
  fi
  echo "$VERSIONS" >"$CLUSTER_DIR/versions"
}

# For shells and tests: `. out/cluster/env` gives kubectl, helm and an S3 client all they need.
write_env() {
  cat >"$CLUSTER_DIR/env" <<ENV
export KUBECONFIG=$ADMIN_KUBECONFIG KUBECACHEDIR=$CLUSTER_DIR/kubecache
export PATH=$(tool kubernetes):$(tool helm):\$PATH
export AWS_ENDPOINT_URL=$S3_URL AWS_ACCESS_KEY_ID=$S3_KEY AWS_SECRET_ACCESS_KEY=$S3_SECRET AWS_DEFAULT_REGION=us-east-1
ENV
}

prepare
host_network
pod_cgroup
make_pki
write_env

start_containerd
start_etcd
start_apiserver
await_containerd
say "containerd"
import_images >"$LOG/import.log" 2>&1 & importing=$!   # meanwhile the rest starts; the kubelet waits for absent images
await_apiserver
say "etcd, kube-apiserver $KUBERNETES_VERSION"

start_controller_manager
start_scheduler
start_kubelet
start_proxy
start_s3
await_controllers
say "kube-controller-manager, kube-scheduler"
apply_coredns
install_jobset
await_proxy
say "kube-proxy"
await_node
say "kubelet: node $NODE Ready"
await_s3
say "S3: $S3_URL, in pods also http://s3.s3.svc"
await_coredns
say "CoreDNS"
await_jobset
say "JobSet $JOBSET_VERSION, its webhook answers"
wait "$importing" || fail "an image could not be imported: $(tail -n 3 "$LOG/import.log")"
say "images ${CLUSTER_IMAGES[*]}"
say "up: export KUBECONFIG=$ADMIN_KUBECONFIG"
