# shellcheck shell=bash
# Daemons of the cluster: start, find, wait for.
# A daemon is known by a variable in its environment that names the state folder, not by a pid file:
# a session may be killed and a folder deleted at any time, /proc stays right. What a daemon starts
# (containerd's shims) inherits the mark and is found too; what runs in pods does not.

MARK=ALLELE_CLUSTER_DIR

T0=${EPOCHREALTIME/[.,]/}
say() { # MESSAGE...: one line of progress with the seconds since this script began
  local t=$(((${EPOCHREALTIME/[.,]/} - T0) / 100000))
  printf '%4d.%ds  %s\n' $((t / 10)) $((t % 10)) "$*"
}
fail() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; exit 1; }

# Pids of everything that was started for a state folder: marked [DIR]
marked() {
  local file
  # grep also fails when a process ends while it reads
  { grep -lzsxF "$MARK=${1:-$CLUSTER_DIR}" /proc/[0-9]*/environ || true; } | while read -r file; do
    file=${file#/proc/}
    echo "${file%/environ}"
  done
}

# Pid of the daemon that runs PROGRAM (a path) for this cluster
pid_of() {
  local pid
  for pid in $(marked); do
    [ "$(readlink "/proc/$pid/exe")" = "$1" ] && echo "$pid" && return
  done
  return 1
}

declare -A PROGRAM   # name of each daemon -> its program; filled by start

# start NAME PROGRAM ARG...: unless it runs, start it detached, with its log in log/NAME.log
start() {
  local name=$1 program
  program=$(realpath -e "$2") || fail "$name: no program at $2; run tools.sh and host.sh"
  shift 2
  PROGRAM[$name]=$program
  pid_of "$program" >/dev/null && return
  # fd 9 is the lock of the script: a daemon must not hold it
  (cd "$CLUSTER_DIR" && exec env "$MARK=$CLUSTER_DIR" setsid "$program" "$@" >>"$LOG/$name.log" 2>&1 </dev/null 9>&-) &
  local pid=$!
  until pid_of "$program" >/dev/null || [ ! -d "/proc/$pid" ]; do sleep 0.02; done
}

# wait_for NAME SECONDS COMMAND...: until COMMAND succeeds; fails at once if daemon NAME has ended
wait_for() {
  local name=$1 seconds=$2 deadline=$((SECONDS + $2))
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ -n "${PROGRAM[$name]-}" ] && ! pid_of "${PROGRAM[$name]}" >/dev/null; then
      tail -n 5 "$LOG/$name.log" >&2
      fail "$name ended instead of becoming ready; the end of $LOG/$name.log is above"
    fi
    if [ "$SECONDS" -ge "$deadline" ]; then
      tail -n 5 "$LOG/$name.log" >&2 2>/dev/null || true
      fail "$name was not ready within $seconds s (waited for: $*); see $LOG"
    fi
    sleep 0.1
  done
}

# One up or down at a time on a machine: take_lock
take_lock() {
  mkdir -p "$ALLELE_CACHE"
  exec 9>"$ALLELE_CACHE/cluster.lock"
  flock -n 9 && return
  echo "$(basename "$0" .sh): another up.sh or down.sh is running, waiting for it"
  flock 9
}

# The text of a template with @NAME@ replaced by the value of the variable NAME: render FILE
render() {
  local text name
  text=$(<"$1")
  while [[ $text =~ @([A-Z][A-Z0-9_]*)@ ]]; do
    name=${BASH_REMATCH[1]}
    text=${text//"@$name@"/"${!name}"}
  done
  printf '%s\n' "$text"
}
