#!/usr/bin/env bash
# Runs all checks for a machine with a GPU in at most 8 minutes, and writes one folder with `report.json`. The script
# needs Python. The comparisons with PyTorch need PyTorch. The script needs neither Rust nor a network.
#
#     ./check.sh [--tiny] [--binaries FOLDER] [--deadline SECONDS] [--stage-seconds SECONDS] [--only "STAGE .."] [OUT]
#
# --binaries: folder with `gpu_check`, `conformance` and `cubins`; the default is this script's folder
# --tiny:     uses sizes for a software device; PyTorch then runs on the CPU
# --deadline: time limit of the whole run in seconds
# --stage-seconds: maximum time of a stage in seconds
# --only:     runs only these stages
# OUT:        folder for the results, ./results by default; the script deletes old results in it
# PYTHON:     environment variable with the Python program to use, python3 by default
#
# The exit code is 0 if each stage passed or was skipped with a reason. It is 1 if a stage did not pass, or if a
# required stage was not run because time ran out. It is 2 if an argument is invalid.
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
command -v "$python" >/dev/null || { echo "error: $python not found; set PYTHON to a Python program" >&2; exit 2; }
for needed in gpu_check conformance; do
    [ -x "$binaries/$needed" ] || { echo "error: $binaries/$needed not found; pack.sh builds it" >&2; exit 2; }
done
# Removes the results of an earlier run, so that they do not count as results of this one. A folder with other files is refused.
if [ -d "$out" ]; then
    [ -f "$out/stages" ] || [ -z "$(ls -A "$out")" ] ||
        { echo "error: $out holds files that are not results; name another folder" >&2; exit 2; }
    rm -rf "$out"
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
: >"$out/stages"
scratch=$(mktemp -d) || exit 2

# Ends running stages, then writes the report. Runs on every exit.
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

# Prints library folders for LD_LIBRARY_PATH: the folders of Python's packages, and the driver's folder if the dynamic
# linker does not find the driver.
libraries() {
    # If the driver does not answer, the timeout ends this program, so that the script still writes its report.
    timeout 20 "$python" - "$scratch/lib" <<'PYTHON'
import ctypes, glob, os, sys

folders = [folder for root in sys.path for folder in sorted(glob.glob(os.path.join(root, "nvidia", "*", "lib")))]
# Our programs first try to load these libraries without a version in the name. Without these links, they would find the
# libraries of a CUDA toolkit on the machine.
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
torch_libraries=${LD_LIBRARY_PATH-}
found=$(libraries)
ours=$torch_libraries${torch_libraries:+${found:+:}}$found
# Files of the software device have the names of libraries that PyTorch needs. PyTorch must not load these files.
[ -z "$tiny" ] || torch_libraries=""

# stage NAME SECONDS COMMAND..: runs the command, and stores its output and its exit status. A failure does not end the script.
stage() {
    local name=$1 limit=$2 wanted left=$((seconds_max - SECONDS)) begin=$SECONDS code
    shift 2
    [ -z "$only" ] || [[ $only == *" $name "* ]] || return 0
    echo "$name" >>"$out/stages"
    # The software device is slow on a busy machine.
    [ -z "$tiny" ] || limit=$((limit * 4))
    [ "$limit" -le "$stage_max" ] || limit=$stage_max
    wanted=$limit
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 1 ]; then
        echo "not-run the $seconds_max s of the deadline are used up" >"$out/$name.status"
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

# gpu_stage NAME SECONDS COMMAND..: a stage that needs a GPU.
gpu_stage() {
    [ -n "$gpu" ] || { skip "$1" "no usable GPU: see the stage versions"; return; }
    # `shardflow launch` sets the variables below to EAGER, EAGER and 32. EAGER loads all of NVIDIA's kernels in each
    # process. This takes time, and is needed only if GPUs wait for each other.
    local module_loading=${loading-LAZY}
    stage "$1" "$2" env LD_LIBRARY_PATH="$ours" CUDA_MODULE_LOADING="${CUDA_MODULE_LOADING-$module_loading}" \
        CUDA_MODULE_DATA_LOADING="${CUDA_MODULE_DATA_LOADING-$module_loading}" \
        CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS-32}" "${@:3}"
}

