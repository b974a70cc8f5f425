#!/usr/bin/env python3
"""Times, in PyTorch, the matrix products and attentions that `gpu_check launches` has timed in Shardflow. For each
product or attention, prints the milliseconds of both, in one line of JSON.

    python3 launches_torch.py --like LAUNCHES.json [--device cpu]

On a GPU, both programs use up to 8 copies of the buffers in turn, so that a cache does not hold large buffers. For a
product of bf16 inputs, PyTorch writes bf16, but Shardflow writes float32. Exit code 77 means that the program cannot
run here; the last line states the reason.
"""

import argparse
import json
import math
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    print(f"this Python has no PyTorch: {error}", file=sys.stderr)
    sys.exit(77)

ROUND_BYTES, COPIES_MAX, ROUND_MS, ROUNDS, IN_A_ROW_MAX = 256 << 20, 8, 20.0, 5, 200
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "i32": torch.int32}


def calls(row, device, copies):
    """Returns functions without arguments. Each function does the work of the row on its own tensors."""
    def tensors(kind):
        return [(torch.rand(b["shape"], device=device) + 0.1).to(TYPES[b["type"]]) for b in row[kind]]

    def call():
        reads = tensors("reads")
        if row["op"] == "einsum":
            return lambda: torch.einsum(row["spec"], *reads)
        # PyTorch's layout is [b, h, t, d], and Shardflow's layout is [b, t, h, d].
        q, k, v = (x.transpose(1, 2) for x in (reads if row["op"] == "attention" else reads[1:4]))
        if row["op"] == "attention":
            return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        output = F.scaled_dot_product_attention(*inputs, is_causal=True)
        gradient = reads[0].transpose(1, 2)
        return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)

    return [call() for _ in range(copies)]


def captured(play):
    """Captures the calls of `play` as a CUDA graph. Returns a function that replays the graph without Python between
    the calls, or None if the capture fails."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            play()
    except RuntimeError as error:
        print(f"the capture as a CUDA graph failed, so times include Python: {error}", file=sys.stderr)
        return None
    return graph.replay


def measure(row, device):
    """Returns the milliseconds of one call."""
    buffers = row["reads"] + row["writes"]
    size = sum(math.prod(b["shape"]) * TYPES[b["type"]].itemsize for b in buffers)
    copies = 1 if device == "cpu" else min(max(-(-ROUND_BYTES // max(size, 1)), 1), COPIES_MAX)
    work = calls(row, device, copies)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def run(count):
        for i in range(count):
            work[i % copies]()

    def milliseconds(play):
        wait()
        begin = time.perf_counter()
        play()
        wait()
        return (time.perf_counter() - begin) * 1e3

    run(copies)
    one = milliseconds(lambda: run(1))
    count = min(max(math.ceil(ROUND_MS / max(one, 1e-3)), 1), IN_A_ROW_MAX)
    play = lambda: run(count)
    # A small product ends before Python issues the next product.
    if device == "cuda" and row["op"] == "einsum":
        play = captured(play) or play
    milliseconds(play)
    return statistics.median(milliseconds(play) / count for _ in range(ROUNDS))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--like", required=True, help="output file of `gpu_check launches`")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    a = p.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no GPU", file=sys.stderr)
        sys.exit(77)
    with open(a.like) as file:
        rows = [row for row in json.load(file)["launches"] if row["op"] in ("einsum", "attention", "attention_grad")]
    out = []
    for row in rows:
        ms = measure(row, a.device)
        out.append(dict(op=row["op"], spec=row["spec"], shapes=[b["shape"] for b in row["reads"]], count=row["count"],
                        ms=row["ms"], torch_ms=ms, speed_over_torch=ms / row["ms"]))
    print(json.dumps(dict(torch=torch.__version__, launches=out)))


if __name__ == "__main__":
    main()
