# An engine with kvmarket on vLLM's own image, for GPUs. It is parsed and linted by the tests, and has
# never been built or run: there was neither Docker nor a GPU.
#   docker build --tag kvmarket .
#   docker run --gpus all --publish 127.0.0.1:8000:8000 --volume market:/var/lib/kvmarket kvmarket MODEL
ARG VLLM=vllm/vllm-openai:v0.32.0
FROM ${VLLM}

# A fixed number, so that a volume belongs to the same user after an update.
RUN useradd --system --uid 10001 --create-home market \
    && install --directory --owner market --mode 0700 /var/lib/kvmarket

COPY pyproject.toml README.md LICENSE /build/
COPY vllm_kvmarket /build/vllm_kvmarket
RUN python3 -m pip install --no-cache-dir "/build[postgres]" && rm -r /build

USER 10001
ENV KVMARKET_HOME=/var/lib/kvmarket
VOLUME /var/lib/kvmarket
EXPOSE 8000
HEALTHCHECK --start-period=600s --interval=15s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["vllm", "serve"]
