# Runs and times artifacts; no torch: docker build -f docker/edge.Dockerfile -t deployopt:edge .
#   docker run -v "$PWD/runs:/workspace/runs" deployopt:edge bench runs/RUN/04-build-qat-onnxruntime-int8/model.onnx
FROM python:3.12-slim-bookworm

RUN useradd --create-home --uid 1000 deployopt
COPY pyproject.toml constraints.txt README.md LICENSE /opt/deployopt/
COPY deployopt /opt/deployopt/deployopt
RUN pip install --no-cache-dir -c /opt/deployopt/constraints.txt '/opt/deployopt[runtimes]'

USER 1000
WORKDIR /workspace
ENTRYPOINT ["deployopt"]
CMD ["doctor"]
