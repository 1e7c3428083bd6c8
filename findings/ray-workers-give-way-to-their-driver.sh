#!/usr/bin/env bash
# ray 2.60.0: workers of a local cluster run at niceness 15, whatever the niceness of the program that starts it.
#
# Guess: a worker competes for the cores like the process that calls it; ray.remote of a function that computes takes as
# long as the same function in a process of one's own while other programs are busy.
# Seen: os.nice(0) is 0 in the driver and 15 in a task and in an actor. On cores that other programs share, the actor
# gets a fraction of what the driver gets (searches by actors took 1.35 times as long as in the driver's process, and starting four
# actors 40 s in place of 17 s, on two busy cores). The variable RAY_worker_niceness is read where the node starts: set
# it to 0 before ray.init() or ray start. It is in no argument of ray.init.
#
# The script needs a network for pip, uses a temporary folder, and fails when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d /tmp/rayXXXX)  # sockets have names of at most 107 bytes
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-compile 'ray==2.60.0'
cat > "$folder/niceness.py" <<'PYTHON'
import os

import ray

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")


@ray.remote
def task():
    return os.nice(0)


@ray.remote
class Actor:
    def niceness(self):
        return os.nice(0)


print(os.nice(0), ray.get(task.remote()), ray.get(Actor.remote().niceness.remote()))
PYTHON
run() { env HOME="$folder" RAY_TMPDIR="$folder" RAY_USAGE_STATS_ENABLED=0 "$@" "$folder/venv/bin/python" "$folder/niceness.py" | tail -n 1; }
usual=$(run env -u RAY_worker_niceness)
changed=$(run env RAY_worker_niceness=0)
own=$(nice)
echo "ray 2.60.0, niceness of driver, task and actor: $usual; with RAY_worker_niceness=0: $changed"
[ "$usual" = "$own 15 15" ] && [ "$changed" = "$own 0 0" ] || { echo "this has changed"; exit 1; }
