#!/usr/bin/env bash
# What tests need besides .venv: Chromium for the pages, PostgreSQL for the shared ledger. What is
# there stays, and then this takes no time. Without the right to install, tests that need them are
# skipped; with CI=true that is a failure.
#   tools/test_machine.sh
set -euo pipefail
cd "$(dirname "$0")/.."

log=.cache/test_machine.log

say() { printf 'kvmarket: %s\n' "$*" >&2; }

chromium_is_there() {
  local program
  [ -z "${CHROMIUM:-}" ] || return 0
  for program in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$program" > /dev/null 2>&1; then return 0; fi
  done
  return 1
}

# PostgreSQL does not run as root: then it needs its user too.
postgresql_is_there() {
  { compgen -G '/usr/lib/postgresql/*/bin/postgres' || command -v postgres; } > /dev/null 2>&1 || return 1
  [ "$(id -u)" -ne 0 ] || id postgres > /dev/null 2>&1
}

missing() {
  chromium_is_there || echo chromium
  postgresql_is_there || echo postgresql
}

mapfile -t wanted < <(missing)
[ "${#wanted[@]}" -gt 0 ] || exit 0

# Only CI's machines are ours to change by sudo.
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if [ "${CI:-}" = true ] && sudo -n true 2> /dev/null; then as_root=(sudo -n); else as_root=(false); fi
fi
if command -v apt-get > /dev/null 2>&1 && [ "${as_root[0]:-}" != false ]; then
  mkdir -p .cache
  say "installing ${wanted[*]} for the tests (the log is $log)"
  # RUNLEVEL=1: tests start servers of their own, and need none that starts with the machine.
  {
    "${as_root[@]}" apt-get update &&
      "${as_root[@]}" env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "${wanted[@]}"
  } > "$log" 2>&1 || { say "that did not work:"; tail -n 5 "$log" >&2; }
fi

mapfile -t wanted < <(missing)
[ "${#wanted[@]}" -gt 0 ] || exit 0
say "there is no ${wanted[*]} here, and no way to install it: apt-get install ${wanted[*]}"
if [ "${CI:-}" = true ]; then exit 1; fi
say "tests that need it WILL BE SKIPPED"
