#!/usr/bin/env bash
# Removes what `make cluster` and `make demo` started on this machine. The cache of binaries and images stays.
set -euo pipefail
cd "$(dirname "$0")/.."
hack/cluster/down.sh
rm -rf out/demo out/local
