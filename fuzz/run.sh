#!/usr/bin/env bash
# Builds the fuzz targets with coverage and runs each for a while; fails on the first finding and says how to go on.
# Works with stable Rust: the coverage pass is LLVM's, libFuzzer comes with libfuzzer-sys.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
Usage: fuzz/run.sh [SECONDS] [TARGET]
  SECONDS  for each target (default 60)
  TARGET   tunnel, hello or availability (default: all of them)

Examples:
  fuzz/run.sh                 all targets, a minute each
  fuzz/run.sh 600 hello       one target, ten minutes

It begins with fuzz/corpus/TARGET and keeps what it learns in target/fuzz/corpus/TARGET. Findings go to
target/fuzz/findings/TARGET.
EOF
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
seconds=${1:-60}
all=(tunnel hello availability)
read -r -a targets <<<"${2:-${all[*]}}"
[[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "fuzz: TIME must be a number of seconds, not '$seconds'" >&2; exit 2; }
for target in "${targets[@]}"; do
  [[ " ${all[*]} " == *" $target "* ]] || { echo "fuzz: no target '$target'; there are: ${all[*]}" >&2; exit 2; }
done

host=$(rustc -vV | sed -n 's/^host: //p')
# With --target, build scripts and macros are left alone: they have no runtime for the coverage to report to.
flags="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
flags+=" -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
echo "== fuzz: build with coverage (minutes the first time)"
CARGO_INCREMENTAL=0 CARGO_TARGET_DIR=target/fuzz RUSTFLAGS="$flags" \
  "${CARGO:-cargo}" build --quiet --profile fuzz --target "$host" -p isthmus-fuzz --features libfuzzer --bins --locked

for target in "${targets[@]}"; do
  program=target/fuzz/$host/fuzz/fuzz-$target
  learnt=target/fuzz/corpus/$target findings=target/fuzz/findings/$target log=target/fuzz/$target.log
  mkdir -p "$learnt" "$findings"
  echo "== fuzz: $target for $seconds s ($(find "fuzz/corpus/$target" -type f | wc -l) seeds, $(find "$learnt" -type f | wc -l) learnt)"
  # A play of the availability feed is a word per byte; long ones only repeat themselves, slowly.
  if [ "$target" = availability ]; then longest=400; else longest=20000; fi
  status=0
  "$program" "$learnt" "fuzz/corpus/$target" -max_total_time="$seconds" -max_len="$longest" -timeout=10 -use_value_profile=1 -rss_limit_mb=2048 \
    -artifact_prefix="$findings/" >"$log" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null || true' EXIT
  # One line every five seconds or so: executions, edges covered, inputs learnt.
  while kill -0 "$pid" 2>/dev/null; do
    for _ in 1 2 3 4 5; do kill -0 "$pid" 2>/dev/null && sleep 1; done
    grep -aE '^#[0-9]+' "$log" | tail -n 1 | sed -E 's/^/   /; s/ (lim|L|MS):.*//' || true
  done
  wait "$pid" || status=$?
  trap - EXIT
  if [ "$status" -ne 0 ]; then
    grep -aEA12 "panicked at|ERROR: libFuzzer|SUMMARY" "$log" | head -n 40 | cut -c1-300 >&2 || tail -n 20 "$log" >&2
    finding=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
    cat >&2 <<EOF

fuzz: $target found something (whole output: $log)
  input:      ${finding:-none written; see the output}
  reproduce:  $program ${finding:-FILE}
  shrink:     $program -minimize_crash=1 -max_total_time=60 -artifact_prefix=$findings/ ${finding:-FILE}
  when fixed: copy the input to fuzz/corpus/$target/ under a name that says what it was; \`make test\` replays it
EOF
    exit 1
  fi
done
echo "== fuzz: nothing found in $seconds s of ${targets[*]} each (whole output: target/fuzz/*.log)"
