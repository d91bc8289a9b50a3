# An image that trains: docker build -t hola --build-arg EXTRA=tpu .   (or cuda; without, the CPU)
# The accelerator's driver stays on the host; everything else comes from Python packages.
ARG PYTHON=3.13
FROM python:${PYTHON}-slim

ARG EXTRA=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /hola
COPY . .
RUN pip install -c constraints.txt ".[prepare,mistral${EXTRA:+,${EXTRA}}]"

# The process itself gets SIGTERM, saves and exits with 75: no shell stands between.
ENTRYPOINT ["hola"]
CMD ["--help"]
