# make wheel
# docker build -t sglang-nsa-fused .
# docker run --gpus all -e SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA=1 sglang-nsa-fused python3 -m sglang.launch_server ...
FROM lmsysorg/sglang:v0.5.23
COPY dist/*.whl /tmp/wheel/
RUN pip install --no-cache-dir /tmp/wheel/*.whl && rm -r /tmp/wheel && sglang-nsa-fused --version
