#!/usr/bin/env python3
"""Runs `gpt` and the PyTorch reference program on the same model, text, batch and rules, in turn, and prints the ratio.

    python3 integration-tests/benches/beside_torch.py --peers ../shared/peers --python VENV/bin/python [--config a] [--threads 2]

--python must have torch and numpy. Both sides train on the same text from the same weights; their losses are compared
too. Machines are noisy: figures are medians of the rounds' medians, and only their ratio carries over.
"""
import json, os, statistics, subprocess, tempfile

from peers import ours, parser

CONFIGS = {
    "a": dict(layers=4, heads=4, width=128, context=64, batch=12),
    "b": dict(layers=6, heads=6, width=384, context=256, batch=8),
}


def torch(a, steps):
    with tempfile.TemporaryDirectory() as folder:
        losses = os.path.join(folder, "losses.json")
        command = [a.python, os.path.join(a.peers, "gpt_single.py"), "--config", a.config, "--threads", str(a.threads),
                   "--warmup", str(steps // 5), "--steps", str(steps - steps // 5), "--losses", losses]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(out.strip().splitlines()[-1])["ms_per_step"], json.load(open(losses))


def main():
    p = parser(__doc__)
    p.add_argument("--config", default="a", choices=list(CONFIGS))
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=0)
    a = p.parse_args()
    steps = a.steps or {"a": 100, "b": 15}[a.config]
    mine, theirs = [], []
    for _ in range(a.rounds):
        ms, my_losses = ours([a.binary], a.data, steps, threads_per_device=a.threads, **CONFIGS[a.config])
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
