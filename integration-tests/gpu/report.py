#!/usr/bin/env python3
"""Collects the results of the stages of check.sh from a folder, and writes them to `report.json` in that folder. The
exit code is 1 if a stage did not pass, if a required stage was not run, or if the required speed was not measured.

    python3 report.py FOLDER

FOLDER/stages has the names of the stages. For each NAME, NAME.status is `running LIMIT`, `skipped REASON`,
`not-run REASON` or `ended CODE SECONDS LIMIT WANTED`. LIMIT is less than WANTED if the deadline left less time.
NAME.out is the standard output. It ends with a line of JSON if the stage has figures. NAME.err is the standard error.
This program needs only Python's own library.
"""

import json
import os
import pathlib
import re
import sys
import time

# Maximum relative difference between our first losses and PyTorch's. In f32, the two programs add in different orders.
# In bf16, they also round at different places. On CPUs, with four steps of GPT-2 124M on 128 tokens, the difference was
# 9e-8 in f32 and 1.5e-4 in bf16.
LOSSES_MAX = {"f32": 1e-4, "bf16": 5e-3}
# Required ratio of Shardflow's tokens/s to torch.compile's tokens/s.
SPEED_MIN = 0.9
TAIL_LINES, TAIL_CHARACTERS = 40, 6000
# Stages that may be left out if time runs out, by a part of their names: second rounds and unimportant long stages.
OPTIONAL = ("-2", "any-order", "sanitizer-")
# bf16 TFLOP/s without sparsity from NVIDIA's data sheets, by a part of the device name that the driver reports.
DATASHEET = {"H200": 989.4, "H100 80GB HBM3": 989.4, "H100 PCIe": 756.0, "A100": 312.0, "L40S": 362.0}


