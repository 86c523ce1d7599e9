# Two images from one file: `control` (gateway and scheduler, no torch) and `worker` (a stage).
#
#   docker build --target control -t stagemesh-control .
#   docker build --target worker -t stagemesh-worker .
#   docker build --target worker -t stagemesh-worker:cuda \
#       --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130 .
#
# Plain Dockerfile syntax: it needs neither BuildKit nor a compiler, everything comes as wheels.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# What the control processes import. A layer of its own: sources change more often than pins.
FROM ${PYTHON_IMAGE} AS control-dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], sep='\n', file=open('control.txt', 'w')); \
print(*p['optional-dependencies']['worker'], sep='\n', file=open('worker.txt', 'w'))" \
    && pip install -c constraints.txt -r control.txt

# StageMesh itself, the same files for both images.
FROM control-dependencies AS package
COPY . .
RUN pip install --no-deps --target /app .

# What a running container has besides Python: a user without rights, and the command.
FROM ${PYTHON_IMAGE} AS runtime
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin stagemesh \
    && mkdir -p /srv/host/models
ENV PATH=/app/bin:/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1
USER 10001
WORKDIR /
STOPSIGNAL SIGTERM
ENTRYPOINT ["stagemesh"]

FROM runtime AS control
COPY --from=control-dependencies /opt/venv /opt/venv
COPY --from=package /app /app
# The scheduler's; a gateway's container sets 127.0.0.1:50051.
ENV HEALTH_ADDRESS=127.0.0.1:50050
EXPOSE 50050 50051 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["sh", "-c", "exec stagemesh health \"$HEALTH_ADDRESS\""]
CMD ["scheduler"]

# Of two builds of the same release the one with a local label (+cpu, +cu130) is the later version,
# so naming the index of a build is enough to get it. Empty: what the default index has.
FROM control-dependencies AS worker-dependencies
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
    -c constraints.txt -r worker.txt

FROM runtime AS worker
COPY --from=worker-dependencies /opt/venv /opt/venv
COPY --from=package /app /app
ENV HEALTH_ADDRESS=127.0.0.1:50052
EXPOSE 50052
# Loading a large span takes minutes; that is what the start period is for.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["sh", "-c", "exec stagemesh health \"$HEALTH_ADDRESS\""]
CMD ["worker"]
