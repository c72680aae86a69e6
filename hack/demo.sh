#!/usr/bin/env bash
# `make demo`: says what it will do, sets up, then hands over to hack/demo.
#   demo.sh cluster local      a cluster of its own on this machine (root)
#   demo.sh cluster existing   the cluster of the current kubectl context, after asking; images and store by variables
#   demo.sh local              no cluster: local processes over a file store
set -euo pipefail
cd "$(dirname "$0")/.."
mode=$1 cluster=${2:-local}
. hack/cluster/env.sh

have() { [ -e "$1" ] && echo "there already" || echo "$2"; }
echo "Allele demo: sixteen adapters on one base learn sixteen private preferences."
echo
echo "  Python environment   .venv, 6 GB                              $(have .venv/bin/uv '1-3 minutes')"
case $mode-$cluster in
  local-*)
    echo "  run                  local processes, state in out/local      about 4 minutes"
    echo
    echo "No changes to the host: 'make down' removes the rest."
    ;;
  cluster-local)
    [ "$(id -u)" = 0 ] || { echo "demo: a cluster needs root, found $(id -un); as another user: make demo MODE=local" >&2; exit 1; }
    echo "  Kubernetes, JobSet,  built from Go modules into               $(have "$(tool kubernetes)/kubelet" 'about 17 minutes')"
    echo "  Helm, S3 server      ${ALLELE_CACHE/#$HOME/\~}, 1 GB"
    echo "  Debian packages      containerd, runc, buildah, iptables      $(command -v buildah >/dev/null && echo 'there already' || echo '1 minute')"
    echo "  cluster and images   state in out/cluster                     1-3 minutes"
    echo "  run                  pods in namespace allele-demo            about 5 minutes"
    echo
    echo "On the host: the packages, a bridge $LINK ($NODE_IP), iptables rules, a cgroup '$CGROUP'; 'make down' removes all but the packages."
    ;;
  cluster-existing)
    context=$(kubectl config current-context)
    for name in ALLELE_IMAGES ALLELE_BUCKET AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY; do
      [ -n "${!name:-}" ] && continue
      echo "demo: $name is not set. An existing cluster needs ALLELE_IMAGES (registry and path of the images allele-operator," >&2
      echo "allele-gateway and allele, tag ALLELE_TAG, default dev; see docs/install.md), ALLELE_BUCKET, AWS_ACCESS_KEY_ID," >&2
      echo "AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL unless the bucket is at AWS." >&2
      exit 1
    done
    echo "  chart                namespace allele-system                  1 minute"
    echo "  run                  namespace allele-demo                    about 5 minutes"
    echo
    read -r -p "Install into the cluster of context '$context'? Type its name: " answer
    [ "$answer" = "$context" ] || { echo "demo: not confirmed, nothing was done" >&2; exit 1; }
    ;;
  *) echo "demo: expected MODE=cluster or MODE=local and CLUSTER=local or CLUSTER=existing, found MODE=$mode CLUSTER=$cluster" >&2; exit 2 ;;
esac
echo
SECONDS=0
make --no-print-directory env
setup=$SECONDS SECONDS=0
[ "$mode-$cluster" != cluster-local ] || make --no-print-directory images
exec .venv/bin/python hack/demo/main.py --mode "$mode" --cluster "$cluster" --setup-seconds "$setup" --cluster-seconds "$SECONDS"
