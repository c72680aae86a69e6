# shellcheck shell=bash
# Certificates and kubeconfigs: an own CA, one client certificate per component, so that the API server's
# Node and RBAC authorisers see the same identities as in a cluster that kubeadm makes.

# Longer than any cluster of this kind lives; up.sh does not renew.
DAYS=365

issue() { # NAME EXTENSIONS SUBJECT [openssl option...]
  local name=$1 extensions=$2 subject=$3
  shift 3
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days $DAYS \
    -config "$HERE/config/openssl.cnf" -extensions "$extensions" -subj "$subject" \
    -keyout "$PKI/$name.key" -out "$PKI/$name.crt.tmp" "$@" 2>>"$LOG/pki.log" ||
    fail "openssl could not issue $name; see $LOG/pki.log"
  mv "$PKI/$name.crt.tmp" "$PKI/$name.crt"   # a certificate that is there is whole, and so is its key
}
authority() { [ -f "$PKI/$1.crt" ] || SAN=DNS:none issue "$1" authority "/CN=$1"; }
certificate() { # NAME CA SUBJECT [SUBJECT_ALT_NAMES]
  [ -f "$PKI/$1.crt" ] || SAN=${4:-DNS:$1} issue "$1" leaf "$3" -CA "$PKI/$2.crt" -CAkey "$PKI/$2.key"
}

kubeconfig() { # FILE CERTIFICATE
  [ -f "$1" ] && return
  local CA CERT KEY
  # shellcheck disable=SC2034  # the template uses them
  CA=$(base64 -w0 "$PKI/ca.crt") CERT=$(base64 -w0 "$PKI/$2.crt") KEY=$(base64 -w0 "$PKI/$2.key")
  (umask 077 && render "$HERE/config/kubeconfig.yaml" >"$1.tmp")
  mv "$1.tmp" "$1"
}

make_pki() {
  local name
  authority ca
  authority front-ca   # signs only the API server's calls to aggregated APIs
  if [ ! -f "$PKI/sa.pub" ]; then   # the key pair of ServiceAccount tokens
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out "$PKI/sa.key" 2>>"$LOG/pki.log"
    openssl pkey -in "$PKI/sa.key" -pubout -out "$PKI/sa.pub"
  fi
  certificate apiserver ca /CN=kube-apiserver \
    "IP:$NODE_IP,IP:$API_SERVICE_IP,IP:127.0.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
  certificate apiserver-kubelet ca /O=system:masters/CN=apiserver-kubelet
  certificate front front-ca /CN=front-proxy
  certificate admin ca /O=system:masters/CN=admin
  certificate controller-manager ca /CN=system:kube-controller-manager
  certificate scheduler ca /CN=system:kube-scheduler
  certificate proxy ca /CN=system:kube-proxy
  certificate kubelet ca "/O=system:nodes/CN=system:node:$NODE"
  certificate kubelet-server ca "/CN=$NODE" "IP:$NODE_IP,DNS:$NODE"
  kubeconfig "$ADMIN_KUBECONFIG" admin
  for name in controller-manager scheduler proxy kubelet; do kubeconfig "$PKI/$name.kubeconfig" "$name"; done
}
