#!/usr/bin/env bash
# All that is checked on a machine with a GPU, in 8 minutes at most: one folder with `report.json`. It needs Python, and for what
# is compared with PyTorch a PyTorch; no Rust, no network.
#
#     ./check.sh [--tiny] [--binaries FOLDER] [--deadline SECONDS] [--stage-seconds SECONDS] [--only "STAGE .."] [OUT]
#
# --binaries: where `gpu_check`, `conformance` and `cubins` are; this script's folder, unless it says so
# --tiny:     sizes for a software device; PyTorch then runs on the CPU
# --deadline: how long all of it may take; --stage-seconds: the most that a stage may
# --only:     these stages and no others
# OUT:        where results go, ./results by default; it is emptied
# PYTHON:     the Python to use, python3 by default
#
# Exit code: 0 when each stage passed or says why it was skipped, 1 when one did not, or was not run for lack of time where
# it is required, 2 for bad arguments.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
binaries=$here tiny="" only="" seconds_max=470 stage_max=470 out=results
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=1 && shift ;;
        --binaries | --deadline | --stage-seconds | --only)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            case $1 in
                --binaries) binaries=$2 ;;
                --deadline) seconds_max=$2 ;;
                --stage-seconds) stage_max=$2 ;;
                --only) only=" $2 " ;;
            esac
            shift 2
            ;;
        -*) echo "error: unknown flag $1; see the head of $0" >&2; exit 2 ;;
        *) out=$1 && shift ;;
    esac
done
for given in "--deadline $seconds_max" "--stage-seconds $stage_max"; do
    [[ ${given#* } =~ ^[1-9][0-9]{0,5}$ ]] || { echo "error: ${given%% *} takes seconds, not '${given#* }'" >&2; exit 2; }
done
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "error: no $python; name one by PYTHON=.." >&2; exit 2; }
for needed in gpu_check conformance; do
    [ -x "$binaries/$needed" ] || { echo "error: no program $binaries/$needed; pack.sh makes it" >&2; exit 2; }
done
# Results of an earlier run would pass for this one's; nothing else is removed.
if [ -d "$out" ]; then
    [ -f "$out/stages" ] || [ -z "$(ls -A "$out")" ] || { echo "error: $out holds other things" >&2; exit 2; }
    rm -rf "$out"
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
: >"$out/stages"
scratch=$(mktemp -d) || exit 2

# The report is written whatever happens. What runs is ended first.
finish() {
    trap - EXIT INT TERM HUP
    local running
    mapfile -t running < <(jobs -p)
    [ "${#running[@]}" = 0 ] || { kill "${running[@]}" && wait "${running[@]}"; } 2>/dev/null
    rm -rf "$scratch"
    printf 'seconds=%s\n' "$SECONDS" >>"$out/info"
    "$python" "$here/report.py" "$out"
    local code=$?
    echo "report: $out/report.json"
    exit "$code"
}
trap finish EXIT
trap 'exit 1' INT TERM HUP

# The driver, where the linker does not know it, and the libraries of Python's packages, behind what the user has named.
libraries() {
    # A driver that does not answer must not keep the script from its report.
    timeout 20 "$python" - "$scratch/lib" <<'PYTHON'
import ctypes, glob, os, sys

folders = [folder for root in sys.path for folder in sorted(glob.glob(os.path.join(root, "nvidia", "*", "lib")))]
# Our programs ask for these without a version first, and a toolkit on the machine would give its own, not the packages'.
links = sys.argv[1]
os.mkdir(links)
for name in ("libcublasLt.so", "libnvrtc.so"):
    found = [path for folder in folders for path in glob.glob(os.path.join(folder, name + ".[0-9]*"))]
    if found:
        newest = max(found, key=lambda path: [int(part) for part in path.rpartition(".so.")[2].split(".") if part.isdigit()])
        os.symlink(os.path.abspath(newest), os.path.join(links, name))
folders.insert(0, links)
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    known = ["/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib"]
    folders += [folder for folder in known if os.path.exists(os.path.join(folder, "libcuda.so.1"))][:1]
print(":".join(dict.fromkeys(folders)))
PYTHON
}
theirs=${LD_LIBRARY_PATH-}
found=$(libraries)
ours=$theirs${theirs:+${found:+:}}$found
# The software device stands under the names of libraries that PyTorch needs.
[ -z "$tiny" ] || theirs=""

# stage NAME SECONDS COMMAND..: its output, and how it ended. Whatever it does, the next one is begun.
stage() {
    local name=$1 limit=$2 wanted left=$((seconds_max - SECONDS)) begin=$SECONDS code
    shift 2
    [ -z "$only" ] || [[ $only == *" $name "* ]] || return 0
    echo "$name" >>"$out/stages"
    # Software on a machine that has other things to do is slow.
    [ -z "$tiny" ] || limit=$((limit * 4))
    [ "$limit" -le "$stage_max" ] || limit=$stage_max
    wanted=$limit
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 1 ]; then
        echo "not-run nothing is left of $seconds_max s" >"$out/$name.status"
        return
    fi
    echo "running $limit" >"$out/$name.status"
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.out" 2>"$out/$name.err" </dev/null &
    wait $!
    code=$?
    echo "ended $code $((SECONDS - begin)) $limit $wanted" >"$out/$name.status"
}

# skip NAME REASON
skip() {
    [ -z "$only" ] || [[ $only == *" $1 "* ]] || return 0
    echo "$1" >>"$out/stages"
    echo "skipped $2" >"$out/$1.status"
}

# gpu_stage NAME SECONDS COMMAND..: one that needs a GPU of ours.
gpu_stage() {
    [ -n "$gpu" ] || { skip "$1" "no GPU can be used: see the stage versions"; return; }
    # EAGER and 32 are what the launcher sets. Where no GPU waits for another one, loading all of NVIDIA's kernels would only
    # take time, in each of many processes.
    local loads=${loading-LAZY}
    stage "$1" "$2" env LD_LIBRARY_PATH="$ours" CUDA_MODULE_LOADING="${CUDA_MODULE_LOADING-$loads}" \
        CUDA_MODULE_DATA_LOADING="${CUDA_MODULE_DATA_LOADING-$loads}" \
        CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS-32}" "${@:3}"
}

