#!/usr/bin/env bash
# Removes the cluster and its state from this host. The cache (tools, image archives, build layers) stays.
set -euo pipefail
. "$(dirname "$0")/env.sh"
. "$HERE/lib/process.sh"
. "$HERE/lib/leftovers.sh"
. "$HERE/lib/host.sh"

[ "$(id -u)" = 0 ] || fail "must be root, as up.sh was"
take_lock
owner=$(cat "/sys/class/net/$LINK/ifalias" 2>/dev/null || true)
if [ -n "$owner" ] && [ "$owner" != "$CLUSTER_DIR" ]; then
  fail "the cluster on this host is not that of $CLUSTER_DIR. Its state is in $owner
  To remove it: CLUSTER_DIR=$owner $HERE/down.sh"
fi
if [ ! -f "$CLUSTER_DIR/versions" ] && [ -n "$(ls -A "$CLUSTER_DIR" 2>/dev/null)" ]; then
  fail "$CLUSTER_DIR is not the state of a cluster (it has no file 'versions'); CLUSTER_DIR must name one"
fi
if [ -z "$owner" ] && [ -z "$(marked)" ] && [ ! -d "$CLUSTER_DIR" ]; then
  say "down: nothing there"
  exit
fi
sweep "$CLUSTER_DIR"
if [ -d "$CLUSTER_DIR" ]; then
  # --one-file-system: a volume that could not be unmounted must not be emptied. `versions`, which tells
  # that the folder is ours, goes last, so that an interrupted removal can be repeated.
  find "$CLUSTER_DIR" -mindepth 1 -maxdepth 1 ! -name versions -exec rm -rf --one-file-system {} +
  rm -rf --one-file-system "$CLUSTER_DIR"
fi
say "down: removed the cluster of $CLUSTER_DIR"
