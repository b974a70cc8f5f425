#!/usr/bin/env python3
"""Runs `gpt` and the PyTorch reference program in turn on the same model, text and batch. Prints the speed ratio.

    python3 integration-tests/benches/beside_torch.py --peers ../shared/peers --python VENV/bin/python [--config a] [--threads 2]

--python must have torch and numpy. Both programs train on the same text from the same weights, and the script also
compares their losses. Figures are medians of the rounds' medians. Machines are noisy, so only ratios are comparable.
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
    own, peer = [], []
    for _ in range(a.rounds):
        ms, own_losses = ours([a.binary], a.data, steps, threads_per_device=a.threads, **CONFIGS[a.config])
        own.append(ms)
        ms, peer_losses = torch(a, steps)
        peer.append(ms)
    difference = max(abs(x - y) / y for x, y in zip(own_losses[:20], peer_losses[:20]))
    own, peer = statistics.median(own), statistics.median(peer)
    print(json.dumps(dict(config=a.config, threads=a.threads, shardflow_ms=round(own, 2), torch_ms=round(peer, 2),
                          speed_over_torch=round(peer / own, 3), first_loss=own_losses[0],
                          largest_relative_loss_difference_in_20_steps=f"{difference:.1e}")))


if __name__ == "__main__":
    main()
