#!/usr/bin/env bash
# Builds the programs of the cluster at pinned versions into the cache: tools.sh [NAME...]
# About 17 minutes on two cores for all of them from nothing; nothing to do when they are there.
# The tests' servers of other clouds are built when they are named, a minute for both; tests do that themselves.
# Kubernetes, etcd and JobSet cannot be installed by `go install module@version` (replace directives,
# or a version list that proxies refuse), so gomods/ holds a module for each that pins what it needs.
set -euo pipefail
. "$(dirname "$0")/env.sh"

ALL=(kubernetes etcd jobset helm coredns versitygw kubeconform)
CLOUDS=(azurite fakegcs)
# Static, because some of them become images without a libc; the same flags always, or Go compiles everything again.
export CGO_ENABLED=0
FLAGS=(-v -trimpath -mod=readonly)

fail() { printf 'tools: %s\n' "$*" >&2; exit 1; }

# build_<name> DIR writes the component's files into DIR, from the folder gomods/<name> where there is one.
build_kubernetes() {
  local v=k8s.io/component-base/version
  go build "${FLAGS[@]}" -o "$1/" \
    -ldflags "-s -w -X $v.gitVersion=v$KUBERNETES_VERSION -X $v.gitMajor=1 -X $v.gitMinor=36" \
    k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-scheduler,kubelet,kube-proxy,kubectl}
}
build_etcd() { go build "${FLAGS[@]}" -ldflags '-s -w' -o "$1/etcd" go.etcd.io/etcd/server/v3; }
build_jobset() {
  go build "${FLAGS[@]}" -ldflags '-s -w' -o "$1/jobset" sigs.k8s.io/jobset
  # its Helm chart comes with the module; a copy beside the binary outlives a cleaned module cache
  cp -r "$(go list -m -f '{{.Dir}}' sigs.k8s.io/jobset)/charts/jobset" "$1/chart"
  chmod -R u+w "$1/chart"
}
build_helm() {
  install_module "$1" "-X helm.sh/helm/v4/internal/version.version=v$HELM_VERSION" "helm.sh/helm/v4/cmd/helm@v$HELM_VERSION"
}
build_coredns() { install_module "$1" '' "github.com/coredns/coredns@v$COREDNS_VERSION"; }
build_versitygw() { install_module "$1" '' "github.com/versity/versitygw/cmd/versitygw@v$VERSITYGW_VERSION"; }
build_kubeconform() { install_module "$1" '' "github.com/yannh/kubeconform/cmd/kubeconform@v$KUBECONFORM_VERSION"; }
build_fakegcs() { install_module "$1" '' "github.com/fsouza/fake-gcs-server@v$FAKEGCS_VERSION"; }
build_azurite() {
  cp -r "$HERE"/npm/azurite/. "$1"
  # --loglevel: it asks for a newer Node, and runs on 20
  npm ci --prefix "$1" --ignore-scripts --no-audit --no-fund --loglevel error
}
install_module() { GOBIN=$1 go install -v -trimpath -ldflags "-s -w $2" "$3"; }

# heartbeat LABEL LOG: go build -v names each package when it is compiled, so lines of the log measure progress
heartbeat() {
  while sleep 20; do
    printf 'tools: %s: %s packages compiled, %ss\n' "$1" "$(grep -c / "$2" || true)" "$SECONDS"
  done
}

make_tool() { # NAME
  local name=$1 dir log tmp beat
  dir=$(tool "$name")
  [ -d "$dir" ] && return
  log=$dir.log tmp=$dir.tmp
  rm -rf "$tmp"
  mkdir -p "$tmp"
  SECONDS=0
  echo "tools: $(basename "$dir"): building"
  heartbeat "$(basename "$dir")" "$log" & beat=$!
  # shellcheck disable=SC2064  # the pid is meant to be fixed now
  trap "kill $beat 2>/dev/null" EXIT
  if ! (cd "$HERE/gomods/$name" 2>/dev/null || cd /; "build_$name" "$tmp") >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "$(basename "$dir") did not build; the whole log is $log. It needs Go 1.26 and a module proxy that answers (go env GOPROXY); azurite needs Node 20 and npm. To go on: $0 $name"
  fi
  kill "$beat"
  trap - EXIT
  mv "$tmp" "$dir"   # only a whole folder ever has the final name
  rm -f "$log"
  echo "tools: $(basename "$dir"): built in ${SECONDS}s"
}

wanted=()
for name in "${@:-${ALL[@]}}"; do
  [[ " ${ALL[*]} ${CLOUDS[*]} " == *" $name "* ]] || fail "unknown tool '$name'; the tools are: ${ALL[*]} ${CLOUDS[*]}"
  [ -d "$(tool "$name")" ] || wanted+=("$name")
done
[ ${#wanted[@]} -gt 0 ] || exit 0
command -v go >/dev/null || fail "no 'go' in PATH, and these are to be built: ${wanted[*]}. Install Go 1.26."
mkdir -p "$TOOLS"
# two builds at once would write the same folders: the second waits, then finds them there
exec 9>"$TOOLS/.lock"
flock -n 9 || { echo "tools: another build is running, waiting for it"; flock 9; }
for name in "${wanted[@]}"; do make_tool "$name"; done
