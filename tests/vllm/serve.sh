#!/usr/bin/env bash
# Becomes one vLLM server of the tiny model, called `tiny`, on 127.0.0.1:
#
#     tests/vllm/serve.sh ROLE PORT [CONNECTOR SIDE_PORT [DIRECTORY]]
#
# ROLE: aggregated, prefill, decode. CONNECTOR: pull, push (NIXL; SIDE_PORT is where its peers meet it), shared (files in
# DIRECTORY). KV_LOAD_FAILURE=recompute: a decode server that cannot get the KV cache computes the prompt, in place of an error.
# KV_LEASE_S: for how many seconds a prefill server keeps a KV cache, 300 by default.
# TOOL_PARSER: the form of tool calls, hermes by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
role=$1 port=$2 connector=${3:-} side_port=${4:-} shared=${5:-}
installed=$PWD/.cache/vllm-$(<tests/vllm/version)

arguments=()
policy='"kv_load_failure_policy":"'${KV_LOAD_FAILURE:-fail}'"'
case $role in
    aggregated) ;;
    prefill) nixl_role=kv_producer ;;
    decode) nixl_role=kv_consumer ;;
    *) echo "serve.sh: no such role: $role" >&2; exit 2 ;;
esac
# On a busy machine NIXL's first meeting of two servers takes longer than the lease of 30 s that prefill gives its blocks.
nixl() {
    echo '{"kv_connector_extra_config":{"kv_lease_duration":'"${KV_LEASE_S:-300}"'},"kv_connector":"'"$1"'","kv_role":"'$nixl_role'","kv_buffer_device":"cpu",'"$policy"'}'
}
case $connector in
    '') ;;
    pull) arguments+=(--kv-transfer-config "$(nixl NixlConnector)") ;;
    push) arguments+=(--kv-transfer-config "$(nixl NixlPushConnector)") ;;
    shared)
        # It keeps the first part only of a prompt that is computed in parts, and ends a server that then wants all of it.
        arguments+=(--no-enable-chunked-prefill --max-num-batched-tokens 4096)
        arguments+=(--kv-transfer-config '{"kv_connector":"ExampleConnector","kv_role":"kv_both",
            "kv_connector_extra_config":{"shared_storage_path":"'"$shared"'"},'"$policy"'}') ;;
    *) echo "serve.sh: no such connector: $connector" >&2; exit 2 ;;
esac

arguments+=(--enable-auto-tool-choice --tool-call-parser "${TOOL_PARSER:-hermes}")

export VLLM_TARGET_DEVICE=cpu VLLM_HOST_IP=127.0.0.1
export VLLM_NIXL_SIDE_CHANNEL_HOST=127.0.0.1 VLLM_NIXL_SIDE_CHANNEL_PORT=$side_port
export UCX_TLS=tcp,self,sm UCX_NET_DEVICES=lo
# Small, and fair to its neighbours: one thread, bound to no core, and a GB of KV cache.
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Nothing is kept outside of .cache.
export XDG_CACHE_HOME=$installed/cache XDG_CONFIG_HOME=$installed/cache VLLM_CACHE_ROOT=$installed/cache HF_HOME=$installed/cache
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# See install.sh.
export DIE_WITH_PARENT=1
[ -n "$side_port" ] || unset VLLM_NIXL_SIDE_CHANNEL_PORT

# CPU attention wants blocks of a multiple of 32 tokens. The ids of requests are taken from x-request-id, as push needs.
exec "$installed/venv/bin/python" "$installed/venv/bin/vllm" serve "$installed/model" --served-model-name tiny \
    --host 127.0.0.1 --port "$port" --dtype float32 --max-model-len 4096 --max-num-seqs 8 --block-size 32 \
    --num-gpu-blocks-override 512 --enforce-eager --enable-prefix-caching --enable-prompt-tokens-details \
    --enable-request-id-headers "${arguments[@]}"