def text(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def figures(path):
    """Returns the JSON object in the last line of the file, or None."""
    lines = text(path).strip().splitlines()
    try:
        # Inf and NaN become null in the report.
        found = json.loads(lines[-1], parse_constant=lambda _: None) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def tail(folder, name):
    both = text(folder / f"{name}.out") + text(folder / f"{name}.err")
    return "\n".join(both.splitlines()[-TAIL_LINES:])[-TAIL_CHARACTERS:]


def reason(lines):
    """Returns the first error of a program. If there is none, returns the message of a test's last panic (some tests
    first panic on purpose), the last Python exception, or the last line, whichever exists first in this order."""
    panics = [following for line, following in zip(lines, lines[1:]) if "panicked at" in line]
    exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    known = [line for line in lines if line.startswith("error")][:1] + panics[-1:] + exceptions[-1:] + lines[-1:]
    return known[0] if known else "the stage printed nothing"


def stage(name, folder):
    word, _, rest = text(folder / f"{name}.status").strip().partition(" ")
    out = dict(name=name, state="not-run", seconds=0)
    if word == "running":
        out["state"] = "interrupted"
    elif word in ("skipped", "not-run"):
        out.update(state=word, why=rest)
    elif word == "ended":
        code, seconds, limit, wanted = (int(number) for number in rest.split())
        # 124: `timeout` has ended the stage. 137: the stage was killed, by `timeout` if its time limit has passed.
        late = code == 124 or code == 137 and seconds >= limit
        state = "timed-out" if late else {0: "ok", 77: "skipped"}.get(code, "failed")
        out.update(state=state, seconds=seconds, limit_seconds=limit, exit_code=code)
        if state == "timed-out" and limit < wanted:
            # The stage might have passed with its full time.
            out.update(state="not-run", why=f"the deadline left {limit} of the {wanted} s of this stage")
        if state in ("skipped", "failed"):
            lines = text(folder / f"{name}.err").strip().splitlines()
            out["why"] = "killed, possibly for lack of memory" if code == 137 else reason(lines)
    out["results"] = figures(folder / f"{name}.out")
    if out["state"] not in ("ok", "skipped"):
        out["tail"] = tail(folder, name)
    return out


def derived(name, state, why=None, results=None):
    return dict(name=name, state=state, seconds=0, results=results, **({"why": why} if why else {}))


def losses(name, ours, other, precision, other_key="torch"):
    """Compares the first losses of two trainings. The report names the second training `other_key`."""
    if not ours or not other:
        return derived(name, "skipped", "at least one of the two trainings to compare is missing")
    if ours["weights"] != other["weights"]:
        return derived(name, "failed", f"the models differ: {ours['weights']} and {other['weights']} weights")
    pairs = list(zip(ours["losses"], other["losses"]))
    # A loss that is Inf or NaN is null in JSON, that is, None.
    differences = [abs(a - b) / abs(b) if None not in (a, b) else float("inf") for a, b in pairs]
    most = max(differences, default=float("inf"))
    results = dict({"ours": ours["losses"], other_key: other["losses"]}, relative=most if most < float("inf") else None,
                   allowed=LOSSES_MAX[precision])
    good = most <= LOSSES_MAX[precision]
    return derived(name, "ok" if good else "failed", None if good else "losses differ", results)


def guarded(name, compute, *args):
    """Computes a stage or a comparison. If its input is unreadable, only this stage or comparison fails."""
    try:
        return compute(name, *args)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        return derived(name, "failed", f"invalid figures: {error!r}")


def best(results, *stages):
    """Returns the one of these rounds of a training that has the most tokens/s, or None."""
    rounds = [results.get(name) for name in stages]
    rounds = [r for r in rounds if r and r.get("tokens_per_s")]
    return max(rounds, key=lambda r: r["tokens_per_s"], default=None)


def speed(name, results, info):
    """Compares the tokens/s with PyTorch's, and computes the share of the machine's peak FLOP/s."""
    runs = {kind: best(results, f"gpt2-{kind}-1", f"gpt2-{kind}-2") for kind in ("ours", "eager", "compile")}
    ours = runs["ours"]
    # In this training, cuDNN may add in any order when it computes the gradient of attention, as in PyTorch. Its
    # results are not deterministic, so the required speed does not refer to this training.
    runs["any_order"] = best(results, "gpt2-any-order")
    if not ours:
        return derived(name, "skipped", "there is no training by Shardflow")
    rate = {kind: run["tokens_per_s"] if run else None for kind, run in runs.items()}
    over = {f"over_{kind}": rate["ours"] / rate[kind] for kind in ("eager", "compile") if rate[kind]}
    m = ours["model"]
    # Lookups in the embedding tables take no FLOPs. As in PaLM (Chowdhery et al. 2022), all scores of attention are
    # counted, also those that the causal mask removes.
    matrices = ours["weights"] - (m["vocabulary"] + m["context"]) * m["width"]
    flops = 6 * matrices + 12 * m["layers"] * m["width"] * m["context"]
    tflops = flops * rate["ours"] / 1e12
    products = (results.get("ceilings") or {}).get("product_tflops", {}).get("bf16")
    devices = (results.get("versions") or {}).get("devices") or [{}]
    sheet = next((peak for part, peak in DATASHEET.items() if part in devices[0].get("name", "")), None)
    out = dict(tokens_per_s=rate, **over, wanted_over_compile=SPEED_MIN, flops_per_token=flops, tflops=tflops,
               mfu_of_measured_product=products and tflops / products, mfu_of_datasheet=sheet and tflops / sheet,
               datasheet_tflops=sheet, memory={kind: run and run["memory"] for kind, run in runs.items()})
    launches = results.get("launches")
    if launches:
        # A launch that is timed alone is not fused with its neighbour, so the sum may exceed the time of a step.
        total = launches["sum_ms_per_step"]
        rows = launches["launches"][:20]
        out.update(ms_per_step=ours["ms_per_step"], launches_ms_per_step=total, where_the_time_goes=[
            f"{row['ms_per_step']:.3f} ms, {row['ms_per_step'] / total:.0%}: {row['count']} x {row['op']} {row['spec'] or ''} "
            f"{[b['shape'] for b in row['reads']]}" for row in rows])
    if info.get("sizes") == "tiny":
        return derived(name, "skipped", "tiny sizes do not measure speed", out)
    if "over_compile" not in over:
        # The stage of torch.compile was not requested, or it gave no figure.
        requested = any(key.startswith("gpt2-compile-") for key in info["requested"])
        state = "not-measured" if requested else "skipped"
        return derived(name, state, "torch.compile gave no figure to compare with", out)
    good = over["over_compile"] >= SPEED_MIN
    why = None if good else f"{over['over_compile']:.2f} times torch.compile's speed; at least {SPEED_MIN} is required"
    return derived(name, "ok" if good else "failed", why, out)


def main():
    folder = pathlib.Path(sys.argv[1])
    stages = [guarded(name, stage, folder) for name in text(folder / "stages").split()]
    info = dict(line.split("=", 1) for line in text(folder / "info").splitlines() if "=" in line)
    results = {s["name"]: s["results"] for s in stages}
    # Compare only complete stages.
    complete = {s["name"]: s["results"] for s in stages if s["state"] == "ok"}
    if any(name.startswith("gpt2-") for name in results):
        # Take the first complete round of PyTorch. All rounds begin with the same losses, except for rounding.
        rounds = [f"gpt2-{kind}-{n}" for kind in ("eager", "compile") for n in (1, 2)]
        for precision, ours, others in [("f32", "gpt2-f32-ours", ["gpt2-f32-eager"]), ("bf16", "gpt2-ours-1", rounds)]:
            other = next((complete[name] for name in others if complete.get(name)), None)
            stages.append(guarded(f"gpt2-losses-{precision}", losses, complete.get(ours), other, precision))
        given = dict(complete, versions=results.get("versions"))
        stages.append(guarded("gpt2-speed", speed, given, dict(info, requested=list(results))))
    for mesh in ("data", "stage"):
        if f"nccl-{mesh}" in results:
            pair = complete.get(f"nccl-{mesh}"), complete.get("gpt2-f32-ours")
            stages.append(guarded(f"nccl-losses-{mesh}", losses, *pair, "f32", "one_gpu"))
    not_run = [s["name"] for s in stages if s["state"] == "not-run"]
    optional = [name for name in not_run if any(part in name for part in OPTIONAL)]
    bad = [s["name"] for s in stages if s["state"] not in ("ok", "skipped") and s["name"] not in optional]
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    report = dict(when=when, **info, passed=not bad, not_passed=bad, not_run=not_run, stages=stages)
    # The rename is atomic: a reader sees the old report until the new one is complete.
    part = folder / "report.json.part"
    part.write_text(json.dumps(report, indent=1, allow_nan=False))
    os.replace(part, folder / "report.json")
    for s in stages:
        print(f"{s['name']:20} {s['state']:12} {s['seconds']:4} s  {s.get('why', '')[:150]}".rstrip())
    return 1 if bad or not stages else 0


if __name__ == "__main__":
    sys.exit(main())
