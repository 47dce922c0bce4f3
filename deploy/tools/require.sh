#!/usr/bin/env bash
# Checks for Rust and installs the Debian packages that building, the demo and the tests need, where they are missing.
set -euo pipefail

if ! command -v cargo >/dev/null; then
  echo "cargo is missing: install Rust 1.95 or later, with rustfmt and clippy (https://rustup.rs)" >&2
  exit 1
fi

declare -A package=(
  [cc]=gcc [g++]=g++ [dig]=bind9-dnsutils [setpriv]=util-linux [python3]=python3 [pip]=python3-pip
  [ip]=iproute2 [nft]=nftables [faketime]=faketime
)
missing=()
for tool in "$@"; do
  if [ "$tool" = pip ]; then
    # Debian packs it apart; whatever brought it elsewhere, this is how it is called.
    python3 -m pip --version >/dev/null 2>&1 || missing+=("${package[pip]}")
  else
    command -v "$tool" >/dev/null || missing+=("${package[$tool]:?unknown tool $tool}")
  fi
done
[ ${#missing[@]} -eq 0 ] && exit 0

echo "Missing: Debian packages ${missing[*]}"
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  echo "Installed ${missing[*]}"
else
  echo "Install them first: sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
