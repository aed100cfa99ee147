#!/usr/bin/env bash
# Runs docker-compose.yml for real: three nodes from the image that deploy/Dockerfile makes, one of them killed, then five
# and three again.
#
#   tests/deploy/compose_test.sh target/release/shoal
#
# It proves that the image holds all that the binary needs, that the nodes find each other by the names in the Compose
# file and become healthy by its healthchecks, that what was acknowledged is read back from the other nodes after one is
# killed, that the killed one comes back with everything, that a node stops by itself when asked to, and that two more
# nodes take their share of the shards and give it back when they are drained, with nothing lost.
#
# No registry is needed: the base image is made here, once, with debootstrap. Where no Docker Engine runs, or a tool is
# missing that cannot be installed, it prints `SKIPPED: reason` and exits 0. Everything but the base image is removed at
# the end, however it ends.
#
# The environment variable SHOAL_TEST_MIRROR names a Debian mirror for debootstrap, in place of its default.

set -euo pipefail

base=shoal-base:bookworm
image=shoal:compose-test-$$
project=shoal-compose-test-$$
root=$(cd "$(dirname "$0")/../.." && pwd)
scratch=
compose=()

skip() { echo "SKIPPED: $*"; exit 0; }
say() { echo "== $*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

# ---- what is needed --------------------------------------------------------------------------------------------------

binary=${1:-}
[[ -n $binary ]] || { echo "usage: $0 PATH_OF_THE_SHOAL_BINARY" >&2; exit 2; }
command -v docker >/dev/null || skip "docker is not installed"
# The client alone answers `docker info` with success on some versions; the server's version is there only with a server.
[[ -n $(timeout 20 docker info --format '{{.ServerVersion}}' 2>/dev/null) ]] || skip "no Docker Engine runs"
if docker compose version >/dev/null 2>&1; then
    compose=(docker compose)
elif command -v docker-compose >/dev/null; then
    compose=(docker-compose)
else
    skip "Compose is not installed"
fi
for tool in curl python3; do
    command -v "$tool" >/dev/null || skip "$tool is not installed"
done
[[ -f $binary && -x $binary ]] || fail "$binary is no executable file"
binary=$(realpath "$binary")

# ---- always clean up -------------------------------------------------------------------------------------------------

clean_up() {
    local code=$?
    trap - EXIT INT TERM
    set +e
    if [[ -n ${SHOAL_API_KEY:-} ]]; then
        if ((code != 0)); then
            in_project ps
            in_project logs --no-color 2>&1 | tail -n 200
        fi
        in_project down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1
    fi
    docker image rm --force "$image" >/dev/null 2>&1
    [[ -z $scratch ]] || rm -rf "$scratch"
    exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
scratch=$(mktemp -d)
: >"$scratch/empty.env"

# --env-file keeps a developer's own .env, with other ports and secrets, out of this.
in_project() {
    "${compose[@]}" --file "$root/docker-compose.yml" --project-directory "$root" --project-name "$project" \
        --env-file "$scratch/empty.env" --profile more "$@"
}

# ---- the image -------------------------------------------------------------------------------------------------------

make_base() {
    if docker image inspect "$base" >/dev/null 2>&1; then
        return
    fi
    ((EUID == 0)) || skip "only root can make the base image"
    if ! command -v debootstrap >/dev/null; then
        command -v apt-get >/dev/null || skip "debootstrap is not installed"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq debootstrap; } >"$scratch/apt.log" 2>&1 ||
            skip "debootstrap could not be installed: $(tail -n 1 "$scratch/apt.log")"
    fi
    say "making the base image $base"
    # ca-certificates is what the Dockerfile would otherwise fetch during the build.
    debootstrap --variant=minbase --include=ca-certificates bookworm "$scratch/rootfs" \
        ${SHOAL_TEST_MIRROR:+"$SHOAL_TEST_MIRROR"} >"$scratch/debootstrap.log" 2>&1 || {
        tail -n 20 "$scratch/debootstrap.log" >&2
        fail "debootstrap"
    }
    # What a package manager leaves behind is of no use to a node.
    rm -rf "$scratch"/rootfs/var/{cache/apt,lib/apt/lists,log}/* "$scratch"/rootfs/usr/share/{doc,man,locale}/*
    tar --create --numeric-owner --directory "$scratch/rootfs" . | docker import - "$base" >/dev/null
    rm -rf "$scratch/rootfs"
}

make_image() {
    # A context of its own, so that the test neither finds nor leaves a dist/ in the work tree.
    local context=$scratch/context
    mkdir -p "$context/dist" "$context/deploy"
    cp "$root/deploy/Dockerfile" "$context/deploy/"
    cp "$root/.dockerignore" "$context/"
    cp "$binary" "$context/dist/shoal"
    ! command -v strip >/dev/null || strip --strip-debug "$context/dist/shoal" 2>/dev/null || true
    chmod 0755 "$context/dist/shoal"
    if [[ -d $root/models ]]; then
        cp -rL --link "$root/models" "$context/models" 2>/dev/null || cp -rL "$root/models" "$context/models"
    else
        echo "   no models/: the image is made without embedded weights, and the points below bring their own vectors"
        mkdir "$context/models"
    fi
    say "building $image"
    docker build --quiet --file "$context/deploy/Dockerfile" --target prebuilt --build-arg "BASE=$base" \
        --tag "$image" "$context" >"$scratch/build.log" 2>&1 || {
        tail -n 40 "$scratch/build.log" >&2
        fail "docker build"
    }
    [[ $(docker image inspect --format '{{.Config.User}}' "$image") == 10001:10001 ]] || fail "the image runs as another user"
}

# ---- the cluster -----------------------------------------------------------------------------------------------------

free_ports() {
    python3 - <<'PYTHON'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
print(*(s.getsockname()[1] for s in sockets))
PYTHON
}

# `ps -q` does not list a stopped container in every version of Compose, so this asks the engine, by Compose's own labels.
container_of() {
    docker ps --all --quiet --filter "label=com.docker.compose.project=$project" \
        --filter "label=com.docker.compose.service=$1"
}

wait_healthy() {
    local node deadline=$((SECONDS + $1)) state
    shift
    for node in "$@"; do
        until state=$(docker inspect --format '{{.State.Health.Status}}' "$(container_of "$node")") && [[ $state == healthy ]]; do
            ((SECONDS < deadline)) || fail "$node is not healthy but $state"
            sleep 1
        done
    done
}

# start NODE...: as README tells people to, and waits until they are healthy.
start() {
    in_project up --detach --no-build "$@" >"$scratch/up.log" 2>&1 || { cat "$scratch/up.log" >&2; fail "compose up $*"; }
    wait_healthy 180 "$@"
}

# shoal NODE ARGUMENT...: the command line inside a node's container, where the key is in the environment.
shoal() {
    local node=$1
    shift
    docker exec "$(container_of "$node")" shoal "$@" || fail "shoal $* on $node"
}

# wait_settled SECONDS NODE...: these nodes and no others are the cluster, each holds something, every shard has its three
# replicas on them, all with a vote, and placement has nothing left to do.
wait_settled() {
    local deadline=$((SECONDS + $1)) missing
    shift
    while true; do
        request GET node-1 /admin/cluster/report >"$scratch/report.json"
        missing=$(python3 - "$scratch/report.json" "$@" <<'PYTHON'
import json, pathlib, sys
report, wanted = json.loads(pathlib.Path(sys.argv[1]).read_text()), sorted(sys.argv[2:])
nodes, placement = report["nodes"], report["placement"]
names = sorted(node["name"] for node in nodes)
ids = {node["id"] for node in nodes}
if names != wanted:
    print(f"the cluster is {names}")
elif silent := [node["name"] for node in nodes if not node["answers"]]:
    print(f"silent are {silent}")
elif empty := [node["name"] for node in nodes if not node["replicas"]]:
    print(f"without a replica are {empty}")
elif placement is None or placement["steps"] or placement["moving"] or placement["waiting"]:
    print(f"placement: {placement}")
else:
    for shard in report["shards"]:
        group, replicas = shard["group"], sorted(shard["replicas"])
        if group is None or sorted(group["voters"]) != replicas or group["learners"] or len(replicas) != 3 or not ids.issuperset(replicas):
            print(f"shard {shard['id']} is on {replicas}: {group}")
            break
PYTHON
        ) || fail "the report cannot be read: $(cat "$scratch/report.json")"
        [[ -n $missing ]] || return 0
        ((SECONDS < deadline)) || fail "the cluster is not settled: $missing"
        sleep 1
    done
}

# request METHOD NODE PATH [BODY]: prints the answer. A 5xx or a refused connection is tried again for half a minute,
# which is what a client does while a group elects a leader; every request here is safe to repeat.
request() {
    local method=$1 node=$2 path=$3 body=${4:-} deadline=$((SECONDS + 30)) code
    local arguments=(--silent --show-error --max-time 15 --request "$method" --header "api-key: $SHOAL_API_KEY"
        --output "$scratch/answer" --write-out '%{http_code}')
    if [[ -n $body ]]; then
        arguments+=(--header 'Content-Type: application/json' --data-binary "$body")
    fi
    while true; do
        code=$(curl "${arguments[@]}" "http://127.0.0.1:${port[$node]}$path" 2>"$scratch/curl.log") || code=000
        case $code in
            2??) cat "$scratch/answer"; return ;;
            000 | 429 | 5??) ;;
            *) fail "$method $path on $node: $code $(cat "$scratch/answer")" ;;
        esac
        ((SECONDS < deadline)) || fail "$method $path on $node: still $code $(cat "$scratch/curl.log" "$scratch/answer" 2>/dev/null)"
        sleep 0.5
    done
}

# Points FIRST … LAST, as a request body. Each number follows from the id, so a reader can work out what must be there,
# and all are exact in any floating point format that a node may store.
points() {
    python3 - "$1" "$2" <<'PYTHON'
import json, sys
first, last = map(int, sys.argv[1:])
print(json.dumps({"points": [
    {"id": i, "vector": [1 + i % 7, i % 5, i % 3, 0.5], "payload": {"text": f"point {i}", "square": i * i}}
    for i in range(first, last + 1)
]}))
PYTHON
}

write() { # write NODE FIRST LAST
    request PUT "$1" "/collections/shoals/points?wait=true" "$(points "$2" "$3")" >/dev/null
}

# Everything that was acknowledged must be there, whole, and nothing else.
expect_all() { # expect_all NODE LAST
    local body
    body=$(python3 -c 'import json,sys; print(json.dumps({"ids": list(range(1, int(sys.argv[1]) + 1)), "with_payload": True, "with_vector": True}))' "$2")
    request POST "$1" /collections/shoals/points "$body" >"$scratch/points.json"
    request POST "$1" /collections/shoals/points/count '{"exact": true}' >"$scratch/count.json"
    points 1 "$2" >"$scratch/expected.json"
    python3 - "$scratch" "$1" <<'PYTHON' || fail "$1 does not hold what was acknowledged"
import json, pathlib, sys
scratch, node = pathlib.Path(sys.argv[1]), sys.argv[2]
expected = {point["id"]: point for point in json.loads((scratch / "expected.json").read_text())["points"]}
found = {point["id"]: point for point in json.loads((scratch / "points.json").read_text())["result"]}
count = json.loads((scratch / "count.json").read_text())["result"]["count"]
missing = sorted(expected.keys() - found.keys())
changed = [
    i for i in expected.keys() & found.keys()
    if found[i]["payload"] != expected[i]["payload"]
    or any(abs(a - b) > 1e-3 for a, b in zip(found[i]["vector"], expected[i]["vector"], strict=True))
]
if missing or changed or count != len(expected):
    print(f"{node}: missing {missing[:10]}, changed {changed[:10]}, count {count} of {len(expected)}", file=sys.stderr)
    sys.exit(1)
PYTHON
    echo "   $1 has all $2 points"
}

make_base
make_image

SHOAL_API_KEY=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
SHOAL_CLUSTER_SECRET=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
read -r SHOAL_NODE_1_PORT SHOAL_NODE_2_PORT SHOAL_NODE_3_PORT SHOAL_NODE_4_PORT SHOAL_NODE_5_PORT SHOAL_GRPC_PORT \
    <<<"$(free_ports)"
export SHOAL_API_KEY SHOAL_CLUSTER_SECRET SHOAL_GRPC_PORT
export SHOAL_NODE_1_PORT SHOAL_NODE_2_PORT SHOAL_NODE_3_PORT SHOAL_NODE_4_PORT SHOAL_NODE_5_PORT
export SHOAL_IMAGE=$image SHOAL_PUBLISH=127.0.0.1 SHOAL_MEMORY=3g
# An engine inside a sandbox may be held to fewer open files than the Compose file asks for, and then starts nothing.
limit=$(docker run --rm --entrypoint /bin/sh "$image" -c 'ulimit -Hn')
if [[ $limit != unlimited ]] && ((limit < 65536)); then
    export SHOAL_OPEN_FILES=$limit
fi
declare -A port=(
    [node-1]=$SHOAL_NODE_1_PORT [node-2]=$SHOAL_NODE_2_PORT [node-3]=$SHOAL_NODE_3_PORT
    [node-4]=$SHOAL_NODE_4_PORT [node-5]=$SHOAL_NODE_5_PORT
)

say "starting three nodes"
start node-1 node-2 node-3

say "a request without the key is refused"
code=$(curl --silent --max-time 15 --output /dev/null --write-out '%{http_code}' "http://127.0.0.1:${port[node-1]}/collections") || true
[[ $code == 401 || $code == 403 ]] || fail "without a key the answer was $code"

say "writing through every node"
request PUT node-1 /collections/shoals \
    '{"vectors": {"size": 4, "distance": "Dot"}, "shard_number": 3, "replication_factor": 3}' >/dev/null
write node-1 1 100
write node-2 101 200
write node-3 201 300
for node in node-1 node-2 node-3; do expect_all "$node" 300; done

say "killing node-2"
docker kill --signal KILL "$(container_of node-2)" >/dev/null
write node-3 301 400
for node in node-1 node-3; do expect_all "$node" 400; done

say "node-2 comes back"
docker start "$(container_of node-2)" >/dev/null
wait_healthy 120 node-2
expect_all node-2 400

say "node-3 stops by itself"
docker stop --time 30 "$(container_of node-3)" >/dev/null
code=$(docker inspect --format '{{.State.ExitCode}}' "$(container_of node-3)")
[[ $code == 0 ]] || fail "node-3 ended with code $code; 137 means that it had to be killed"
for node in node-1 node-2; do expect_all "$node" 400; done

say "five nodes"
start node-3 node-4 node-5
wait_settled 180 node-1 node-2 node-3 node-4 node-5
write node-4 401 500
for node in node-1 node-2 node-3 node-4 node-5; do expect_all "$node" 500; done

say "three nodes again"
for node in node-4 node-5; do
    shoal node-1 cluster drain "$node" &
    drain=$!
    # Through the node that is leaving, while it does.
    write "$node" 501 600
    wait "$drain"
done
in_project rm --stop --force node-4 node-5 >"$scratch/rm.log" 2>&1 || { cat "$scratch/rm.log" >&2; fail "compose rm"; }
for node in node-4 node-5; do
    [[ -z $(container_of "$node") ]] || fail "$node is still there"
    shoal node-1 cluster remove "$node"
done
wait_settled 120 node-1 node-2 node-3
for node in node-1 node-2 node-3; do expect_all "$node" 600; done

echo "PASSED: compose_test"
