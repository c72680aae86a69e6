#!/usr/bin/env bash
# Makes the image archives that the cluster starts from, once: images.sh [pause | coredns | jobset | pybase]...
# There is no registry to pull from: programs are packed from the tools' binaries, the Python base from Debian packages.
set -euo pipefail
. "$(dirname "$0")/env.sh"

fail() { printf 'images: %s\n' "$*" >&2; exit 1; }
pack() { python3 "$HERE/mkimage.py" "$@"; }

make_pause() { # OUT
  gcc -static -Os -s -o "$scratch/pause" "$HERE/pause.c"
  pack --ref localhost/pause:local --out "$1" --program "$scratch/pause"
}
make_coredns() { pack --ref localhost/coredns:local --out "$1" --program "$(tool coredns)/coredns"; }
make_jobset() {
  cp "$(tool jobset)/jobset" "$scratch/manager"   # the chart runs /manager
  pack --ref localhost/jobset:local --out "$1" --program "$scratch/manager"
}

# Debian with Python 3.11 and a pip that may write: what python:3.11-slim is to a Dockerfile.
make_pybase() {
  local mirror
  # shellcheck disable=SC2016  # apt fills in these names itself
  mirror=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
    awk -v s="$PYBASE_SUITE" '$1 == s && $2 == "main" { print $3; exit }')
  [ -n "$mirror" ] || fail "no mirror of Debian $PYBASE_SUITE in this host's apt sources; pybase is made from one"
  # shellcheck disable=SC2016  # $1 is for mmdebstrap's shell: the folder of the new root
  mmdebstrap --quiet --mode=root --variant=minbase --include=python3,python3-pip,ca-certificates \
    --aptopt='Apt::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='rm -f "$1"/usr/lib/python3.11/EXTERNALLY-MANAGED; ln -sf python3 "$1"/usr/bin/python' \
    --customize-hook='echo nonroot:x:65532:65532::/tmp:/usr/sbin/nologin >>"$1"/etc/passwd; echo nonroot:x:65532: >>"$1"/etc/group' \
    "$PYBASE_SUITE" "$scratch/pybase.tar" "$mirror"
  pack --ref "$PYBASE" --out "$1" --rootfs "$scratch/pybase.tar"
}

make_image() { # NAME
  local out
  out=$(image_archive "$1") || fail "unknown image '$1'; the images are: ${CLUSTER_IMAGES[*]}"
  [ -f "$out" ] && return
  SECONDS=0
  echo "images: making $1"
  "make_$1" "$out"
  echo "images: $1 made in ${SECONDS}s"
}

mkdir -p "$IMAGES"
scratch=$(mktemp -d "$IMAGES/.scratch-XXXXXX")
trap 'rm -rf "$scratch"' EXIT
for name in "${@:-${CLUSTER_IMAGES[@]}}"; do make_image "$name"; done
