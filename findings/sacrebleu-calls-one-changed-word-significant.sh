#!/usr/bin/env bash
# sacrebleu 2.6.0: the paired tests call differences significant that cannot be. Approximate randomization (--paired-ar)
# gives p = 0.0001 for a system that differs from the baseline in one word of one sentence of 60, and both tests give their
# smallest p (0.0001, 0.0010) for an exact copy of the baseline.
#
# Guess: swapping the two outputs of the one sentence that differs leaves the difference as large as it was, so that every
# shuffle is as extreme as what was seen: p = 1. The same for a copy.
# Seen: p = 1 / (trials + 1) in both cases: only trials whose difference is strictly larger than the real one are counted,
# and ties are what few differing sentences consist of. With one differing sentence the exact p is 1, with two that
# both got better 1/2; --paired-ar says 0.0001. --paired-bs is right about the near one (0.09), and wrong about the copy.
# Who meets it: whoever compares a run with a feature that is off or hardly acts (weight 0, empty datastore) with the
# plain run, and short or easy test sets.
# Way out: p = 1 where the scores are equal; bootstrap where few sentences differ; look how many do.
#
# The script needs a network for pip, uses a temporary folder, and fails when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'sacrebleu==2.6.0'
cd "$folder"
venv/bin/python - <<'PYTHON'
words = "the a old young big red dog cat man house sees finds in on under behind".split()
lines = [" ".join(words[(i * 7 + j * 5 + j * j * i) % len(words)] for j in range(9)) + " ." for i in range(60)]
system = [line if i % 3 else " ".join(line.split()[:5] + ["really"] + line.split()[6:]) for i, line in enumerate(lines)]
nearly = [" ".join(["truly", *line.split()[1:]]) if i == 7 else line for i, line in enumerate(system)]
for name, text in (("ref", lines), ("system", system), ("copy", system), ("nearly", nearly)):
    open(name, "w").write("\n".join(text) + "\n")
PYTHON
for test in bs ar; do
  venv/bin/sacrebleu ref -i system copy nearly -m bleu --paired-$test --format json > $test.json 2>/dev/null
done
venv/bin/python - <<'PYTHON'
import json
import sys

for test, least in (("bs", 1 / 1001), ("ar", 1 / 10001)):
    rows = {row["system"].split(" ")[-1]: row["BLEU"] for row in json.load(open(f"{test}.json"))}
    print(test, {name: (row["score"], row["p_value"]) for name, row in rows.items()})
    copy, nearly = rows["copy"]["p_value"], rows["nearly"]["p_value"]
    as_seen = nearly > 0.05 if test == "bs" else abs(nearly - least) < 1e-9
    if abs(copy - least) > 1e-9 or not as_seen:
        sys.exit(f"changed since sacrebleu 2.6.0: paired {test} test gives p {copy} for a copy, {nearly} for one word")
PYTHON
