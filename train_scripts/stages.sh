# Sourced by the demo and the examples, which put their results into the folder $out.

# stage NAME RESULT COMMAND...: run the command unless its result is there; note its seconds in $out/NAME.seconds. In a
# chain its output goes to $out/logs/NAME.log, of which the screen shows the end if the command fails. With LIST_STAGES=1
# nothing runs: the chain and the name of each stage that is still to do are printed.
stage() {
  local name=$1 result=$2 begin log status=0
  shift 2
  if [ -n "${LIST_STAGES:-}" ]; then
    [ -e "$result" ] || echo "${CHAIN:--} $name"
    return 0
  fi
  if [ -e "$result" ]; then
    echo "== $name: done before ($result)"
    return
  fi
  echo "== $name"
  mkdir -p "$out${CHAIN:+/logs}"
  begin=$(date +%s)
  if [ -z "${CHAIN:-}" ]; then
    "$@"
    echo $(($(date +%s) - begin)) >"$out/$name.seconds"
    return
  fi
  log=$out/logs/$name.log
  "$@" >"$log" 2>&1 </dev/null || status=$?
  if [ $status != 0 ]; then
    { echo "== $name: failed with status $status; the end of $log:" && tail -n 20 "$log"; } >&2
    return $status
  fi
  echo $(($(date +%s) - begin)) >"$out/$name.seconds"
  echo "== $name: $(cat "$out/$name.seconds") s"
}

# chain NAME COMMAND...: run a command, whose stages need each other, beside other chains: as many at once as there are
# cores (JOBS says otherwise), each with its share of the threads. Small matrices keep one thread busier than two.
# Start the longest first, and call finish_chains after the last. A chain inside a chain is part of it.
chain() {
  if [ -n "${CHAIN:-}" ]; then
    "${@:2}"
    return
  fi
  if [ -n "${LIST_STAGES:-}" ]; then
    CHAIN=$1 "${@:2}"
    return
  fi
  while [ "$(wc -w <<<"$running_chains")" -ge "$chain_slots" ]; do await_chain; done
  set -m # a process group of its own: stop_chains ends the commands in it too
  (
    export CHAIN=$1 OMP_NUM_THREADS=$chain_threads
    "${@:2}"
  ) &
  set +m
  running_chains+=" $!"
}

# finish_chains: return when all chains have ended.
finish_chains() {
  while [ -n "$running_chains" ]; do await_chain; done
}

# await_chain: look for chains that have ended, for a moment. If one has failed, end the others and exit with its status.
await_chain() {
  local pid status still=
  for pid in $running_chains; do
    if kill -0 "$pid" 2>/dev/null; then
      still+=" $pid"
      continue
    fi
    status=0
    wait "$pid" || status=$?
    [ $status = 0 ] || exit $status
  done
  running_chains=$still
  [ -z "$running_chains" ] || sleep 0.1
}

stop_chains() {
  local pid
  for pid in $running_chains; do
    kill -TERM -- "-$pid" 2>/dev/null || true
  done
  running_chains=
  wait
}

# Every command imports the same packages. Where Python may not keep their bytecode beside them, it is kept with the
# results: compiling it takes a command 2 to 7 seconds.
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
  case $out in /*) PYTHONPYCACHEPREFIX=$out/bytecode ;; *) PYTHONPYCACHEPREFIX=$PWD/$out/bytecode ;; esac
  export PYTHONPYCACHEPREFIX
  unset PYTHONDONTWRITEBYTECODE
fi

running_chains=
chain_threads=$( (nproc || sysctl -n hw.ncpu || echo 1) 2>/dev/null | head -n 1) # all of them, for one chain
chain_slots=${JOBS:-$chain_threads}
chain_threads=$((chain_threads > chain_slots ? chain_threads / chain_slots : 1))
if [ -z "${CHAIN:-}" ]; then
  trap stop_chains EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
fi
