#!/usr/bin/env bash
# Builds an earlier commit of this repository beside the present one, for tests of upgrades, and prints which.
# The result is TARGET/release/shoal-old. Usage: deploy/old-build.sh TARGET [COMMIT]
#
# Without a commit: the one in tests/previous-build, which is changed whenever a build goes out.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"
target=$(realpath "$1")
commit=${2:-}

if [ -z "$commit" ]; then
  commit=$(cat tests/previous-build)
fi
commit=$(git rev-parse --verify --quiet "$commit^{commit}") || {
  echo "old-build: there is no such commit here; a shallow clone has no earlier ones (git fetch --unshallow)" >&2
  exit 1
}
if [ -x "$target/release/shoal-old" ] && [ "$(cat "$target/release/shoal-old.commit" 2>/dev/null)" = "$commit" ]; then
  git log -1 --format='the earlier build is %h: %s (built before)' "$commit"
  exit
fi
git log -1 --format='the earlier build is %h: %s' "$commit"

tree="$target/old/tree"
git worktree prune
if [ -e "$tree/.git" ]; then
  git -C "$tree" checkout --quiet --force --detach "$commit"
else
  mkdir -p "$target/old"
  git worktree add --quiet --force --detach "$tree" "$commit"
fi

# A target folder of its own: Cargo takes the crates of two trees for the same ones, and those for fresh whose files
# are older than the last build. The dependencies are brought along, and not built again.
if [ ! -d "$target/old/release" ] && [ -d "$target/release/.fingerprint" ]; then
  mkdir -p "$target/old/release/deps"
  cp -a --reflink=auto "$target/release/.fingerprint" "$target/release/build" "$target/old/release/"
  rm -rf "$target/old/release/.fingerprint/shoal-"* "$target/old/release/build/shoal-"*
  find "$target/release/deps" -maxdepth 1 -type f -not -name '*shoal*' \
    \( -name '*.rlib' -o -name '*.rmeta' -o -name '*.so' -o -name '*.d' \) \
    -exec cp -a --reflink=auto -t "$target/old/release/deps" {} +
fi
rm -f "$target/release/shoal-old.commit"
(cd "$tree" && CARGO_TARGET_DIR="$target/old" cargo build --release --workspace --bin shoal)
cp "$target/old/release/shoal" "$target/release/shoal-old"
echo "$commit" > "$target/release/shoal-old.commit"
