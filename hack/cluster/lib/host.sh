# shellcheck shell=bash
# What the cluster takes of the host's own network and cgroups.

# Traffic of pods that leaves the host goes out under the host's address.
MASQUERADE=(POSTROUTING -s "$POD_NET" ! -d "$POD_NET" -m comment --comment "$LINK" -j MASQUERADE)

# One cluster per host. The link's alias says whose it is: the state folder of the cluster that made it.
claim_host() {
  local owner other
  owner=$(cat "/sys/class/net/$LINK/ifalias" 2>/dev/null || true)
  if [ -n "$owner" ] && [ "$owner" != "$CLUSTER_DIR" ]; then
    [ -z "$(marked "$owner")" ] || fail "another cluster runs on this host and holds the link $LINK and the address $NODE_IP.
  Its state is in $owner
  To remove it: CLUSTER_DIR=$owner $HERE/down.sh"
    say "clearing what a dead cluster left (its state in $owner stays)"
    sweep "$owner"
  fi
  other=$(ip -4 -o addr show to "$NODE_IP/32" | awk -v own="$LINK" '$2 != own { print $2; exit }')
  [ -z "$other" ] || fail "the address $NODE_IP, which the node needs, is on the link $other. Remove it there (ip addr del), or run where it is free."
}

host_network() {
  if [ ! -e "/sys/class/net/$LINK" ]; then
    # A bridge without ports stands in for a `dummy` link, which not every kernel has. The address must
    # not be on loopback: pods could not reach it, and the API server refuses to advertise it.
    ip link add "$LINK" type bridge
    ip link set "$LINK" alias "$CLUSTER_DIR"
  fi
  ip addr replace "$NODE_IP/32" dev "$LINK"
  ip link set "$LINK" up
  if [ "$(cat /proc/sys/net/ipv4/ip_forward)" != 1 ]; then
    echo 0 >"$CLUSTER_DIR/ip_forward"   # for down.sh
    echo 1 >/proc/sys/net/ipv4/ip_forward
  fi
  iptables -w -t nat -C "${MASQUERADE[@]}" 2>/dev/null || iptables -w -t nat -A "${MASQUERADE[@]}"
}

# The kubelet wants its root cgroup to exist, in every hierarchy of version 1 or in the one of version 2.
pod_cgroup() {
  local hierarchy
  for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/*; do
    if [ -f "$hierarchy/cgroup.procs" ]; then mkdir -p "$hierarchy/$CGROUP"; fi
    [ ! -f /sys/fs/cgroup/cgroup.controllers ] || break
  done
}
