#!/usr/bin/env python3
"""Trains the GPT of `gpu_check train` in PyTorch, with the same weights, tokens and AdamW, and prints one line of JSON.

    python3 gpt2_torch.py [--compile] [--device cpu] [--like OURS.json] [--layers 12 ..] [--steps 10] [--timed 30]

Weights are float32. With --precision bf16, the forward pass runs under autocast. --like takes sizes from the output of
`gpu_check train`. Timed steps do not wait for their losses. They are timed in groups, and each group has one
synchronisation at its end. Exit code 77 means that the program cannot run here; the last line states the reason.
"""

import argparse
import concurrent.futures
import json
import statistics
import sys
import time

try:
    import numpy as np
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError as error:
    print(f"this Python has no PyTorch or no numpy: {error}", file=sys.stderr)
    sys.exit(77)

SEED, DATA_SEED, STD = 1337, 4242, 0.02
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.99), 1e-8, 0.1
SIZES = dict(layers=12, heads=12, width=768, context=1024, vocabulary=50304, batch=16)
# Number of steps in a timed group.
GROUP = 5
# Number of elements of a weight that one task generates.
CHUNK = 1 << 20


def mix(x):
    """Applies SplitMix64's output function to an array of uint64."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def fnv1a(text):
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def normal(name, count):
    """Returns elements of the weight `name`: the cosine branch of Box-Muller on counters, as in runtime/src/init.rs."""
    key = mix([SEED ^ fnv1a(name)])[0]

    def part(first):
        with np.errstate(over="ignore"):
            i = key + np.uint64(2) * np.arange(first, min(first + CHUNK, count), dtype=np.uint64)
        u1 = ((mix(i) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        u2 = (mix(i + np.uint64(1)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (np.sqrt(-2.0 * np.log(u1)) * np.cos(2.0 * np.pi * u2) * STD).astype(np.float32)

    # Threads run in parallel, because numpy releases the GIL.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return np.concatenate(list(pool.map(part, range(0, count, CHUNK))))


def token(i, vocabulary):
    x = mix(np.uint64(DATA_SEED) + np.asarray(i, np.uint64)) % np.uint64(vocabulary)
    return (x * x // np.uint64(vocabulary) * x // np.uint64(vocabulary)).astype(np.int64)


def batch(a, step):
    """Returns the tokens and targets of a step in host memory."""
    positions = np.arange(step * a.batch * a.context, (step + 1) * a.batch * a.context, dtype=np.uint64)
    positions = positions.reshape(a.batch, a.context)
    both = [torch.from_numpy(token(positions + np.uint64(shift), a.vocabulary)) for shift in (0, 1)]
    return [tokens.pin_memory() if a.device == "cuda" else tokens for tokens in both]


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        # One product for q, k and v, as is usual in PyTorch.
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.fc, self.out = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        b, t, width = x.shape
        q, k, v = (u.view(b, t, self.heads, -1).transpose(1, 2) for u in self.qkv(self.ln1(x)).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, width))
        return x + self.out(F.gelu(self.fc(self.ln2(x))))


class Gpt(nn.Module):
    """The model of shardflow's `nn::gpt`. It has an exact GELU, a separate head matrix and no biases."""

    def __init__(self, a):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(a.vocabulary, a.width), nn.Embedding(a.context, a.width)
        self.h = nn.ModuleList(Block(a.width, a.heads) for _ in range(a.layers))
        self.lnf, self.head = nn.LayerNorm(a.width, bias=False), nn.Linear(a.width, a.vocabulary, bias=False)

    def forward(self, ids, targets):
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        logits = self.head(self.lnf(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))


# Shardflow's names of layers that differ from the names of the modules above.
NAMES = {"proj": "attn.proj", "fc": "mlp.fc", "out": "mlp.proj"}


def weight(name, shape):
    """Returns the initial values of the weight of one module."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    *front, layer, _ = name.split(".")
    prefix = "".join(part + "." for part in front)
    if layer == "qkv":
        third = shape[0] // 3 * shape[1]
        parts = [normal(f"{prefix}attn.{part}.weight", third) for part in "qkv"]
        return np.concatenate(parts).reshape(shape)
    return normal(f"{prefix}{NAMES.get(layer, layer)}.weight", int(np.prod(shape))).reshape(shape)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--precision", default="bf16", choices=["bf16", "f32"])
    p.add_argument("--compile", action="store_true")
    p.add_argument("--like", help="output file of `gpu_check train`; its sizes and learning rate are used")
    for name, size in SIZES.items():
        p.add_argument(f"--{name}", type=int, default=size)
    p.add_argument("--lr", type=float, default=3e-4)
    p.add_argument("--steps", type=int, default=10, help="first steps, whose losses are printed")
    p.add_argument("--timed", type=int, default=30, help="further steps, which are timed")
    a = p.parse_args()
    if a.like:
        with open(a.like) as file:
            like = json.load(file)
        vars(a).update({name: like["model"][name] for name in [*SIZES, "precision"]}, lr=like["lr"])
    return a


def main():
    begin, a = time.perf_counter(), arguments()
    if a.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no GPU", file=sys.stderr)
        sys.exit(77)
    on_gpu = a.device == "cuda"
    # Disable TF32 regardless of the environment, because Shardflow computes in float32.
    torch.set_float32_matmul_precision("highest")
    model = Gpt(a)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    model.to(a.device)
    groups = [dict(params=[p for p in model.parameters() if (p.dim() > 1) == matrices], weight_decay=decay)
              for matrices, decay in [(True, WEIGHT_DECAY), (False, 0.0)]]
    optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=BETAS, eps=EPS, fused=True)
    forward = torch.compile(model) if a.compile else model

    def step(tokens):
        ids, targets = (t.to(a.device, non_blocking=True) for t in tokens)
        with torch.autocast(a.device, torch.bfloat16, enabled=a.precision == "bf16"):
            loss = forward(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    losses = [step(batch(a, i)).item() for i in range(a.steps)]
    started = time.perf_counter() - begin
    ms = []
    for first in range(a.steps, a.steps + a.timed, GROUP):
        batches = [batch(a, i) for i in range(first, first + GROUP)]
        begin = time.perf_counter()
        for tokens in batches:
            loss = step(tokens)
        loss.item()
        ms.append((time.perf_counter() - begin) * 1e3 / GROUP)
    per_step = statistics.median(ms) if ms else None
    memory = dict(peak_bytes=torch.cuda.max_memory_allocated(), reserved_bytes=torch.cuda.max_memory_reserved())
    print(json.dumps(dict(
        program="torch compiled" if a.compile else "torch eager", torch=torch.__version__,
        model={name: getattr(a, name) for name in [*SIZES, "precision", "device"]},
        weights=sum(p.numel() for p in model.parameters()), lr=a.lr, losses=losses, ms_per_step=per_step,
        timed_steps=len(ms) * GROUP, tokens_per_s=per_step and a.batch * a.context / per_step * 1e3, started_s=started,
        memory=memory if on_gpu else None)))


if __name__ == "__main__":
    main()
