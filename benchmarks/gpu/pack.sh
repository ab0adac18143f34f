#!/usr/bin/env bash
# Fill .kit/ with what a GPU machine without network lacks; see README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kit=$PWD/.kit
work=${WORK:-$(mktemp -d)}
cuda=${CUDA_HOME:-/usr/local/cuda}
arch=${ARCH:-90}
"${PYTHON:-python3.12}" -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
pip install -q setuptools wheel 'numpy>=2' zstandard lz4
rm -rf "$kit" && mkdir -p "$kit/site"

# Pure Python and cp312 wheels. torch, numpy, click and rich are on the machine.
pip download -q --no-deps --only-binary=:all: -d "$kit/site" \
    pytools siphash24 platformdirs mako hatchling trove-classifiers tomlkit \
    msgspec starlette uvicorn==0.54.0 httptools open-inference-grpc prometheus-client pytest-timeout pytest-xdist \
    jsonschema jsonschema-specifications referencing rpds-py

# pycuda is compiled without a driver: a stub library has the names of the driver's functions.
mkdir -p "$work/stub"
grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$cuda"/include/{cuda,cudaProfiler}.h | sort -u \
    | awk '{print "int " $1 "(void) {return 100;}"}' > "$work/stub/stub.c"
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$work/stub/libcuda.so" "$work/stub/stub.c"
pip download -q --no-deps --no-binary=:all: --no-build-isolation -d "$work" pycuda==2026.1
tar -xzf "$work"/pycuda-2026.1.tar.gz -C "$work"
cat > "$work/pycuda-2026.1/siteconf.py" <<CONF
BOOST_INC_DIR = []; BOOST_LIB_DIR = []; BOOST_COMPILER = "gcc43"; USE_SHIPPED_BOOST = True
BOOST_PYTHON_LIBNAME = []; BOOST_THREAD_LIBNAME = []
CUDA_TRACE = False; CUDA_ROOT = "$cuda"; CUDA_ENABLE_GL = False; CUDA_ENABLE_CURAND = False
CUDADRV_LIB_DIR = ["$work/stub"]; CUDADRV_LIBNAME = ["cuda"]
CUDART_LIB_DIR = ["$cuda/lib64"]; CUDART_LIBNAME = ["cudart"]
CURAND_LIB_DIR = []; CURAND_LIBNAME = []; CXXFLAGS = ["-w", "-O1"]; LDFLAGS = []
CONF
(cd "$work/pycuda-2026.1" && pip wheel -q --no-deps --no-build-isolation -w "$kit/site" .)

pip download -q --no-deps --only-binary=:all: -d "$work" onnxruntime-gpu==1.31.1
python "$here/slim.py" "$work"/onnxruntime_gpu-1.31.1-cp312*.whl "$kit/onnxruntime-gpu.tar.xz" --arch "$arch"
du -sh "$kit"/*