# nccl_stage NAME SECONDS COMMAND..: one that needs two GPUs, for members of a group.
nccl_stage() {
    [ -z "$gpu" ] || [ "$gpus" -ge 2 ] || { skip "$1" "it needs two GPUs, and $gpus can be used"; return; }
    loading=EAGER gpu_stage "$@"
}

# train_stage NAME SECONDS ARGS..: GPT-2 trained by us, as users run it.
train_stage() {
    loading=EAGER gpu_stage "$1" "$2" "${train[@]}" "${@:3}"
}

# torch_stage NAME SECONDS LIKE SCRIPT ARGS..: PyTorch beside what our stage LIKE printed.
torch_stage() {
    local name=$1 limit=$2 like=$3 script=$4
    shift 4
    if [ -z "$gpu" ] || ! grep -q '^ended 0 ' "$out/$like.status" 2>/dev/null; then
        skip "$name" "there is nothing to compare with: see the stage $like"
        return
    fi
    stage "$name" "$limit" env LD_LIBRARY_PATH="$theirs" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" \
        "$python" "$here/$script" --like "$out/$like.out" "${torch_device[@]}" "$@"
}

# A part of the suite that CI runs on the software device goes by the name of its case.
suite=("$binaries/conformance" --ignored --exact child --nocapture)
conformance() {
    gpu_stage "conformance-$1" "$2" env SHARDFLOW_TEST_CASE="${3:-$1}" "${suite[@]}"
}

# sanitized TOOL: a small training under compute-sanitizer, where that works.
sanitized() {
    local path code
    path=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) ||
        { echo "compute-sanitizer is not on this machine" >&2; return 77; }
    # With our own attention there are fewer kernels that are not ours. That a library tries what the driver does not have, and
    # that an event is not there yet, is no error.
    SHARDFLOW_ATTENTION=own "$path" --tool "$1" --report-api-errors no --error-exitcode 9 "${@:2}"
    code=$?
    # It says so on its standard output, which the report shows too.
    [ "$code" = 0 ] || ! grep -qi 'device not supported' "$out/sanitizer-$1.out" ||
        { echo "compute-sanitizer does not support this device" >&2; return 77; }
    return "$code"
}
export -f sanitized
export out

{
    echo "commit=$(cat "$here/COMMIT" 2>/dev/null || echo unknown)"
    echo "sizes=${tiny:+tiny}"
    echo "libraries=$ours"
    echo "deadline_seconds=$seconds_max"
    query=("--query-gpu=name,driver_version,clocks.max.sm,power.limit" "--format=csv,noheader")
    echo "nvidia_smi=$(timeout 10 nvidia-smi "${query[@]}" 2>/dev/null | paste -sd ';')"
} >"$out/info"

