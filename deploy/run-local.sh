#!/usr/bin/env bash
# A cluster on this machine: starts the nodes, ingests a corpus, answers one search, and leaves
# the cluster running until Ctrl-C. `make run` calls it with SHOAL_BIN, NODES and DOCS.
set -euo pipefail
cd "$(dirname "$0")/.."

bin="${SHOAL_BIN:?}"
nodes="${NODES:-3}"
docs="${DOCS:-}"
data="${DATA:-data}"
question="${QUESTION:-how do I retry a failed request with exponential backoff?}"
pids=()

stop() {
  trap - INT TERM EXIT
  echo
  echo "stopping the cluster"
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  echo "stopped; the data stays in $data"
}
trap stop EXIT
trap 'exit 0' INT TERM

port() { echo $((6333 + ($1 - 1) * 10 + $2)); }

join=""
for ((n = 1; n <= nodes; n++)); do join+="${join:+,}127.0.0.1:$(port "$n" 1)"; done

mkdir -p "$data"
for ((n = 1; n <= nodes; n++)); do
  # Signals of the terminal reach this script only, so that nodes stop in order.
  setsid "$bin" serve --name "node$n" --data "$data/node$n" --models models \
    --http "127.0.0.1:$(port "$n" 0)" --grpc "127.0.0.1:$(port "$n" 1)" --mesh "127.0.0.1:$(port "$n" 2)" \
    --join "$join" --expect "$nodes" >"$data/node$n.log" 2>&1 &
  pids+=($!)
done

url="http://127.0.0.1:$(port 1 0)"
echo "starting $nodes node(s); logs are in $data/node*.log"
for ((n = 1; n <= nodes; n++)); do
  for ((try = 0; ; try++)); do
    if "$bin" health --ready --url "http://127.0.0.1:$(port "$n" 0)" >/dev/null 2>&1; then break; fi
    if ! kill -0 "${pids[$((n - 1))]}" 2>/dev/null || ((try > 300)); then
      echo "node$n did not start:" >&2
      tail -n 20 "$data/node$n.log" >&2
      exit 1
    fi
    sleep 0.2
  done
done

if [ -z "$docs" ]; then
  # Real text that is on every machine that has built Shoal: the READMEs of its dependencies.
  docs="$data/corpus"
  mkdir -p "$docs"
  for file in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/*/README.md; do
    crate=$(basename "$(dirname "$file")")
    [ -s "$file" ] && cp -n "$file" "$docs/$crate.md" 2>/dev/null || true
  done
fi
limit=()
[ -n "${DOCS:-}" ] || limit=(--limit "${LIMIT:-60}")
"$bin" ingest "$docs" --store documents --url "$url" "${limit[@]}"
echo
"$bin" search "$question" --store documents --url "$url" --limit 3
echo
echo "the cluster is running:"
for ((n = 1; n <= nodes; n++)); do echo "  node$n  http://127.0.0.1:$(port "$n" 0)   gRPC 127.0.0.1:$(port "$n" 1)"; done
echo "try:  $bin search \"your question\" --url $url"
echo "      $bin status --url $url"
echo "Ctrl-C stops it"
wait
