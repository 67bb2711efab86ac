#!/usr/bin/env bash
# Tests and measures on a machine with GPUs, from a bundle that `cargo xtask gpu-bundle` made; no Rust is needed there.
#
#   gpu_run.sh [prepare] [correct] [python] [sanitizer] [kill] [hang] [bench] [tune] [kernels] [experts]
#
# Without arguments prepare, correct, kill, hang, bench and sanitizer, within LIMIT_S seconds (480). Results go to $OUT, or to ./out, with
# all that was said in logs.tgz, and the ends of it to the terminal. The last table has the exit code of every step; the script fails if
# one is not 0.
# Kernels that an earlier run had to compile spare this one a minute or two: put its $OUT/kernels.tar.xz beside this script.
# UNISONO_TEST_SCALE makes random tests and kills longer. NCCL is measured without NVLink's multicast, unless NCCL_NVLS_ENABLE
# says otherwise.
set -u

out=${OUT:-$PWD/out}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
logs=$(mktemp -d)
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(prepare correct kill hang bench sanitizer)
for part in "${parts[@]}"; do
    case $part in
        prepare | correct | python | sanitizer | kill | hang | bench | tune | kernels | experts) ;;
        *)
            echo "expected prepare, correct, python, sanitizer, kill, hang, bench, tune, kernels or experts, got: $part" >&2
            exit 2
            ;;
    esac
done

end=$((SECONDS + ${LIMIT_S:-480}))
table=$(mktemp)

note() { # NAME CODE SECONDS
    printf '%-72s %5s %6s\n' "$@" >>"$table"
}

# step NAME SECONDS COMMAND…: runs it for so long at most, and no longer than is left.
step() {
    local name=$1 limit=$2 left=$((end - SECONDS)) start=$SECONDS code
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "== $name: no time left"
        note "$name" 124 0
        return
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    timeout -k 10 "$limit" "$@" >"$logs/$name.txt" 2>&1
    code=$?
    # In one piece: others may run beside.
    printf '%s\n' "== $name: $*" "$(tail -n "${TAIL:-15}" "$logs/$name.txt")"
    note "$name" "$code" $((SECONDS - start))
}

# The same beside others, AT_ONCE of them at the same time; `wait` waits for all.
step_beside() {
    while [ "$(jobs -pr | wc -l)" -ge "${AT_ONCE:-3}" ]; do wait -n; done
    step "$@" &
}

tests() { # PROGRAM [FILTER]: the names of its tests
    "./$1" --list --format terse ${2:+"$2"} 2>/dev/null | sed -n 's/: test$//p'
}

# A process for each module of tests, and for each test that is in none, several at once: most of their time is the host's.
run_modules() { # PROGRAM PREFIX SECONDS [FILTER]
    local every all name other others
    every=$(tests "$1" | sed 's/::.*/::/' | sort -u)
    all=$(tests "$1" "${4:-}" | sed 's/::.*/::/' | sort -u)
    # Expert parallelism has a part of its own.
    [ "$2" = experts ] || all=$(grep -v '^expert_\|^low_latency' <<<"$all")
    if [ -z "$all" ]; then
        echo "== $2: no test of ./$1 is called so${4:+: $4}"
        note "$2" 1 0
        return
    fi
    for name in $all; do
        # Names of modules that end alike.
        others=()
        for other in $every; do
            [[ $other == "$name" || $other != *"$name"* ]] || others+=(--skip "$other")
        done
        TAIL=30 step_beside "$2-${name//:/}" "$3" "./$1" "$name" --test-threads 1 --nocapture "${others[@]}"
    done
}