small=(--layers 2 --heads 2 --width 32 --context 16 --vocabulary 97)
# As many samples as fit.
batch=(--batch 0) timed=(--timed 30) ceilings=() delays=() torch_device=() sizes=()
if [ -n "$tiny" ]; then
    batch=(--batch 4) timed=(--timed 5 --steps 3) torch_device=(--device cpu) sizes=("${small[@]}")
    ceilings=(--copy-bytes 65536 --matrix 48) delays=(--seeds 1 --cycles 3000 --size 16 --steps 2)
fi
check=$binaries/gpu_check
train=("$check" train "${sizes[@]}")

gpu=1
gpu_stage versions 90 "$check" versions
# It names devices even where a library is missing. A stage that was not asked for, or has not come to its end, says nothing.
! grep -Eqs '^ended [0-9] ' "$out/versions.status" || grep -q '"capability"' "$out/versions.out" || gpu=""
gpus=0
if [ -n "$gpu" ]; then
    told=$out/versions.out
    [ -f "$told" ] || { told=$scratch/versions && LD_LIBRARY_PATH=$ours timeout 30 "$check" versions >"$told" 2>/dev/null; }
    gpus=$(grep -o '"capability"' "$told" | wc -l)
fi
# From a disk that has not read it yet, PyTorch is long in coming.
if [ -n "$gpu" ] && [ -z "$tiny$only" ]; then
    timeout 120 "$python" -c 'import torch, torch._dynamo, triton' >/dev/null 2>&1 </dev/null &
fi
# What is required comes first, for time runs out at the end.
gpu_stage ceilings 40 "$check" ceilings "${ceilings[@]}"
conformance alone 90
conformance local 45
conformance staged 45
nccl_stage conformance-nccl 45 env SHARDFLOW_TEST_CASE=nccl "${suite[@]}"
conformance pairs 20 "pairs together"
train_stage gpt2-ours-1 60 "${batch[@]}" "${timed[@]}"
torch_stage gpt2-eager-1 90 gpt2-ours-1 gpt2_torch.py "${timed[@]}"
torch_stage gpt2-compile-1 120 gpt2-ours-1 gpt2_torch.py --compile "${timed[@]}"
f32=(--precision f32 --batch 4 --timed 0)
train_stage gpt2-f32-ours 45 "${f32[@]}"
torch_stage gpt2-f32-eager 45 gpt2-f32-ours gpt2_torch.py --timed 0
nccl_stage nccl-data 60 "${train[@]}" "${f32[@]}" --mesh data=2
nccl_stage nccl-stage 60 "${train[@]}" "${f32[@]}" --mesh stage=2 --micro-batches 2
gpu_stage compare 60 "$check" compare "${sizes[@]}" --batch 1
gpu_stage launches 75 "$check" launches "${sizes[@]}" "${batch[@]}"
attention=("$check" launches --op attention "${sizes[@]}" "${batch[@]}")
gpu_stage launches-own 30 env SHARDFLOW_ATTENTION=own "${attention[@]}"
gpu_stage launches-any-order 30 env SHARDFLOW_ATTENTION=cudnn-any-order "${attention[@]}"
torch_stage launches-torch 45 launches launches_torch.py
SHARDFLOW_ATTENTION=cudnn-any-order train_stage gpt2-any-order 45 "${batch[@]}" "${timed[@]}"
gpu_stage virtual-stage 75 "$check" virtual --mesh data=2,stage=2 "${delays[@]}"
gpu_stage virtual-tensor 75 "$check" virtual --mesh data=2,tensor=2 "${delays[@]}"
train_stage gpt2-ours-2 45 "${batch[@]}" "${timed[@]}"
torch_stage gpt2-compile-2 90 gpt2-ours-1 gpt2_torch.py --compile "${timed[@]}"
torch_stage gpt2-eager-2 45 gpt2-ours-1 gpt2_torch.py "${timed[@]}"
for tool in memcheck racecheck; do
    gpu_stage "sanitizer-$tool" 60 bash -c 'sanitized "$@"' sanitized "$tool" "$check" train "${small[@]}" --batch 2 --steps 2 --timed 0
done
