#!/usr/bin/env bash
# Builds the programs, cubins and scripts that a machine with a GPU needs for check.sh. Puts them into one folder, and
# into one archive beside it. Needs Rust, g++ and PyPI (for NVRTC), but no GPU. Fails if the folder exceeds 64 MiB.
#
#     integration-tests/gpu/pack.sh [FOLDER]      target/gpu-check by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}"
out="${1:-$CARGO_TARGET_DIR/gpu-check}"
bytes_max=$((64 << 20))

# The CI stage `cuda` uses the same virtual environment.
venv="$CARGO_TARGET_DIR/cuda-wheels" wanted=kernels/cuda/requirements.txt
if ! cmp -s "$wanted" "$venv/installed"; then
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check --only-binary :all: -r "$wanted"
    cp "$wanted" "$venv/installed"
fi
# Includes Blackwell: where only PyTorch's packages are installed, NVRTC may lack the headers to compile for it.
architectures=(--arch sm_80 --arch sm_90 --arch sm_90a --arch sm_100 --arch sm_120)
"$venv/bin/python" kernels/cuda/build_cubins.py "${architectures[@]}" --out "$CARGO_TARGET_DIR/cubins" >"$CARGO_TARGET_DIR/cubins.log" ||
    { tail -n 20 "$CARGO_TARGET_DIR/cubins.log" >&2; exit 1; }

cargo build --release -p shardflow-integration-tests --bin gpu_check
# The test program that the CI stage `test` runs on the software device.
conformance=$(cargo test -p shardflow-kernels --test cuda --no-run --message-format=json |
    sed -n 's/.*"kind":\["test"\].*"executable":"\([^"]*\)".*/\1/p')
[ -x "$conformance" ] || { echo "error: cargo lists no program for the test cuda: $conformance" >&2; exit 1; }
# If no test had this name, the program would run no test and succeed.
"$conformance" --list --ignored | grep -x "child: test" >/dev/null || { echo "error: $conformance has no test named child" >&2; exit 1; }

rm -rf "$out"
mkdir -p "$out/cubins"
strip -o "$out/gpu_check" "$CARGO_TARGET_DIR/release/gpu_check"
strip -o "$out/conformance" "$conformance"
# Copies only cubins of existing sources, because an older build may have left other cubins.
for source in kernels/src/cuda/*.cu; do
    cp "$CARGO_TARGET_DIR/cubins/$(basename "$source" .cu)".*.cubin "$out/cubins"
done
cp integration-tests/gpu/{check.sh,report.py,gpt2_torch.py,launches_torch.py} "$out"
echo "$(git rev-parse HEAD)$(git diff --quiet HEAD || echo ' with changes')" >"$out/COMMIT"
bytes=$(du -sb "$out" | cut -f1)
if [ "$bytes" -gt "$bytes_max" ]; then
    du -sb "$out"/* >&2
    echo "error: $out has $bytes bytes, more than the limit of $bytes_max bytes; the sizes are listed above" >&2
    exit 1
fi
tar -C "$(dirname "$out")" -czf "$out.tar.gz" "$(basename "$out")"
echo "$out: $bytes bytes; $out.tar.gz: $(stat -c %s "$out.tar.gz") bytes"