# Python knows where its own packages are, wherever that is.
from_python() { # VARIABLE LIBRARY MODULE…: names the folder of LIBRARY, unless it is named
    local variable=$1 library=$2 module folder
    shift 2
    [ -z "${!variable:-}" ] || return 0
    for module in "$@"; do
        folder=$(python3 -c "
import importlib
print(list(importlib.import_module('$module').__path__)[0] + '/lib')" 2>/dev/null) || continue
        if compgen -G "$folder/$library*" >/dev/null; then
            export "$variable=$folder"
            echo "$variable=$folder"
            return
        fi
    done
}

from_python UNISONO_NCCL libnccl.so.2 nvidia.nccl
from_python UNISONO_NVRTC libnvrtc.so nvidia.cu13 nvidia.cuda_nvrtc

nvidia-smi -L | tee "$logs/devices.txt"
count=$(grep -c '^GPU ' "$logs/devices.txt")
if [ "$count" -eq 0 ]; then
    echo "there is no GPU here" >&2
    exit 1
fi
nvidia-smi topo -m >"$logs/topology.txt" 2>&1

# What is compiled here stays beside the script, for its next run.
export UNISONO_CACHE_DIR=${UNISONO_CACHE_DIR:-$PWD/kernel-cache}
mkdir -p "$UNISONO_CACHE_DIR"
[ ! -f kernels.tar.xz ] || tar -C "$UNISONO_CACHE_DIR" -xJf kernels.tar.xz
kernels_before=$(find "$UNISONO_CACHE_DIR" -type f | wc -l)

# Kernels that tests and benchmarks need, on all processors at once; otherwise each would compile its own when it comes to them.
part_prepare() {
    step prepare 120 ./unisono kernels build --quiet --all --ranks 3
    step prepare-worlds 120 ./unisono kernels build --quiet --ranks "1,2,5,8,$count"
    step prepare-host 120 ./unisono kernels build --quiet --ranks "2,$count" --link host
}

part_correct() {
    run_modules gpu correct 150
    run_modules faults_processes faults 90 pinned::
    run_modules faults_processes faults 120 gpu_registration
    run_modules faults_processes faults 120 gpu_one_sided
    step_beside device-header-threads 60 ./device_header "$((count < 2 ? 2 : count))" 10000
    step_beside device-header-processes 60 ./unisono run -n "$((count < 2 ? 2 : count))" -- ./device_header - "$((count < 2 ? 50 : 10000))"
    run_modules faults_processes faults 240 gpu_matrix
    run_modules faults_processes faults 120 gpu_seats
    TAIL=40 step_beside library 90 ./library gpu:: --test-threads 1
    wait
}

# Tensors of torch on all GPUs, and what a call of Python costs the host.
part_python() {
    if ! python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        echo "== python: there is no torch with CUDA here"
        note "python: skipped" 0 0
        return
    fi
    export PYTHONPATH=$PWD/python
    step python 150 python3 -m unisono run -n "$((count < 2 ? 2 : count))" -- python3 python/gpu.py
    if [ ! -d python/unisono/kernels ]; then
        step python-pack 120 ./unisono kernels build --quiet --ranks 2,4,8 --pack python/unisono/kernels
    fi
    if [ -d python/unisono/kernels ]; then
        step python-prebuilt 90 python3 -m unisono run -n "$((count < 4 ? 2 : count < 8 ? 4 : 8))" -- python3 python/prebuilt.py
    fi
    if python3 -c 'import triton' 2>/dev/null && [ "$count" -ge 2 ]; then
        step python-triton 120 python3 -m unisono run -n "$count" -- python3 python/triton_symmetric.py
    fi
    step python-call-cost 90 python3 python/python_call_cost.py --device cuda
    local kind backend ranks=$((count < 2 ? 2 : count))
    step torch-collectives 200 python3 -m unisono run -n "$ranks" -- python3 python/torch_collectives.py cuda
    for kind in all_reduce async training; do
        step "torch-death-$kind" 60 bash -c "python3 -m unisono run -n $ranks --grace 20 -- \
            python3 python/torch_death.py $kind '$logs/died' cuda | tee /dev/stderr | grep -c 'knew after 0' | grep -qx $((ranks - 1))"
    done
    TAIL=40 step torch-gpu 240 python3 -m torch.distributed.run --nproc-per-node "$ranks" python/torch_gpu.py --json "$out/torch-backend.json"
    for backend in unisono nccl; do
        step "train-ddp-$backend" 90 python3 -m torch.distributed.run --nproc-per-node "$ranks" \
            python/train_ddp.py --device cuda --steps 200 --backend "$backend"
    done
    step torch-call-cost 60 python3 python/torch_call_cost.py --device cuda
}

part_kernels() {
    UNISONO_TEST_REQUIRE_NVRTC=1 run_modules kernels kernels 300
    wait
}

# Alone: how soon others know is measured.
part_kill() {
    AT_ONCE=1 run_modules faults_processes kill 200 gpu_kill
    wait
}

# A call that hangs, told of from outside as `unisono why` does.
part_hang() {
    AT_ONCE=1 run_modules faults_processes hang 120 gpu_hang
    wait
}

operations="all_reduce broadcast all_gather reduce reduce_scatter gather scatter all_to_all send_recv barrier"

# Ranks of one process would wait for each other: the sanitizer runs one kernel of a process at a time.
part_sanitizer() {
    local tool
    if ! command -v compute-sanitizer >/dev/null; then
        echo "== sanitizer: there is no compute-sanitizer here"
        note "sanitizer: skipped" 0 0
        return
    fi
    for tool in memcheck synccheck initcheck; do
        step_beside "sanitizer-$tool" 150 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 99 \
            ./unisono bench $operations --device cuda -n "$((count < 2 ? 2 : count))" --sizes 8,96KiB,1MiB,6MiB --time 10ms
    done
    wait
}

bench() { # NAME RANKS OPERATION…
    local name=$1 ranks=$2
    shift 2
    TAIL=80 step "$name" 240 ./unisono bench "$@" --device cuda --against nccl -n "$ranks" "--json=$out/$name.json"
}

part_bench() {
    local ranks
    bench bench "$count" $operations
    for ranks in 2 4; do
        [ "$ranks" -ge "$count" ] || bench "bench-$ranks" "$ranks" all_reduce broadcast all_gather
    done
    TAIL=40 step rows 60 ./unisono bench all_reduce_rms_norm --device cuda -n "$count" "--json=$out/rows.json"
    if python3 -c 'import torch' 2>/dev/null; then
        TAIL=50 step torch-symmetric 90 python3 torch_symmetric.py --ranks "$count" --json "$out/torch-symmetric.json"
    fi
    UNISONO_ORDER=rank TAIL=20 step rank-order 60 ./unisono bench all_reduce --device cuda -n "$count" --sizes 256MiB,1GiB \
        "--json=$out/rank-order.json"
    step call-cost 60 ./gpu_call_cost
    step first-call-cold 90 env "UNISONO_CACHE_DIR=$logs/cold-kernels" ./gpu_call_cost
    rm -rf "$logs/cold-kernels"
}

# The table of forms and grids of these GPUs, and whether jobs take it.
part_tune() {
    TAIL=120 step tune 360 ./unisono tune "$out/gpus.tune" --device cuda "--json=$out/tune.json"
    TAIL=40 step tuned 60 env "UNISONO_TUNE_FILE=$out/gpus.tune" ./unisono bench $operations --device cuda -n "$count" \
        --sizes 8KiB,256KiB,1MiB,8MiB,64MiB --time 50ms
}

# Tests, kills and figures of expert parallelism.
part_experts() {
    local place
    place=$(mktemp -d)
    run_modules gpu experts 200 expert_
    run_modules gpu experts 200 low_latency
    wait
    AT_ONCE=1 run_modules faults_processes experts 150 gpu_experts
    wait
    bench_moe 12 12
    bench_moe 16 16
    TAIL=40 step moe-low-latency 120 ./unisono bench moe --device cuda -n "$((count < 2 ? 2 : count))" --tokens 1,8,128 --hidden 7168 \
        --top-k 8 --experts 288 --time 200ms "--json=$out/moe-low-latency.json"
    PYTHONPATH=$PWD/python step python-deep-ep 150 python3 -m unisono run -n "$((count < 2 ? 2 : count))" -- \
        python3 python/deep_ep.py "$place/meet" cuda
    PYTHONPATH=$PWD/python step python-deep-ep-mask 90 python3 -m unisono run -n 4 -- python3 python/deep_ep_mask.py "$place/mask" cuda
    PYTHONPATH=$PWD/python step moe-training 90 python3 -m unisono run -n "$((count < 2 ? 2 : count))" -- python3 python/moe_training.py cuda
    rm -rf "$place"
}

bench_moe() { # NAME MULTIPROCESSORS
    local tokens=128,4096
    [ "$count" -ge 2 ] || tokens=128,1024
    TAIL=40 step "moe-$1" 150 ./unisono bench moe --device cuda -n "$((count < 2 ? 2 : count))" --tokens "$tokens" --hidden 7168 --top-k 8 \
        --experts 256 --multiprocessors "$2" --time 200ms "--json=$out/moe-$1.json"
}

for part in "${parts[@]}"; do
    "part_$part"
done

printf '\n%-72s %5s %6s\n' step exit s
cat "$table"
if [ "$(find "$UNISONO_CACHE_DIR" -type f | wc -l)" -gt "$kernels_before" ]; then
    tar -C "$UNISONO_CACHE_DIR" -cf - . | xz -T0 -6 >"$out/kernels.tar.xz"
fi
tar -C "$logs" -czf "$out/logs.tgz" .
failed=$(awk '$(NF - 1) != 0' "$table" | wc -l)
echo "$(wc -l <"$table") steps, $failed failed, $SECONDS s"
[ "$failed" -eq 0 ]
