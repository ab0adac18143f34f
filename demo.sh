#!/usr/bin/env bash
# The whole chain on scikit-learn's digits in a fresh folder, with the time that each step took.
set -uo pipefail
cd "$(dirname "$0")" || exit 1
root=$PWD
folder=
times=()

finish() { # finish STATUS: the times, the report's verdict and where the report is
    printf '\nTimes\n'
    printf '  %s\n' "${times[@]}"
    local report=$folder/bundle/report.json
    if [ -n "$folder" ] && [ -f "$report" ]; then
        python - "$report" <<'PY'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    report = json.load(file)
checks = report["checks"]
failed = [check["name"] for check in checks if check["passed"] is False]
passed = sum(check["passed"] is True for check in checks)
verdict = "passed" if report["passed"] else f"FAILED ({', '.join(failed) or 'see the report'})"
print(f"Report   {sys.argv[1].removesuffix('json')}html")
print(f"Verdict  {verdict}: {passed} checks passed, {len(report['not_run'])} not run")
PY
    fi
    [ "$1" -eq 0 ] || printf 'The demo FAILED in its last step (exit status %s).\n' "$1"
    exit "$1"
}

step() { # step NAME COMMAND: print the command, run it, note its time
    local began=$SECONDS status
    printf '\n$ %s\n' "$2"
    bash -c "$2"
    status=$?
    times+=("$(printf '%-8s %4d s' "$1" $((SECONDS - began)))")
    [ "$status" -eq 0 ] || finish "$status"
}

step set-up "make --no-print-directory setup"
PATH=$root/.venv/bin:$PATH

number=1
while [ -e "demo/run-$number" ]; do number=$((number + 1)); done
mkdir -p "demo/run-$number" && cd "demo/run-$number" || exit 1
folder=$PWD
printf '\n$ cd demo/run-%s\n' "$number"

step train "eps-train --with-baseline"
step compact "eps-compact ckpt.pt"
step verify "eps-verify compact.pt"
step deploy "eps-deploy --engine ort --time-budget 15"
step predict "eps-predict bundle bundle/examples/*.png"
finish 0
