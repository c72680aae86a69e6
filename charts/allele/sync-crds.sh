#!/usr/bin/env bash
# Copies crds/ into the chart, which may not reach outside itself; --check fails when they differ.
# Not into the chart's own crds/ folder: Helm never upgrades what lies there.
set -euo pipefail
cd "$(dirname "$0")"
source=../../crds copy=files/crds
if [ "${1:-}" = --check ]; then
  diff -ru "$source" "$copy" || { echo "charts/allele/$copy differs from crds/: run charts/allele/sync-crds.sh" >&2; exit 1; }
  exit
fi
mkdir -p "$copy"
rm -f "$copy"/*.yaml
cp "$source"/*.yaml "$copy"/
