#!/usr/bin/env python3
"""Collects the results of check.sh's stages in a folder into its `report.json`. The exit code is 1 if a stage did not pass, a
required one was not run, or the required speed was not measured.

    python3 report.py FOLDER

For each name in FOLDER/stages: NAME.status is `running LIMIT`, or `ended CODE SECONDS LIMIT WANTED` (LIMIT is less than WANTED if
the deadline left less time), or `skipped REASON`, or `not-run REASON`. NAME.out ends with a line of JSON, if the stage has figures.
NAME.err is the standard error. Needs no package.
"""

import json
import os
import pathlib
import re
import sys
import time

# Maximum relative difference of the first losses from PyTorch's. In f32 the orders of sums differ, in bf16 the places of rounding.
# On CPUs, four steps of GPT-2 124M on 128 tokens, it was 9e-8 and 1.5e-4.
LOSSES_MAX = {"f32": 1e-4, "bf16": 5e-3}
# Required share of torch.compile's tokens/s.
SPEED_MIN = 0.9
TAIL_LINES, TAIL_CHARACTERS = 40, 6000
# Stages that may be left out for lack of time, by a part of their names: second rounds, and long stages of little importance.
OPTIONAL = ("-2", "any-order", "sanitizer-")
# Dense bf16 TFLOP/s of NVIDIA's data sheets, by a part of the device name in the driver.
DATASHEET = {"H200": 989.4, "H100 80GB HBM3": 989.4, "H100 PCIe": 756.0, "A100": 312.0, "L40S": 362.0}


def text(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def figures(path):
    """The JSON object in the last line, or None."""
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
    """The first error of a program; or the message of a test's last panic, because some tests panic on purpose before; or the last
    Python exception; else the last line."""
    panics = [following for line, following in zip(lines, lines[1:]) if "panicked at" in line]
    exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    known = [line for line in lines if line.startswith("error")][:1] + panics[-1:] + exceptions[-1:] + lines[-1:]
    return known[0] if known else "it gave no reason"


def stage(name, folder):
    word, _, rest = text(folder / f"{name}.status").strip().partition(" ")
    out = dict(name=name, state="not-run", seconds=0)
    if word == "running":
        out["state"] = "interrupted"
    elif word in ("skipped", "not-run"):
        out.update(state=word, why=rest)
    elif word == "ended":
        code, seconds, limit, wanted = (int(number) for number in rest.split())
        # 124: ended by `timeout`. 137: killed, by `timeout` if its time limit has passed.
        late = code == 124 or code == 137 and seconds >= limit
        state = "timed-out" if late else {0: "ok", 77: "skipped"}.get(code, "failed")
        out.update(state=state, seconds=seconds, limit_seconds=limit, exit_code=code)
        if state == "timed-out" and limit < wanted:
            # With its full time the stage might have passed.
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
    """Compares the first losses of two trainings. The report lists the second one under `other_key`."""
    if not ours or not other:
        return derived(name, "skipped", "at least one of the two trainings to compare is missing")
    if ours["weights"] != other["weights"]:
        return derived(name, "failed", f"{ours['weights']} weights here, {other['weights']} there")
    pairs = list(zip(ours["losses"], other["losses"]))
    # A loss that is not finite is null.
    differences = [abs(a - b) / abs(b) if None not in (a, b) else float("inf") for a, b in pairs]
    most = max(differences, default=float("inf"))
    results = dict({"ours": ours["losses"], other_key: other["losses"]}, relative=most if most < float("inf") else None,
                   allowed=LOSSES_MAX[precision])
    good = most <= LOSSES_MAX[precision]
    return derived(name, "ok" if good else "failed", None if good else "losses differ", results)


def guarded(name, compute, *args):
    """Computes a stage or a comparison. Unreadable input fails only this one."""
    try:
        return compute(name, *args)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        return derived(name, "failed", f"invalid figures: {error!r}")


def best(results, *stages):
    """The round of a training with the most tokens/s."""
    rounds = [results.get(name) for name in stages]
    rounds = [r for r in rounds if r and r.get("tokens_per_s")]
    return max(rounds, key=lambda r: r["tokens_per_s"], default=None)


def speed(name, results, info):
    """Tokens/s compared with PyTorch's, and the share of the machine's peak."""
    runs = {kind: best(results, f"gpt2-{kind}-1", f"gpt2-{kind}-2") for kind in ("ours", "eager", "compile")}
    ours = runs["ours"]
    # cuDNN's gradient of attention as PyTorch may use it, without the same bits each time. Not part of the requirement.
    runs["any_order"] = best(results, "gpt2-any-order")
    if not ours:
        return derived(name, "skipped", "there is no training by Shardflow")
    rate = {kind: run["tokens_per_s"] if run else None for kind, run in runs.items()}
    over = {f"over_{kind}": rate["ours"] / rate[kind] for kind in ("eager", "compile") if rate[kind]}
    m = ours["model"]
    # Lookups in the embedding's tables take no FLOPs. Attention is counted as in PaLM (Chowdhery et al. 2022), for all scores.
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
        # A launch that is timed separately is not fused with its neighbour, so the sum may be more than a step.
        total = launches["sum_ms_per_step"]
        rows = launches["launches"][:20]
        out.update(ms_per_step=ours["ms_per_step"], launches_ms_per_step=total, where_the_time_goes=[
            f"{row['ms_per_step']:.3f} ms, {row['ms_per_step'] / total:.0%}: {row['count']} x {row['op']} {row['spec'] or ''} "
            f"{[b['shape'] for b in row['reads']]}" for row in rows])
    if info.get("sizes") == "tiny":
        return derived(name, "skipped", "tiny sizes do not measure speed", out)
    if "over_compile" not in over:
        # The stage was not requested, or it gave no figure.
        requested = any(key.startswith("gpt2-compile-") for key in info["requested"])
        state = "not-measured" if requested else "skipped"
        return derived(name, state, "torch.compile gave no figure to compare with", out)
    good = over["over_compile"] >= SPEED_MIN
    why = None if good else f"{over['over_compile']:.2f} of torch.compile's tokens/s, {SPEED_MIN} is required"
    return derived(name, "ok" if good else "failed", why, out)


def main():
    folder = pathlib.Path(sys.argv[1])
    stages = [guarded(name, stage, folder) for name in text(folder / "stages").split()]
    info = dict(line.split("=", 1) for line in text(folder / "info").splitlines() if "=" in line)
    results = {s["name"]: s["results"] for s in stages}
    # Only complete stages are compared.
    complete = {s["name"]: s["results"] for s in stages if s["state"] == "ok"}
    if any(name.startswith("gpt2-") for name in results):
        # The first complete round of PyTorch: all rounds begin with the same losses, except for rounding.
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
