# shellcheck shell=bash disable=SC2034
# (SC2034: the variables are used by the scripts that source this file)
# What every script here agrees on: versions, places, addresses. Sourced, never run.
# ALLELE_CACHE and CLUSTER_DIR may be set from outside. The addresses may not: the network is the
# host's own, so one machine carries one cluster.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# --- versions: each names a folder or file in the cache, so a new number builds anew and leaves the old one alone
KUBERNETES_VERSION=1.36.3
ETCD_VERSION=3.6.6
JOBSET_VERSION=0.12.0
HELM_VERSION=4.2.4
COREDNS_VERSION=1.12.4
VERSITYGW_VERSION=1.8.0
KUBECONFORM_VERSION=0.7.0
FAKEGCS_VERSION=1.56.1
AZURITE_VERSION=3.37.0    # and in npm/azurite
PAUSE_VERSION=1           # ours: raise it with a change of pause.c
PYBASE_VERSION=1          # ours: raise it with a change of the recipe in images.sh
PYBASE_SUITE=bookworm     # brings Python 3.11, the project's

# --- places
ALLELE_CACHE=${ALLELE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/allele}
TOOLS=$ALLELE_CACHE/tools            # <name>-<version>/: programs
IMAGES=$ALLELE_CACHE/images          # <name>-<version>.tar: image archives
BUILD_STORE=$ALLELE_CACHE/buildah-$PYBASE_VERSION    # layers of build.sh, on top of that base
CLUSTER_DIR=$(realpath -m "${CLUSTER_DIR:-$HERE/../../out/cluster}")   # all state; down.sh removes it
LOG=$CLUSTER_DIR/log
PKI=$CLUSTER_DIR/pki
CONF=$CLUSTER_DIR/conf
ADMIN_KUBECONFIG=$CLUSTER_DIR/kubeconfig
CRI=$CLUSTER_DIR/containerd/containerd.sock
CNI_BIN=/usr/lib/cni                 # where Debian puts the plugins

# --- names and addresses
LINK=allele0                         # host link that carries the node's address
CGROUP=allele                        # every pod lives below it
NODE=node-0
NODE_IP=10.243.0.1
POD_NET=10.244.0.0/24
SERVICE_NET=10.96.0.0/16
API_SERVICE_IP=10.96.0.1
DNS_IP=10.96.0.10
API_PORT=26443
ETCD_PORT=23790
S3_PORT=27070
API_URL=https://$NODE_IP:$API_PORT
S3_URL=http://$NODE_IP:$S3_PORT
S3_KEY=allele
S3_SECRET=allele-secret
PYBASE=localhost/pybase:local
CLUSTER_IMAGES=(pause coredns jobset pybase)

# Folder of a tool's programs: tool NAME
tool() { local var=${1^^}_VERSION; echo "$TOOLS/$1-${!var}"; }
# Archive of an image: image_archive NAME
image_archive() { local var=${1^^}_VERSION; [ -n "${!var-}" ] && echo "$IMAGES/$1-${!var}.tar"; }

# Clients of the running cluster. kubectl's discovery cache stays in the state folder, not in $HOME.
k() { KUBECACHEDIR=$CLUSTER_DIR/kubecache "$(tool kubernetes)/kubectl" --kubeconfig="$ADMIN_KUBECONFIG" "$@"; }
ctr_k8s() { ctr -a "$CRI" -n k8s.io "$@"; }
