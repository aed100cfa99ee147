#!/usr/bin/env bash
# Installs the system packages that a build needs, when they are missing and this is allowed.
# With the word `chaos` also what its faults need; a row whose tools are missing is skipped.
set -euo pipefail

missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v cc >/dev/null || missing+=(gcc)
command -v make >/dev/null || missing+=(make)
command -v pkg-config >/dev/null || missing+=(pkg-config)
command -v curl >/dev/null || missing+=(curl)
command -v python3 >/dev/null || missing+=(python3)
python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip)
python3 -m venv --help >/dev/null 2>&1 || missing+=(python3-venv)

if [ "${1:-}" = chaos ]; then
  command -v ip >/dev/null || missing+=(iproute2)
  command -v nft >/dev/null || missing+=(nftables)
  command -v mount >/dev/null || missing+=(mount)
  compgen -G '/usr/lib*/**/faketime/libfaketime.so.1' >/dev/null || missing+=(libfaketime)
fi

if [ ${#missing[@]} -gt 0 ]; then
  sudo=""
  if [ "$(id -u)" -ne 0 ]; then
    sudo="sudo -n"
    if ! $sudo true 2>/dev/null; then
      echo "setup: please install: ${missing[*]}" >&2
      [ "${1:-}" = chaos ] && exit 0
      exit 1
    fi
  fi
  echo "setup: installing ${missing[*]}"
  if ! { $sudo apt-get update -q &&
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -q -y --no-install-recommends "${missing[@]}"; }; then
    echo "setup: could not install ${missing[*]}" >&2
    [ "${1:-}" = chaos ] && exit 0
    exit 1
  fi
fi

if ! command -v cargo >/dev/null; then
  echo "setup: Rust is needed (rustup, stable 1.95 or later)" >&2
  exit 1
fi
