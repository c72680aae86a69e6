# shellcheck shell=bash
# containerd, the images it holds, kubelet, kube-proxy.

start_containerd() {
  local program
  program=$(realpath -e "$(command -v containerd)")
  if ! pid_of "$program" >/dev/null; then
    # First start, or an earlier session was killed: pods without a containerd cannot be adopted.
    # Its task state and the address leases go; images and sandbox records (root/) stay, the kubelet makes the pods anew.
    end_node "$CLUSTER_DIR"
    rm -rf "$CLUSTER_DIR"/containerd/{state,runc} "$CLUSTER_DIR/ipam" "$CRI"
  fi
  render "$HERE/config/cni.json" >"$CONF/cni/10-allele.conflist"
  render "$HERE/config/containerd.toml" >"$CONF/containerd.toml"
  start containerd "$program" -c "$CONF/containerd.toml"
}
await_containerd() { wait_for containerd 30 ctr_k8s version; }

has_image() { [ -n "$(ctr_k8s images ls -q "name==$1")" ]; }
import_images() {
  local name
  for name in "${CLUSTER_IMAGES[@]}"; do
    has_image "localhost/$name:local" || ctr_k8s images import --digests=false "$(image_archive "$name")"
  done
}

start_kubelet() {
  render "$HERE/config/kubelet.yaml" >"$CONF/kubelet.yaml"
  start kubelet "$(tool kubernetes)/kubelet" --config="$CONF/kubelet.yaml" --kubeconfig="$PKI/kubelet.kubeconfig" \
    --root-dir="$CLUSTER_DIR/kubelet" --cert-dir="$CLUSTER_DIR/kubelet/pki" --hostname-override="$NODE" --node-ip="$NODE_IP"
}
await_node() { wait_for kubelet 60 k wait --for=condition=Ready "node/$NODE" --timeout=1s; }

start_proxy() {
  render "$HERE/config/kube-proxy.yaml" >"$CONF/kube-proxy.yaml"
  start proxy "$(tool kubernetes)/kube-proxy" --config="$CONF/kube-proxy.yaml"
}
await_proxy() { wait_for proxy 30 curl -fs http://127.0.0.1:26256/healthz; }
