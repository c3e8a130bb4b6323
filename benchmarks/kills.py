"""SIGKILL at every named point of a training and at random instants; the weights must come out as if nothing happened.

    python -m benchmarks.kills --kills 200

Both stages, one and two processes. A run is killed a few times, each time started again, and once it is finished the
hashes of raw weights, average, discriminator and optimisers, and the exported files, are compared with an undisturbed
run's. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.forked import Points, exit_codes, exported, final_hashes, forked, settle, train_here, write_config

CASES = [(stage, processes) for processes in (1, 2) for stage in ("one", "two")]


@dataclass
class Case:
    """One stage on a number of processes: its undisturbed outcome, the points it passes, and how long it takes."""

    stage: str
    processes: int
    folder: Path
    autoencoder: Path | None
    hashes: dict[str, str]
    files: dict[str, bytes]
    points: list[list[str]]
    seconds: float

    def run(self, name: str) -> tuple[Path, Path]:
        run = self.folder / f"{self.stage}_{self.processes}_{name}"
        return run, write_config(self.stage, run, self.autoencoder)


def undisturbed(stage: str, processes: int, folder: Path, autoencoder: Path | None) -> Case:
    """Trains to the end and writes down every point that each process passes."""
    case = Case(stage, processes, folder, autoencoder, {}, {}, [], 0.0)
    run, config = case.run("undisturbed")

    def work(rank: int) -> int:
        points = Points(run)
        points.install()
        code = train_here(stage, config)
        (folder / f"trace_{rank}.json").write_text(json.dumps(points.trace))
        return code

    began = time.monotonic()
    with forked(work, processes, run.with_suffix(".log")) as children:
        codes = exit_codes(children)
    if any(codes):
        sys.exit(f"the undisturbed run ended with {codes}:\n{run.with_suffix('.log').read_text()}")
    case.seconds = time.monotonic() - began
    case.hashes, case.files = final_hashes(run), exported(run)
    case.points = [json.loads((folder / f"trace_{rank}.json").read_text()) for rank in range(processes)]
    return case


def killed_at_point(case: Case, config: Path, run: Path, rank: int, label: str, at: int) -> list[int]:
    """Starts the run; process `rank` kills itself at a point. Returns the exit codes."""

    def work(own: int) -> int:
        if own == rank:
            Points(run, label, at, lambda: os.kill(os.getpid(), signal.SIGKILL)).install()
        return train_here(case.stage, config)

    with forked(work, case.processes, run.with_suffix(".log")) as children:
        return exit_codes(children)


def killed_after(case: Case, config: Path, run: Path, rank: int, seconds: float) -> list[int]:
    """Starts the run and kills process `rank` after so many seconds."""
    with forked(lambda _: train_here(case.stage, config), case.processes, run.with_suffix(".log")) as children:
        time.sleep(seconds)
        os.kill(children[rank], signal.SIGKILL)
        return exit_codes(children)


def same_as_undisturbed(case: Case, config: Path, run: Path) -> bool:
    """Runs to the end and compares."""
    with forked(lambda _: train_here(case.stage, config), case.processes, run.with_suffix(".log")) as children:
        codes = exit_codes(children)
    done = not any(codes) and final_hashes(run) == case.hashes and exported(run) == case.files
    if not done:
        print(f"{run}: {codes}\n{run.with_suffix('.log').read_text()[-4000:]}", file=sys.stderr)
    return done


def label_turns(case: Case, draw: random.Random) -> list[tuple[int, str]]:
    """Every point of every process once, in a random order."""
    turns = [(rank, label) for rank, trace in enumerate(case.points) for label in sorted(set(trace))]
    draw.shuffle(turns)
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many in all; every fifth at a random instant")
    parser.add_argument("--chain", type=int, default=4, help="kills of one run before it is finished and compared")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settle()
    draw = random.Random(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        report = kill_all(Path(name), args.kills, args.chain, draw)
    print(json.dumps({**report, "seconds": round(time.monotonic() - began, 1)}))
    sys.exit(0 if report["runs"] == report["equal"] else 1)


def kill_all(folder: Path, kills: int, chain: int, draw: random.Random) -> dict[str, object]:
    """Kills runs of all cases in turn until there were `kills`; returns the counts."""
    cases: list[Case] = []
    for stage, processes in CASES:
        first = cases[0].folder / "one_1_undisturbed" / "export" if cases else None
        cases.append(undisturbed(stage, processes, folder, first))
    turns = [label_turns(case, draw) for case in cases]
    counts: Counter[str] = Counter()
    labels: set[tuple[str, int, str]] = set()
    done = runs = equal = 0
    while done < kills:
        number = runs % len(cases)
        case, waiting = cases[number], turns[number]
        run, config = case.run(f"{runs:04d}")
        for _ in range(min(chain, kills - done)):
            if done % 5 == 4:
                rank, what = draw.randrange(case.processes), "a random instant"
                codes = killed_after(case, config, run, rank, draw.uniform(0.05, 0.9) * case.seconds)
            else:
                waiting.extend([] if waiting else label_turns(case, draw))
                rank, what = waiting.pop()
                codes = killed_at_point(case, config, run, rank, what, draw.choice((1, 1, 2)))
            if codes[rank] == -signal.SIGKILL:
                done += 1
                counts[f"stage {case.stage}, {case.processes} processes"] += 1
                labels.add((case.stage, rank, what))
        runs += 1
        equal += same_as_undisturbed(case, config, run)
        print(f"{done} kills, {equal} of {runs} runs equal", file=sys.stderr, flush=True)
        shutil.rmtree(run, ignore_errors=True)
    places = {(case.stage, rank, label) for case in cases for rank, t in enumerate(case.points) for label in set(t)}
    return {
        "kills": done,
        "runs": runs,
        "equal": equal,
        "points": len(places),
        "points_killed_at": len(labels & places),
        "kills_by_case": counts,
    }


if __name__ == "__main__":
    main()
