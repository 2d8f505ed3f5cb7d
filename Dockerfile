# docker build -t scorelm .                                    for CPUs
# docker build -t scorelm:cuda --build-arg TORCH=cu130 .       for NVIDIA GPUs
# docker run --rm -v "$PWD:/work" scorelm train --data my.txt --out runs/mine
FROM python:3.13-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
ARG TORCH=cpu
# Kernels for GPUs are compiled when they are first used.
RUN if [ "$TORCH" != cpu ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    pip install --no-cache-dir --constraint /constraints.txt \
        --extra-index-url "https://download.pytorch.org/whl/${TORCH}" \
        "$(echo /wheels/*.whl)[viz,serve]"
RUN useradd --create-home --uid 1000 scorelm
USER scorelm
WORKDIR /work
ENTRYPOINT ["scorelm"]
CMD ["--help"]
