# Sourced by the demo and the examples.

# stage NAME RESULT COMMAND...: run the command unless its result is there; note its seconds in $out/NAME.seconds.
stage() {
  local name=$1 result=$2 begin
  shift 2
  if [ -e "$result" ]; then
    echo "== $name: done before ($result)"
    return
  fi
  echo "== $name"
  begin=$(date +%s)
  "$@"
  echo $(($(date +%s) - begin)) > "$out/$name.seconds"
}
