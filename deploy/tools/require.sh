#!/usr/bin/env bash
# Installs the Debian packages that building, the demo and the tests need, where they are missing.
set -euo pipefail

declare -A package=(
  [cc]=gcc [dig]=bind9-dnsutils [setpriv]=util-linux [python3]=python3 [ip]=iproute2 [curl]=curl [cmake]=cmake
)
missing=()
for tool in "$@"; do
  command -v "$tool" >/dev/null || missing+=("${package[$tool]:?unknown tool $tool}")
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
