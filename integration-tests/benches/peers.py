"""Code for the scripts that compare with PyTorch: their flags, and a function that runs `gpt` and reads its log."""
import argparse, json, os, statistics, subprocess, tempfile


def parser(doc):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peers", default="../shared/peers")
    p.add_argument("--data", default="../shared/data/tinyshakespeare/input.txt")
    p.add_argument("--python", default="python3")
    p.add_argument("--binary", default="target/release/gpt")
    p.add_argument("--rounds", type=int, default=3)
    return p


def ours(command, data, steps, **flags):
    """Trains with a launcher or `gpt`. Returns (median ms per step after the first fifth of steps, losses)."""
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "log.jsonl")
        flags = dict(flags, data=os.path.abspath(data), steps=steps, sample=0, log_json=log)
        words = [x for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", str(v))]
        command = [os.path.abspath(x) if os.path.isfile(x) else x for x in command]
        ran = subprocess.run([*command, *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if ran.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
        rows = [row for row in map(json.loads, open(log)) if "step" in row]
    return statistics.median(row["step_seconds"] for row in rows[steps // 5:]) * 1e3, [row["loss"] for row in rows]
