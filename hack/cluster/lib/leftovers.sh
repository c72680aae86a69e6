# shellcheck shell=bash
# Takes a cluster off this host: processes, mounts, namespaces, rules, link, cgroups, everything but the state folder.
# Works from what the kernel shows and not from notes of up.sh, because it must also clear what a killed
# session or a deleted checkout left. DIR is the state folder of the cluster to remove; it may be gone.
# Much here may be absent or end by itself meanwhile: `|| true` says that this is expected, not an error.

# kill_marked DIR PATTERN: processes of that cluster whose program's name matches.
# KILL at once: no state is kept that a TERM would save.
kill_marked() {
  local pid program
  for pid in $(marked "$1"); do
    program=$(basename "$(readlink "/proc/$pid/exe")")
    # shellcheck disable=SC2053  # a pattern is wanted
    if [[ $program == $2 ]]; then kill -KILL "$pid" 2>/dev/null || true; fi
  done
}

pod_cgroups() { find "/sys/fs/cgroup/$CGROUP" /sys/fs/cgroup/*/"$CGROUP" -depth -type d 2>/dev/null || true; }

kill_pods() {
  local pids tries
  for ((tries = 0; tries < 50; tries++)); do   # until none is left: a killed process may just have forked
    mapfile -t pids < <(pod_cgroups | while read -r dir; do cat "$dir/cgroup.procs"; done 2>/dev/null | sort -u)
    [ ${#pids[@]} -gt 0 ] || return 0
    kill -KILL "${pids[@]}" 2>/dev/null || true
    sleep 0.1
  done
  fail "processes in the cgroup $CGROUP do not end: ${pids[*]}"
}

# Network namespaces of pods: those that a sandbox of ours names, and those that hold an address of the pods' net.
pod_namespaces() { # DIR
  local file name
  cat "$1"/containerd/state/io.containerd.runtime.v2.task/k8s.io/*/config.json 2>/dev/null |
    grep -oE 'netns/cni-[0-9a-f-]+' | sed 's,netns/,,' || true
  for file in /run/netns/cni-*; do
    name=$(basename "$file")
    if [ -n "$(ip -n "$name" -4 -o addr show to "$POD_NET" 2>/dev/null)" ]; then echo "$name"; fi
  done
}
remove_pod_namespaces() { # DIR
  local name
  for name in $(pod_namespaces "$1" | sort -u); do
    umount "/run/netns/$name" 2>/dev/null || true   # the pod's veth pair goes with it
    rm -f "/run/netns/$name"
  done
}

unmount_below() { # DIR
  local mount
  awk '{ print $5 }' /proc/self/mountinfo | sort -r | while read -r mount; do
    mount=$(printf '%b' "$mount")   # the kernel writes blanks as \040
    if [[ $mount == "$1"/* ]]; then umount -l "$mount" 2>/dev/null || true; fi
  done
}

# end_node DIR: the kubelet, containerd and what they hold
end_node() {
  kill_marked "$1" 'kubelet*'      # first, or it starts the pods again
  kill_pods                        # while their shims are there to reap them
  remove_pod_namespaces "$1"
  kill_marked "$1" 'containerd*'   # and its shims
  unmount_below "$1"
}

remove_rules() {
  local chain proxy rules
  proxy=$(tool kubernetes)/kube-proxy
  if [ -x "$proxy" ]; then
    "$proxy" --cleanup >/dev/null 2>&1 || true
  elif [[ $(iptables-save 2>/dev/null) == *:KUBE-* ]]; then
    echo "no $proxy: the iptables chains KUBE-* stay until tools.sh and down.sh, or a reboot" >&2
  fi
  # --cleanup leaves this chain, which it shares with a kubelet that fills it; ours does not
  rules=$(iptables -w -S KUBE-FIREWALL 2>/dev/null || true)
  if [ -n "$rules" ] && [[ $rules != *"-A "* ]]; then
    for chain in INPUT OUTPUT; do iptables -w -D $chain -j KUBE-FIREWALL 2>/dev/null || true; done
    iptables -w -X KUBE-FIREWALL
  fi
  while iptables -w -t nat -D "${MASQUERADE[@]}" 2>/dev/null; do :; done
}

# What containerd, CNI and the kubelet write at fixed places, whatever they are told
remove_host_files() { # DIR
  local link socket result sandbox
  for link in /var/log/containers/*; do
    if [[ -L $link && $(readlink "$link") == "$1"/* ]]; then rm -f "$link"; fi
  done
  for socket in /run/containerd/s/*; do   # of shims; those of a containerd that is not ours are in use
    grep -qF "$socket" /proc/net/unix || rm -f "$socket"
  done
  for result in /var/lib/cni/results/allele-*-eth0; do
    sandbox=${result#*/allele-}
    rm -f "$result" "/var/lib/cni/results/cni-loopback-${sandbox%-eth0}-lo"
  done
  rm -f /var/lib/kubelet/device-plugins/kubelet.sock
  rmdir /var/lib/kubelet/device-plugins /var/lib/kubelet /var/lib/cni/results /var/lib/cni /var/log/containers \
    /run/containerd/s /run/containerd/io.containerd.* /run/containerd /run/netns 2>/dev/null || true
}

# sweep DIR: all of the above
sweep() {
  end_node "$1"
  kill_marked "$1" '*'
  remove_rules
  ip link del "$LINK" 2>/dev/null || true
  if [ -f "$1/ip_forward" ]; then cat "$1/ip_forward" >/proc/sys/net/ipv4/ip_forward; fi
  pod_cgroups | while read -r dir; do rmdir "$dir" 2>/dev/null || true; done
  remove_host_files "$1"
}
