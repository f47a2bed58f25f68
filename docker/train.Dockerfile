# The whole chain on an NVIDIA GPU: docker build -f docker/train.Dockerfile -t deployopt:train .
#   docker run --gpus all -v "$PWD:/workspace" deployopt:train run recipes/resnet18_int8.yaml
FROM python:3.12-slim-bookworm

# The CUDA libraries come with torch's wheels; only the driver comes from the host.
RUN useradd --create-home --uid 1000 deployopt
COPY pyproject.toml constraints.txt README.md LICENSE /opt/deployopt/
COPY deployopt /opt/deployopt/deployopt
RUN pip install --no-cache-dir -c /opt/deployopt/constraints.txt '/opt/deployopt[all,tensorrt,tensorrt-rtx]'

USER 1000
WORKDIR /workspace
ENTRYPOINT ["deployopt"]
CMD ["--help"]
