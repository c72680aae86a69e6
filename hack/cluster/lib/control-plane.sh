# shellcheck shell=bash
# etcd, API server, controller manager, scheduler.

start_etcd() {
  local client=http://127.0.0.1:$ETCD_PORT peer=http://127.0.0.1:$((ETCD_PORT + 1))
  # --unsafe-no-fsync: several times faster on a busy disk; a crash of the machine may lose the cluster, which is fine here
  start etcd "$(tool etcd)/etcd" --data-dir "$CLUSTER_DIR/etcd" --unsafe-no-fsync --log-level warn \
    --listen-client-urls "$client" --advertise-client-urls "$client" \
    --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" --initial-cluster "default=$peer"
}

start_apiserver() {
  start apiserver "$(tool kubernetes)/kube-apiserver" --etcd-servers="http://127.0.0.1:$ETCD_PORT" \
    --bind-address="$NODE_IP" --advertise-address="$NODE_IP" --secure-port="$API_PORT" \
    --service-cluster-ip-range="$SERVICE_NET" --allow-privileged=true \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
    --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" --client-ca-file="$PKI/ca.crt" \
    --service-account-issuer=https://kubernetes.default.svc.cluster.local \
    --service-account-signing-key-file="$PKI/sa.key" --service-account-key-file="$PKI/sa.pub" \
    --kubelet-preferred-address-types=InternalIP --kubelet-certificate-authority="$PKI/ca.crt" \
    --kubelet-client-certificate="$PKI/apiserver-kubelet.crt" --kubelet-client-key="$PKI/apiserver-kubelet.key" \
    --requestheader-client-ca-file="$PKI/front-ca.crt" --requestheader-allowed-names=front-proxy \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
    --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --proxy-client-cert-file="$PKI/front.crt" --proxy-client-key-file="$PKI/front.key"
}

# Leader election is off (there is one of each, and it costs start time); the client limits are raised so
# that a burst of JobSet pods is not held up by the default of 20 requests a second.
start_controller_manager() {
  start controller-manager "$(tool kubernetes)/kube-controller-manager" --kubeconfig="$PKI/controller-manager.kubeconfig" \
    --leader-elect=false --kube-api-qps=300 --kube-api-burst=500 \
    --bind-address=127.0.0.1 --secure-port=26457 --cert-dir="$CLUSTER_DIR/controller-manager" \
    --use-service-account-credentials --service-account-private-key-file="$PKI/sa.key" --root-ca-file="$PKI/ca.crt" \
    --cluster-signing-cert-file="$PKI/ca.crt" --cluster-signing-key-file="$PKI/ca.key" \
    --flex-volume-plugin-dir="$CLUSTER_DIR/volume-plugins"
}

start_scheduler() {
  start scheduler "$(tool kubernetes)/kube-scheduler" --kubeconfig="$PKI/scheduler.kubeconfig" \
    --leader-elect=false --kube-api-qps=300 --kube-api-burst=500 \
    --bind-address=127.0.0.1 --secure-port=26459 --cert-dir="$CLUSTER_DIR/scheduler"
}

await_apiserver() { wait_for apiserver 60 k get --raw /readyz; }
await_controllers() {
  wait_for controller-manager 60 k get serviceaccount default
  wait_for scheduler 30 curl -fsk https://127.0.0.1:26459/healthz
}
