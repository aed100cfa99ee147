#!/usr/bin/env bash
# A cluster on this machine: starts the nodes, ingests a corpus, answers one search, and leaves
# the cluster running until Ctrl-C. `make run` calls it with SHOAL_BIN, NODES, DOCS and BASE_PORT.
#
# Every number of nodes has data of its own: a node that was one of three is no majority alone.
set -euo pipefail
cd "$(dirname "$0")/.."

bin="${SHOAL_BIN:?}"
nodes="${NODES:-3}"
docs="${DOCS:-}"
data="${DATA:-data}"
cluster="$data/$nodes-nodes"
# Node n listens on BASE_PORT + 10 (n - 1) and the two ports after it.
base_port="${BASE_PORT:-6333}"
pids=()

stop() {
  trap - INT TERM EXIT
  echo
  echo "stopping the cluster"
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  echo "stopped; the data stays in $cluster"
}
trap stop EXIT
trap 'exit 0' INT TERM

port() { echo $((base_port + ($1 - 1) * 10 + $2)); }

if [ -z "$docs" ]; then
  # Real text that is on every machine that has built Shoal: the READMEs of its dependencies.
  docs="$data/corpus"
  store=crate-readmes
  question="how do I retry a failed request with exponential backoff?"
  limit=(--limit "${LIMIT:-60}")
  mkdir -p "$docs"
  for file in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/*/README.md; do
    crate=$(basename "$(dirname "$file")")
    [ -s "$file" ] && cp -n "$file" "$docs/$crate.md" 2>/dev/null || true
  done
else
  # Not every shell expands the ~ of `make run DOCS=~/papers`.
  docs=$(realpath -e "${docs/#\~\//$HOME/}")
  store=$(basename "$docs")
  question="what is most important in $store?"
  limit=()
  [ -z "${LIMIT:-}" ] || limit=(--limit "$LIMIT")
fi
question="${QUESTION:-$question}"

join=""
for ((n = 1; n <= nodes; n++)); do join+="${join:+,}127.0.0.1:$(port "$n" 1)"; done

mkdir -p "$cluster"
for ((n = 1; n <= nodes; n++)); do
  # Signals of the terminal reach this script only, so that nodes stop in order.
  setsid "$bin" serve --name "node$n" --data "$cluster/node$n" --models models \
    --http "127.0.0.1:$(port "$n" 0)" --grpc "127.0.0.1:$(port "$n" 1)" --mesh "127.0.0.1:$(port "$n" 2)" \
    --join "$join" --expect "$nodes" >"$cluster/node$n.log" 2>&1 &
  pids+=($!)
done

url="http://127.0.0.1:$(port 1 0)"
echo "starting $nodes node(s); logs are in $cluster/node*.log"
for ((n = 1; n <= nodes; n++)); do
  for ((try = 0; ; try++)); do
    if "$bin" health --ready --url "http://127.0.0.1:$(port "$n" 0)" >/dev/null 2>&1; then break; fi
    if ! kill -0 "${pids[$((n - 1))]}" 2>/dev/null || ((try > 300)); then
      echo "node$n did not start:" >&2
      tail -n 20 "$cluster/node$n.log" >&2
      exit 1
    fi
    sleep 0.2
  done
done

"$bin" ingest "$docs" --store "$store" --url "$url" "${limit[@]}"
echo
"$bin" search "$question" --store "$store" --url "$url" --limit 3
echo
echo "the cluster is running:"
for ((n = 1; n <= nodes; n++)); do
  echo "  node$n  http://127.0.0.1:$(port "$n" 0)   gRPC 127.0.0.1:$(port "$n" 1)   process ${pids[$((n - 1))]}"
done
echo "try:  $bin search \"your question\" --store $store --url $url"
echo "      $bin status --url $url"
echo "Ctrl-C stops it"
wait
