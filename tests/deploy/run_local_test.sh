#!/usr/bin/env bash
# Does what README's first command does once everything is built, three times over the same data directory:
#
#   tests/deploy/run_local_test.sh target/release/shoal
#
# Three nodes with the sample corpus, one node with files of one's own, three nodes again. Each time the cluster must
# come up, answer a search with its sources, and be gone without a trace after a Ctrl-C, with exit code 0. Where there is
# no embedded model it prints `SKIPPED: reason` and exits 0. It has ports and a directory of its own.

set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
scratch=
script=
# How long a run may take until its cluster is there and has answered, in seconds.
patience=240

skip() { echo "SKIPPED: $*"; exit 0; }
say() { echo "== $*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

binary=${1:-}
[[ -n $binary ]] || { echo "usage: $0 PATH_OF_THE_SHOAL_BINARY" >&2; exit 2; }
[[ -f $binary && -x $binary ]] || fail "$binary is no executable file"
binary=$(realpath "$binary")
[[ -f $root/models/multilingual-e5-small/model.safetensors ]] || skip "there is no model; run make model"
command -v python3 >/dev/null || skip "python3 is not installed"

clean_up() {
    local code=$?
    trap - EXIT INT TERM
    set +e
    if [[ -n $script ]] && kill -TERM "$script" 2>/dev/null; then
        wait "$script"
    fi
    if ((code != 0)); then
        for log in "$scratch"/*.log "$scratch"/data/*-nodes/*.log; do
            [[ -f $log ]] && echo "--- $log ends:" && tail -n 20 "$log"
        done
    fi
    [[ -z $scratch ]] || rm -rf "$scratch"
    exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
scratch=$(mktemp -d)

# Below the range of outgoing connections, with room for three nodes.
free_base_port() {
    python3 - <<'PYTHON'
import random, socket, sys
for _ in range(1000):
    base = random.randrange(10_000, 30_000)
    try:
        for port in (base + 10 * node + port for node in range(3) for port in range(3)):
            socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        continue
    print(base)
    sys.exit(0)
sys.exit("no free ports")
PYTHON
}

# run NAME SOURCE [VARIABLE=VALUE…]: a whole run, whose search must print a source that matches SOURCE.
run() {
    local name=$1 source=$2 log=$scratch/$1.log deadline=$((SECONDS + patience)) code=0 processes process
    shift 2
    say "$name"
    : >"$log"
    # In a process group of its own: a script in the background of another one ignores SIGINT otherwise.
    set -m
    env -u NODES -u DOCS -u LIMIT -u QUESTION "$@" SHOAL_BIN="$binary" DATA="$scratch/data" BASE_PORT="$base_port" \
        "$root/deploy/run-local.sh" >"$log" 2>&1 &
    script=$!
    set +m
    until grep -q '^Ctrl-C stops it' "$log"; do
        kill -0 "$script" 2>/dev/null || fail "$name: it ended by itself"
        ((SECONDS < deadline)) || fail "$name: the cluster does not run after $patience s"
        sleep 0.2
    done
    grep -q '^the cluster is running' "$log" || fail "$name: it does not say that the cluster is running"
    grep -Eq '^[1-9][0-9]* documents searchable, 0 failed' "$log" || fail "$name: not all documents are searchable"
    grep -Eq "^1\. $source.*\(score [0-9.]+\)" "$log" || fail "$name: the search has printed no source like $source"
    mapfile -t processes < <(sed -En 's/^  node[0-9]+ .*process ([0-9]+)$/\1/p' "$log")
    ((${#processes[@]} > 0)) || fail "$name: it names no process"
    for process in "${processes[@]}"; do
        kill -0 "$process" 2>/dev/null || fail "$name: the node with process $process does not run"
    done

    kill -INT "$script"
    wait "$script" || code=$?
    script=
    ((code == 0)) || fail "$name: after Ctrl-C the exit code is $code"
    for process in "${processes[@]}"; do
        ! kill -0 "$process" 2>/dev/null || fail "$name: process $process is left"
    done
    echo "   ${#processes[@]} node(s) ran and are gone"
}

base_port=$(free_base_port)
mkdir "$scratch/harbour notes"
echo "The heron of Lisbon guards the ledger in the old harbour office." >"$scratch/harbour notes/heron.txt"
printf '# Keys\n\nThe badger of Oslo keeps the keys of the observatory.\n' >"$scratch/harbour notes/badger.md"

run "three nodes, the sample corpus" '.*\.md' LIMIT=4
run "one node, files of one's own" '(heron\.txt|badger\.md)' NODES=1 DOCS="$scratch/harbour notes"
run "three nodes again" '.*\.md' LIMIT=4

echo "PASSED: run_local_test"
