"""Checks that every expression of the dashboards and alerts returns a value in a Prometheus that scrapes a training.

The training has two processes, commits checkpoints, and loses a process once, so that these metrics have values.

    check.py --programs target/debug

Needs `prometheus` on PATH. The exit code is 0 if all expressions return a value, and 77 if there is no Prometheus.
Otherwise, the program prints the expressions that return nothing, and the exit code is 1.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

DASHBOARDS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "dashboards"
# Ports of the two processes.
PORTS = (19400, 19401)
# Port of Prometheus.
PROMETHEUS = 19490
# Deadline of each wait.
DEADLINE_SECONDS = 120

TRAINING = (
    "--mesh data=2,stage=2 --micro-batches 4 --layers 4 --width 32 --heads 2 --context 16 --batch 16 --clip 1 --sample 0"
    " --steps 1000000 --checkpoint-every 20 --peak-tflops 0.1"
).split()


def get(port, path, **query):
    url = f"http://127.0.0.1:{port}{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


def wait(event, condition):
    """Waits until `condition` returns a true value, and returns it."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass  # The server has not started yet, or has ended.
        time.sleep(0.2)
    raise SystemExit(f"error: timeout of {DEADLINE_SECONDS} s while waiting for {event}")


def metric(port, name):
    found = re.search(rf"^{re.escape(name)} ([^\n]+)$", get(port, "/metrics"), re.MULTILINE)
    return float(found[1]) if found else None


def trainings(launcher):
    """Returns the ids of the launcher's training processes."""
    children = pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == "gpt"]


def train(programs, folder):
    """Starts the training, waits for a checkpoint, and kills one of the training's processes."""
    launch = [programs / "shardflow", "launch", "--nproc-per-node=2", "--max-restarts=3", "--", programs / "gpt", *TRAINING]
    outputs = [f"--listen=127.0.0.1:{PORTS[0]}", f"--checkpoint={folder}/checkpoints"]
    log = open(folder / "training.log", "w")
    launcher = subprocess.Popen([*launch, *outputs], stdout=log, stderr=log, cwd=folder)
    commits = 'shardflow_checkpoints_total{outcome="committed"}'
    wait("a checkpoint", lambda: metric(PORTS[0], commits) or launcher.poll() is not None)
    if launcher.poll() is not None:
        raise SystemExit("error: the training ended:\n" + (folder / "training.log").read_text())
    os.kill(trainings(launcher.pid)[-1], signal.SIGKILL)
    wait("the restart", lambda: metric(PORTS[0], 'shardflow_restarts_total{cause="137"}'))
    wait("a checkpoint after the restart", lambda: metric(PORTS[0], commits))
    return launcher


def start_prometheus(folder):
    config = folder / "prometheus.yml"
    targets = ", ".join(f"'127.0.0.1:{port}'" for port in PORTS)
    config.write_text(
        "global: { scrape_interval: 1s, evaluation_interval: 1s }\n"
        f"rule_files: ['{DASHBOARDS}/alerts.yaml']\n"
        f"scrape_configs: [{{ job_name: shardflow, static_configs: [{{ targets: [{targets}] }}] }}]\n"
    )
    options = [f"--config.file={config}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{PROMETHEUS}"]
    log = open(folder / "prometheus.log", "w")
    return subprocess.Popen(["prometheus", *options], stdout=log, stderr=log)


def expressions():
    """Yields every expression, with its location."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expr = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "10s")
                assert "$" not in expr, expr
                yield f"{path.name}, {panel['title']}", expr
    for group in json.loads(get(PROMETHEUS, "/api/v1/rules"))["data"]["groups"]:
        for rule in group["rules"]:
            # With `bool`, a comparison returns 0 or 1. An alert that does not fire then also returns a value.
            yield f"alerts.yaml, {rule['name']}", re.sub(r"(?<= )(>|<|==)(?= )", r"\1 bool", rule["query"])


def has_no_value(result):
    """Returns whether the result is empty or only NaN. For example, a mean over no samples is NaN."""
    return all(sample["value"][1] == "NaN" for sample in result)


def empty():
    """Returns the expressions that return nothing, and the number of all expressions."""
    all_expressions = list(expressions())
    nothing = []
    for location, expr in all_expressions:
        try:
            if has_no_value(json.loads(get(PROMETHEUS, "/api/v1/query", query=expr))["data"]["result"]):
                nothing.append(f"{location}: {expr}")
        except urllib.error.HTTPError as error:
            nothing.append(f"{location}: {expr}: {error.read().decode()}")
    return nothing, len(all_expressions)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--programs", type=pathlib.Path, required=True, help="folder with shardflow and gpt")
    programs = arguments.parse_args().programs.resolve()
    if not shutil.which("prometheus"):
        print("SKIPPED: prometheus is not on PATH")
        return 77
    with tempfile.TemporaryDirectory() as name:
        folder, running = pathlib.Path(name), []
        try:
            running.append(train(programs, folder))
            running.append(start_prometheus(folder))
            wait("Prometheus", lambda: get(PROMETHEUS, "/-/ready"))
            deadline, nothing, count = time.monotonic() + DEADLINE_SECONDS, ["all"], 0
            while nothing and time.monotonic() < deadline:
                time.sleep(2)
                nothing, count = empty()
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait(timeout=30)
    for line in nothing:
        print(f"error: this expression returns no value: {line}")
    print(f"{count - len(nothing)} of {count} expressions return a value")
    return 1 if nothing or count < 40 else 0


if __name__ == "__main__":
    sys.exit(main())
