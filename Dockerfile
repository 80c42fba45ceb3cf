FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY config config
COPY handlers handlers
COPY pipeline pipeline
RUN python -m venv /opt/pipeline \
    && /opt/pipeline/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt .

FROM python:3.12-slim
COPY --from=build /opt/pipeline /opt/pipeline
# a named volume takes over the owner of the folder that it is mounted on
RUN useradd --system --uid 10001 --home-dir /var/lib/pipeline pipeline \
    && install -d -o pipeline -g pipeline /var/lib/pipeline /var/lib/pipeline/artifacts /app
ENV PATH=/opt/pipeline/bin:$PATH PYTHONUNBUFFERED=1 PIPELINE_HOME=/var/lib/pipeline
# definitions and modules of handlers are found here
WORKDIR /app
USER pipeline
ENTRYPOINT ["pipeline"]
CMD ["worker"]
