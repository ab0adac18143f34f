# Images that serve a bundle, one target for each engine:
#   cpu   ONNX Runtime on the processor
#   cuda  ONNX Runtime on an NVIDIA GPU
#   trt   TensorRT; pycuda is compiled in a stage of its own
#
#   docker build --target cpu -t eps-resnet:cpu .
#   docker run --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 -v ./bundle:/models:ro eps-resnet:cpu
#
# A bundle of the build context can be baked in: --build-arg BUNDLE=bundle
# What a GPU needs beside its driver comes from Python packages, so that one base serves all targets.
# Another base needs Python 3.11 or later and its venv module; give it for each target that is built:
#   --build-arg BASE_IMAGE=...
ARG BASE_IMAGE=python:3.11-slim-bookworm


# pip stands apart from what it installs: no image has it.
FROM ${BASE_IMAGE} AS tools
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_CACHE_DIR=/var/cache/pip \
    PIP_CONSTRAINT=/build/deploy/image/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/eps
COPY deploy/image/constraints.txt deploy/image/
COPY pyproject.toml ./
# The extras' packages without our own, so that a change of our code installs none of them again.
RUN python3 -c "import tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = {'cpu': ['ort'], 'cuda': ['ort-gpu'], 'trt': ['ort', 'trt']}; \
[open(target + '.txt', 'w').write('\n'.join(project['dependencies'] + \
[line for extra in names + ['serve'] for line in project['optional-dependencies'][extra]])) \
for target, names in extras.items()]"


FROM tools AS wheel
RUN --mount=type=cache,target=/var/cache/pip \
    /opt/pip/bin/pip install hatchling
COPY LICENSE README.md ./
COPY core core
COPY train train
COPY compact compact
COPY deploy/eps_deploy deploy/eps_deploy
RUN /opt/pip/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .


FROM tools AS cpu-packages
RUN --mount=type=cache,target=/var/cache/pip \
    /opt/pip/bin/pip --python /opt/eps/bin/python install -r cpu.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/pip/bin/pip --python /opt/eps/bin/python install --no-deps /wheels/*.whl \
    && /opt/pip/bin/pip --python /opt/eps/bin/python check


# CUDA and cuDNN come with the package's own extras; ONNX Runtime finds them beside itself.
FROM tools AS cuda-packages
RUN --mount=type=cache,target=/var/cache/pip \
    /opt/pip/bin/pip --python /opt/eps/bin/python install -r cuda.txt 'onnxruntime-gpu[cuda,cudnn]'
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/pip/bin/pip --python /opt/eps/bin/python install --no-deps /wheels/*.whl \
    && /opt/pip/bin/pip --python /opt/eps/bin/python check


# pycuda has no wheels. It is compiled against NVIDIA's headers and an empty stand-in for the driver's
# library, which the container runtime brings; its random numbers, which would need curand, are not
# used here.
FROM tools AS pycuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=cache,target=/var/cache/pip \
    /opt/pip/bin/pip install numpy setuptools wheel \
    && /opt/pip/bin/pip install --target /cuda nvidia-cuda-profiler-api nvidia-cuda-runtime
WORKDIR /cuda/driver
RUN gcc -shared -x c /dev/null -Wl,-soname,libcuda.so.1 -o libcuda.so \
    && printf '%s\n' 'CUDA_INC_DIR = ["/cuda/nvidia/cu13/include"]' \
    'CUDADRV_LIB_DIR = ["/cuda/driver"]' 'CUDA_ENABLE_CURAND = False' > ~/.aksetup-defaults.py \
    && LDFLAGS=-Wl,--no-as-needed /opt/pip/bin/pip wheel --no-deps --no-build-isolation \
    --no-binary pycuda --wheel-dir /wheels pycuda


FROM tools AS trt-packages
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=bind,from=pycuda,source=/wheels,target=/wheels \
    /opt/pip/bin/pip --python /opt/eps/bin/python install --find-links /wheels -r trt.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/pip/bin/pip --python /opt/eps/bin/python install --no-deps /wheels/*.whl \
    && /opt/pip/bin/pip --python /opt/eps/bin/python check


# What every image has around its packages.
FROM ${BASE_IMAGE} AS serving
RUN useradd --uid 10001 --no-log-init --no-create-home --shell /usr/sbin/nologin eps
# ONNX Runtime reports its use to its makers unless it is told not to.
ENV PATH=/opt/eps/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# By number: Kubernetes can tell then that it is not root.
USER 10001:10001
WORKDIR /
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-m", "eps_deploy.serving.healthcheck"]
ENTRYPOINT ["eps-serve", "--host", "0.0.0.0"]
CMD ["/models"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="eps-resnet" \
      org.opencontainers.image.description="Serves a network that eps-deploy made, by the Open Inference Protocol." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


# The container runtime of NVIDIA reads these, and brings the driver.
FROM serving AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-packages /opt/eps /opt/eps
ARG BUNDLE=deploy/image/models
COPY ${BUNDLE} /models
# Without a GPU that ONNX Runtime can use, it refuses; `--provider cpu` after the bundle overrides.
ENTRYPOINT ["eps-serve", "--host", "0.0.0.0", "--provider", "cuda"]
CMD ["/models"]


# A plan that is still to be built is built at the first start, and kept in /cache: mount a volume.
FROM serving AS trt
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=trt-packages /opt/eps /opt/eps
COPY --chown=10001:10001 deploy/image/cache /cache
ARG BUNDLE=deploy/image/models
COPY ${BUNDLE} /models
# The first start may build a plan, which takes from seconds to many minutes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-I", "-m", "eps_deploy.serving.healthcheck"]
CMD ["/models", "--engine-cache", "/cache"]


# Last, so that it is what is built without --target.
FROM serving AS cpu
COPY --from=cpu-packages /opt/eps /opt/eps
ARG BUNDLE=deploy/image/models
COPY ${BUNDLE} /models