# nccl_stage NAME SECONDS COMMAND..: a stage that needs two GPUs, because NCCL permits only one rank per GPU.
nccl_stage() {
    [ -z "$gpu" ] || [ "$gpus" -ge 2 ] || { skip "$1" "this stage needs two GPUs, and $gpus can be used"; return; }
    loading=EAGER gpu_stage "$@"
}

# train_stage NAME SECONDS ARGS..: trains GPT-2 with Shardflow, as users run it.
train_stage() {
    loading=EAGER gpu_stage "$1" "$2" "${train[@]}" "${@:3}"
}

# torch_stage NAME SECONDS LIKE SCRIPT ARGS..: runs a PyTorch script with the sizes from the output of our stage LIKE.
torch_stage() {
    local name=$1 limit=$2 like=$3 script=$4
    shift 4
    if [ -z "$gpu" ] || ! grep -q '^ended 0 ' "$out/$like.status" 2>/dev/null; then
        skip "$name" "the stage $like has no result to compare with"
        return
    fi
    stage "$name" "$limit" env LD_LIBRARY_PATH="$torch_libraries" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" \
        "$python" "$here/$script" --like "$out/$like.out" "${torch_device[@]}" "$@"
}

# conformance NAME SECONDS [CASE]: runs one case of the conformance suite, which CI runs on the software device.
suite=("$binaries/conformance" --ignored --exact child --nocapture)
conformance() {
    gpu_stage "conformance-$1" "$2" env SHARDFLOW_TEST_CASE="${3:-$1}" "${suite[@]}"
}

# sanitized TOOL COMMAND..: runs the command under compute-sanitizer. Returns 77 if compute-sanitizer is missing or does
# not support the GPU.
sanitized() {
    local path code
    path=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) ||
        { echo "compute-sanitizer is not on this machine" >&2; return 77; }
    # With our own attention, fewer kernels of other libraries run. API errors are not reported: libraries probe for
    # functions that the driver lacks, and polling an incomplete event is not an error.
    SHARDFLOW_ATTENTION=own "$path" --tool "$1" --report-api-errors no --error-exitcode 9 "${@:2}"
    code=$?
    # compute-sanitizer prints this message to its standard output, which the report also shows.
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
# `--batch 0` selects the largest batch that fits.
batch=(--batch 0) timed=(--timed 30) ceilings=() delays=() torch_device=() sizes=()
if [ -n "$tiny" ]; then
    batch=(--batch 4) timed=(--timed 5 --steps 3) torch_device=(--device cpu) sizes=("${small[@]}")
    ceilings=(--copy-bytes 65536 --matrix 48) delays=(--seeds 1 --cycles 3000 --size 16 --steps 2)
fi
check=$binaries/gpu_check
train=("$check" train "${sizes[@]}")

gpu=1
gpu_stage versions 90 "$check" versions
# The stage `versions` lists devices even if a library is missing. If it has not run to its end, assume a GPU.
! grep -Eqs '^ended [0-9] ' "$out/versions.status" || grep -q '"capability"' "$out/versions.out" || gpu=""
gpus=0
if [ -n "$gpu" ]; then
    versions=$out/versions.out
    [ -f "$versions" ] || { versions=$scratch/versions && LD_LIBRARY_PATH=$ours timeout 30 "$check" versions >"$versions" 2>/dev/null; }
    gpus=$(grep -o '"capability"' "$versions" | wc -l)
fi
# The first import of PyTorch from disk is slow. This import warms the page cache for the later stages.
if [ -n "$gpu" ] && [ -z "$tiny$only" ]; then
    timeout 120 "$python" -c 'import torch, torch._dynamo, triton' >/dev/null 2>&1 </dev/null &
fi
# Required stages come first, because time may run out at the end.
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
