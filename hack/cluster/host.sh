#!/usr/bin/env bash
# Installs the Debian packages that the cluster needs and this host lacks. Nothing to do when all are there.
# What is missing is told by the file a package brings, not by its name, so that the same program
# from another vendor's package (containerd.io, say) is accepted and not replaced.
set -euo pipefail

NEEDED=( # file or command -> package
  containerd:containerd        ctr:containerd          runc:runc
  /usr/lib/cni/ptp:containernetworking-plugins         iptables:iptables
  ip:iproute2                  flock:util-linux        openssl:openssl
  curl:curl                    python3:python3         gcc:gcc
  /usr/include/signal.h:libc6-dev                      buildah:buildah
  mmdebstrap:mmdebstrap        /etc/ssl/certs/ca-certificates.crt:ca-certificates
)
POLICY=/usr/sbin/policy-rc.d

fail() { printf 'host: %s\n' "$*" >&2; exit 1; }
quiet() { DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 "$@" >/dev/null; }

there() { case $1 in /*) [ -e "$1" ] ;; *) command -v "$1" >/dev/null ;; esac; }
missing() {
  local entry
  for entry in "${NEEDED[@]}"; do there "${entry%%:*}" || echo "${entry#*:}"; done | sort -u
}

# We run containerd ourselves, from our own folder: the packaged service must not start, and must not
# be masked either, so the maintainer scripts are told "no" for the time of the installation only.
without_services() {
  if [ ! -e "$POLICY" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod +x "$POLICY"
    trap 'rm -f "$POLICY"' EXIT
  fi
  "$@"
}

mapfile -t packages < <(missing)
[ ${#packages[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] || fail "packages are missing (${packages[*]}); run as root, or install them"
command -v apt-get >/dev/null || fail "this is not a Debian system; install by hand what brings: ${packages[*]}"

SECONDS=0
echo "host: installing ${packages[*]}"
# package lists are absent in images and may be stale elsewhere: one update, only if the first try fails
if ! without_services quiet install --no-install-recommends "${packages[@]}" 2>/dev/null; then
  quiet update || fail "apt-get update failed: the Debian mirror of /etc/apt must be reachable"
  without_services quiet install --no-install-recommends "${packages[@]}" ||
    fail "apt-get could not install ${packages[*]}; its own message is above"
fi
mapfile -t packages < <(missing)
[ ${#packages[@]} -eq 0 ] || fail "apt-get reported success, but these are still missing: ${packages[*]}"
echo "host: packages there after ${SECONDS}s"
