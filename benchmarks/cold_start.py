"""How long `ldm-generate` takes from a cold start, and how much of that is importing.

    python benchmarks/cold_start.py [--model FOLDER] [--runs 5]

Alternates fresh processes that import torch alone, import and load our model, and draw one picture to a saved PNG.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

LOAD = "from ldm.pipeline import TextToImage; TextToImage.from_pretrained({model!r})"
DRAW = 'from ldm.cli.generate import run; run(["--prompt", "a red heart", "-o", {out!r}, *{flags!r}])'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model", args.model] if args.model else []
        programs = {
            "import torch": "import torch",
            "import ldm.pipeline": "import ldm.pipeline",
            "weights loaded": LOAD.format(model=args.model),
            "prompt to saved PNG": DRAW.format(out=f"{folder}/x.png", flags=flags),
        }
        times: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(args.runs):
            for name, program in programs.items():
                times[name].append(seconds(program))
    torch_only = statistics.median(times["import torch"])
    for name, values in times.items():
        middle = statistics.median(values)
        spread = f"min {min(values):.2f}  max {max(values):.2f}"
        print(f"{name:22s} median {middle:.2f} s  {spread}  {middle / torch_only:.2f} x torch")


def seconds(program: str) -> float:
    """Wall time of a fresh interpreter that runs a program."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
