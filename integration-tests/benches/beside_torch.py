#!/usr/bin/env python3
"""Runs `gpt` and the PyTorch reference program on the same model, text, batch and rules, in turn, and prints the ratio.

    python3 integration-tests/benches/beside_torch.py --peers ../shared/peers --python VENV/bin/python [--config a] [--threads 2]

--python must have torch and numpy. Both sides train on the same text from the same weights; their losses are compared
too. Machines are noisy: figures are medians of the rounds' medians, and only their ratio carries over.
"""
import argparse, json, os, statistics, subprocess, tempfile

CONFIGS = {
    "a": dict(layers=4, heads=4, width=128, context=64, batch=12),
    "b": dict(layers=6, heads=6, width=384, context=256, batch=8),
}


def ours(a, steps):
    flags = [x for k, v in CONFIGS[a.config].items() for x in (f"--{k}", str(v))]
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "log.jsonl")
        command = [a.binary, "--data", a.data, "--threads-per-device", str(a.threads), "--steps", str(steps),
                   "--sample", "0", "--log-json", log, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in open(log)]
    rows = [r for r in rows if "step" in r]
    seconds = [r["step_seconds"] for r in rows[steps // 5:]]
    return statistics.median(seconds) * 1e3, [r["loss"] for r in rows]


def torch(a, steps):
    with tempfile.TemporaryDirectory() as folder:
        losses = os.path.join(folder, "losses.json")
        command = [a.python, os.path.join(a.peers, "gpt_single.py"), "--config", a.config, "--threads", str(a.threads),
                   "--warmup", str(steps // 5), "--steps", str(steps - steps // 5), "--losses", losses]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(out.strip().splitlines()[-1])["ms_per_step"], json.load(open(losses))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peers", default="../shared/peers")
    p.add_argument("--data", default="../shared/data/tinyshakespeare/input.txt")
    p.add_argument("--python", default="python3")
    p.add_argument("--binary", default="target/release/gpt")
    p.add_argument("--config", default="a", choices=list(CONFIGS))
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=0)
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    steps = a.steps or {"a": 100, "b": 15}[a.config]
    mine, theirs = [], []
    for _ in range(a.rounds):
        ms, my_losses = ours(a, steps)
        mine.append(ms)
        ms, their_losses = torch(a, steps)
        theirs.append(ms)
    apart = max(abs(x - y) / y for x, y in zip(my_losses[:20], their_losses[:20]))
    mine, theirs = statistics.median(mine), statistics.median(theirs)
    print(json.dumps(dict(config=a.config, threads=a.threads, shardflow_ms=round(mine, 2), torch_ms=round(theirs, 2),
                          speed_over_torch=round(theirs / mine, 3), first_loss=my_losses[0],
                          largest_relative_loss_difference_in_20_steps=f"{apart:.1e}")))


if __name__ == "__main__":
    main()
