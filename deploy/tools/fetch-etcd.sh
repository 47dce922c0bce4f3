#!/usr/bin/env bash
# Puts etcd at .tools/etcd/etcd: takes it out of Debian's package etcd-server, without installing that, which would start a server.
set -euo pipefail
cd "$(dirname "$0")/../.."

tools=.tools/etcd
# An etcd of one's own, named or put there by hand, is not second-guessed.
[ -n "${ISTHMUS_ETCD:-}" ] && [ -x "$ISTHMUS_ETCD" ] && exit 0
[ -x "$tools/etcd" ] && exit 0

fail() {
  cat >&2 <<'HELP'
etcd could not be fetched. apt's message is above; usual reasons:
  - this is no Debian or Ubuntu: put an etcd binary of your own at .tools/etcd/etcd, or name it in ISTHMUS_ETCD;
  - the package lists are old: sudo apt-get update.
HELP
  exit 1
}
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || fail
echo "Fetching etcd (Debian's package etcd-server, 7 MB) ..."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
download() { (cd "$work" && apt-get download -qq -o APT::Sandbox::User=root etcd-server); }
if ! download; then
  [ "$(id -u)" -eq 0 ] && apt-get update -qq && download || fail
fi
dpkg-deb -x "$work"/etcd-server_*.deb "$work/root"
mkdir -p "$tools"
install -m 755 "$work/root/usr/bin/etcd" "$tools/etcd"
"$tools/etcd" --version | sed -n 's/etcd Version: /etcd is here: /p'
