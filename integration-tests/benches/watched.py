"""What watching costs: the default model with `--listen`, scraped every second, and `--trace`, beside the same without, in turn.

    cargo build --release --bin gpt
    python3 integration-tests/benches/watched.py --gpt target/release/gpt --rounds 7

Prints the median step of each side and the median over rounds of their ratio.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request

PORT = 19410
# Steps of a run, and how many of the first are left out.
STEPS, WARM = 200, 30


def run(gpt, folder, extra):
    """The median step of a run, in seconds."""
    log = folder / "log"
    command = [gpt, "--steps", str(STEPS), "--sample", "0", "--log-json", log, *extra]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return statistics.median(step["step_seconds"] for step in steps[WARM:] if "step_seconds" in step)


def scrape(stop):
    """As Prometheus would, and more often; counts answers."""
    answers = 0
    while not stop.wait(1):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=5) as answer:
                answers += bool(answer.read())
        except (urllib.error.URLError, ConnectionError):
            pass  # Between two runs.
    return answers


def watched(gpt, folder):
    stop, answers = threading.Event(), []
    scraper = threading.Thread(target=lambda: answers.append(scrape(stop)))
    scraper.start()
    try:
        median = run(gpt, folder, [f"--listen=127.0.0.1:{PORT}", "--trace", folder / "trace"])
    finally:
        stop.set()
        scraper.join()
    assert answers[0] > 0, "nothing was scraped"
    return median


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gpt", type=pathlib.Path, required=True)
    arguments.add_argument("--rounds", type=int, default=7)
    given = arguments.parse_args()
    plain, with_it = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for number in range(given.rounds):
            sides = [lambda: plain.append(run(given.gpt, folder, [])), lambda: with_it.append(watched(given.gpt, folder))]
            # Whoever runs second may find another machine.
            for side in sides if number % 2 == 0 else reversed(sides):
                side()
    ratios = [b / a for a, b in zip(plain, with_it)]
    print(f"plain {statistics.median(plain) * 1e3:.2f} ms a step, watched {statistics.median(with_it) * 1e3:.2f} ms")
    print(f"ratio {statistics.median(ratios):.4f}, from {min(ratios):.4f} to {max(ratios):.4f} in {given.rounds} rounds")


if __name__ == "__main__":
    main()
