#!/usr/bin/env python3
"""Compares Shardflow in processes of one machine with PyTorch over gloo, in alternating rounds. Prints markdown tables.

    cargo build --release && cargo bench -p shardflow-kernels --bench collectives --no-run
    python3 integration-tests/benches/beside_gloo.py --peers ../shared/peers --python VENV/bin/python [--rounds 3]
        [--only collectives|training] [--engines on-node,unix,tcp] [--worlds 2,4] [--sizes 1024,..]

--python must have torch and numpy. --peers is a folder with `collectives.py`, `gpt_dp2.py`, `gpt_tp2.py` and
`gpt_pp2.py`, which are not part of this repository. Figures are medians of the rounds' medians. Machines are noisy, so
only ratios are comparable. The exit code is 1 if a training is slower than PyTorch's, if a collective is slower than
gloo's, or if a collective of at least 1 MiB takes more than half of gloo's time.
"""
import json, os, statistics, subprocess, sys

from peers import ours, parser

SIZES = ",".join(str(1 << log) for log in range(10, 27, 2))
MODEL = dict(layers=4, heads=4, width=128, context=64)
TRAININGS = [
    ("data parallel, batch 12", dict(mesh="data=2", batch=12), "gpt_dp2.py", []),
    ("tensor parallel, batch 12", dict(mesh="tensor=2", batch=12), "gpt_tp2.py", []),
    ("pipeline, batch 96, 4 micro-batches", dict(mesh="stage=2", batch=96, micro_batches=4), "gpt_pp2.py",
     ["--batch", "96", "--micro", "4"]),
]


def lines(command, **more):
    ran = subprocess.run(command, capture_output=True, text=True, **more)
    if ran.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def times(rows):
    broken = [row for row in rows if "error" in row]
    if broken:
        sys.exit(f"a peer failed: {broken[0]}")
    return {(row["op"], row["world"], row["bytes"]): row["us"] for row in rows}


def bench(a, engine):
    """Returns the times of one engine by (op, world size, bytes)."""
    return times(lines(["cargo", "bench", "-q", "-p", "shardflow-kernels", "--bench", "collectives", "--", "--engine", engine,
                        "--worlds", a.worlds, "--sizes", a.sizes]))


def gloo(a):
    return times(lines([a.python, "collectives.py", "--backend", "gloo", "--worlds", a.worlds, "--sizes", a.sizes],
                       cwd=a.peers))


def size(n):
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"


def collectives(a):
    engines = a.engines.split(",")
    rounds = []
    for _ in range(a.rounds):
        rounds.append({"gloo": gloo(a), **{engine: bench(a, engine) for engine in engines}})
    behind = []
    print("| | processes | bytes | gloo, us | " + " | ".join(engines) + " |")
    print("|" + "---|" * (4 + len(engines)))
    for key in sorted(rounds[0]["gloo"]):
        op, world, count = key
        peer = statistics.median(r["gloo"][key] for r in rounds)
        cells = []
        for engine in engines:
            own = statistics.median(r[engine][key] for r in rounds)
            # Compares times of the same round, because both programs then ran under the same load.
            ratio = statistics.median(r["gloo"][key] / r[engine][key] for r in rounds)
            cells.append(f"{own:.1f} ({ratio:.2f})")
            if ratio < (2 if count >= 1 << 20 else 1):
                behind.append(f"{engine}, {world} processes: {op} of {size(count)} has {ratio:.2f} times gloo's speed")
        print(f"| {op} | {world} | {size(count)} | {peer:.1f} | " + " | ".join(cells) + " |")
    return behind


def torch(a, program, flags, steps):
    command = [a.python, program, "--warmup", str(steps // 5), "--steps", str(steps - steps // 5), *flags]
    last = lines(command, cwd=a.peers, env={**os.environ, "TINYSHAKESPEARE": os.path.abspath(a.data)})[-1]
    return last["ms_per_step"]


def training(a):
    behind = []
    launch = [a.shardflow, "launch", "--nproc-per-node", "2", "--", a.binary]
    print("| | Shardflow, ms a step | PyTorch over gloo, ms a step | speed over PyTorch |\n|---|---|---|---|")
    for name, flags, program, peer_flags in TRAININGS:
        steps = 20 if flags["batch"] == 96 else 60
        own = lambda: ours(launch, a.data, steps, threads_per_device=1, **MODEL, **flags)[0]
        pairs = [(own(), torch(a, program, peer_flags, steps)) for _ in range(a.rounds)]
        ms, peer = (statistics.median(side) for side in zip(*pairs))
        ratio = statistics.median(y / x for x, y in pairs)
        print(f"| {name} | {ms:.1f} | {peer:.1f} | {ratio:.2f} |", flush=True)
        if ratio < 1:
            behind.append(f"training {name}: Shardflow has {ratio:.2f} times PyTorch's speed")
    return behind


def main():
    p = parser(__doc__)
    p.add_argument("--shardflow", default="target/release/shardflow")
    p.add_argument("--only", choices=["collectives", "training"])
    p.add_argument("--engines", default="on-node,unix,tcp")
    p.add_argument("--worlds", default="2,4")
    p.add_argument("--sizes", default=SIZES)
    a = p.parse_args()
    behind = []
    if a.only != "collectives":
        behind += training(a)
        print()
    if a.only != "training":
        behind += collectives(a)
    if behind:
        sys.exit("\ntoo slow:\n  " + "\n  ".join(behind))


if __name__ == "__main__":
    main()
