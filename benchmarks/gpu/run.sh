#!/usr/bin/env bash
# Measure on a GPU machine without network: bash benchmarks/gpu/run.sh STAGE...   (see README.md)
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
kit=${KIT:-$root/.kit}
venv=${VENV:-/tmp/eps-venv}
work=${WORK:-/tmp/eps-work}
OUT=${OUT:-/tmp/out}
DEVICE=${DEVICE:-cuda}
PROVIDER=${PROVIDER:-cuda}
mkdir -p "$OUT" "$work"
cd "$root" || exit 1

# A virtual environment over the machine's own Python, which has torch; made by hand, because a bare
# machine may lack ensurepip.
if [ ! -e "$venv/.ready" ]; then
    base=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    real=$(python3 -c 'import os, sys; print(os.path.realpath(sys.executable))')
    mkdir -p "$venv/bin"
    ln -sfn "$real" "$venv/bin/python"
    ln -sfn python "$venv/bin/python3"
    printf 'home = %s\ninclude-system-site-packages = false\n' "$(dirname "$real")" > "$venv/pyvenv.cfg"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site"
    echo "$base" > "$site/base.pth"
    # onnxruntime.preload_dlls() looks for CUDA and cuDNN beside its own package.
    [ ! -d "$base/nvidia" ] || ln -sfn "$base/nvidia" "$site/nvidia"
    [ ! -e "$kit/onnxruntime-gpu.tar.xz" ] || "$venv/bin/python" -c \
        'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
        "$kit/onnxruntime-gpu.tar.xz" "$site"
    "$venv/bin/python" -m pip install -q --no-index --no-deps --no-compile "$kit"/site/*.whl &&
        "$venv/bin/python" -m pip install -q --no-index --no-deps --no-build-isolation --no-compile -e . &&
        ! "$venv/bin/python" -m pip check | grep '^eps-resnet' && # what neither the machine nor the kit has
        touch "$venv/.ready" || { echo "run.sh: setting up $venv failed" >&2; exit 1; }
fi
export PATH="$venv/bin:$PATH" PYTHONUNBUFFERED=1

step() { # NAME COMMAND...: run it, log it, print the end of its output
    local name=$1 began=$SECONDS code
    shift
    echo "== $name: $*" | cut -c1-200
    "$@" > "$OUT/$name.log" 2>&1
    code=$?
    tail -4 "$OUT/$name.log" | cut -c1-300
    echo "$name exit=$code $((SECONDS - began)) s" | tee -a "$OUT/steps.txt"
    return $code
}

stage_facts() {
    nvidia-smi > "$OUT/nvidia-smi.log" 2>&1
    step doctor eps-doctor
    step cuda python "$here/cuda_check.py"
}

stage_bench() { # alone on the machine
    local precision
    for precision in ${PRECISIONS:-fp32 tf32 bf16}; do
        step "step-$precision" python benchmarks/training.py --device "$DEVICE" --sections gate \
            --cuda-graph --precision "$precision" --rounds "${ROUNDS:-20}" --depth "${DEPTH:-110}" --batch-size "${BATCH:-128}"
    done
}

stage_tests() {
    step tests python -m pytest -m gpu -q -rfEs -p no:cacheprovider -p no:benchmark -n "${JOBS:-8}" --timeout 280 \
        --junitxml="$OUT/tests.xml" tests/train tests/compact tests/deploy/{bench,pipeline} \
        tests/deploy/cli/test_doctor.py
}

stage_chain() { # digits to bundles; a folder with ckpt.pt and baseline.pt in CHECKPOINTS spares the training
    local precision folder=$work/chain
    rm -rf "$folder" && mkdir -p "$folder"
    if [ -n "${CHECKPOINTS:-}" ]; then
        cp "$CHECKPOINTS"/{ckpt,baseline}.pt "$folder"
    else
        (cd "$folder" && step train eps-train --with-baseline --device "$DEVICE")
    fi
    (cd "$folder" && step compact eps-compact ckpt.pt)
    for precision in fp32 fp16 tf32 int8; do
        [ "$PROVIDER$precision" = cputf32 ] && continue
        (cd "$folder" && step "deploy-$precision" eps-deploy --engine ort "--$precision" --provider "$PROVIDER" -o "$precision" &&
            cp "$precision/report.json" "$OUT/report-$precision.json")
    done
    (cd "$folder" && step bench-files eps-bench fp32/baseline.onnx fp32/model.onnx --provider "$PROVIDER" --json)
}

stage_cifar() {
    local folder=$work/cifar
    rm -rf "$folder" && mkdir -p "$folder"
    # shellcheck disable=SC2086
    step cifar eps-train --recipe cifar10-110 --data-root "$DATA_ROOT" --output "$folder" --device "$DEVICE" --with-baseline \
        --precision "${PRECISION:-bf16}" --batch-size "${BATCH:-512}" --epochs "$EPOCHS" ${CIFAR:-}
    cp "$folder"/*metrics.jsonl "$folder"/*training.png "$OUT" 2>/dev/null
    (cd "$folder" && step cifar-compact eps-compact ckpt.pt --data-root "$DATA_ROOT" &&
        step cifar-deploy eps-deploy --engine ort --fp16 --provider "$PROVIDER" --data-root "$DATA_ROOT" &&
        cp bundle/report.json "$OUT/report-cifar.json")
}

for stage in "$@"; do "stage_$stage"; done
