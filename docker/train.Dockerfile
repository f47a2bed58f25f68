# The whole chain on an NVIDIA GPU: docker build -f docker/train.Dockerfile -t deployopt:train .
#   docker run --gpus all -v "$PWD:/workspace" -e XDG_CACHE_HOME=/workspace/.cache deployopt:train run recipes/resnet18_int8.yaml
# It runs as user 1000, who must be allowed to write there: runs/ and the cache of finished steps are kept in that folder.
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
