"""SIGKILL at every named point of a training and at random instants; the weights must come out as if nothing happened.

    python -m benchmarks.kills

Both stages, one and two processes. A run is killed a few times, each time started again, and once it is finished the
hashes of raw weights, average, discriminator and optimisers, and the exported files, are compared with an undisturbed
run's. Every point comes first, each in every process that passes it, and random instants after that. There are 350
points, and as many kills hit them all; without `--kills` there are 100 more, at random instants. Where the kills do not
suffice for all points, a fifth of them is at random instants. Prints one line of JSON, and ends with 1 if a run came
out otherwise or, with kills enough for all points, one was not hit.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.forked import Points, exit_codes, exported, final_hashes, forked, settle, train_here, write_config

CASES = [(stage, processes) for processes in (1, 2) for stage in ("one", "two")]
INSTANTS = 100
"""How many kills come at random instants after those at the points."""

Point = tuple[int, str]
"""A process and the name of a place in what it does."""


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

    @property
    def name(self) -> str:
        return f"stage {self.stage}, {self.processes} processes"

    def run(self, name: str) -> tuple[Path, Path]:
        run = self.folder / f"{self.stage}_{self.processes}_{name}"
        return run, write_config(self.stage, run, self.autoencoder)


def undisturbed_cases(folder: Path) -> list[Case]:
    """Every case; stage two trains on the autoencoder of the first."""
    cases: list[Case] = []
    for stage, processes in CASES:
        autoencoder = cases[0].folder / "one_1_undisturbed" / "export" if cases else None
        cases.append(undisturbed(stage, processes, folder, autoencoder))
    return cases


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


def points_of(case: Case) -> set[Point]:
    """Every point of every process."""
    return {(rank, label) for rank, trace in enumerate(case.points) for label in trace}


def passing(case: Case, point: Point, draw: random.Random) -> tuple[float, int]:
    """One passing of a point, by chance: how far in the run it is, from 0 to 1, and which of the passings."""
    rank, label = point
    trace = case.points[rank]
    places = [place for place, name in enumerate(trace) if name == label]
    at = draw.randrange(len(places))
    return places[at] / len(trace), at + 1


@dataclass
class Tally:
    """What was killed where, and what became of it; `waiting` are the points of each case that are still to come."""

    waiting: list[list[Point]]
    missed: set[tuple[int, Point]] = field(default_factory=set)
    by_case: Counter[str] = field(default_factory=Counter)
    at_points: int = 0
    at_instants: int = 0
    runs: int = 0
    equal: int = 0

    @property
    def kills(self) -> int:
        return self.at_points + self.at_instants

    def chain(self, number: int, most: int) -> list[Point]:
        """The next points for one run of a case. One that was missed before has a run of its own."""
        waiting, taken = self.waiting[number], []
        while waiting and len(taken) < most and (number, waiting[-1]) not in self.missed:
            taken.append(waiting.pop())
        return taken or [waiting.pop()]

    def miss(self, number: int, points: list[Point]) -> None:
        """Puts points that were not passed behind all others; a second time they are given up."""
        again = [point for point in points if (number, point) not in self.missed]
        self.missed |= {(number, point) for point in again}
        self.waiting[number][:0] = again


def kill_at_points(
    case: Case, number: int, run: Path, config: Path, most: int, tally: Tally, draw: random.Random
) -> None:
    """Kills one run at up to `most` points, in the order in which a run passes them.

    The first is chosen among all passings of its point. The others are killed at the first passing after the restart,
    which is not over then, as it comes later than what was killed before.
    """
    turns = sorted((*passing(case, point, draw), point) for point in tally.chain(number, most))
    for place, (_, at, (rank, label)) in enumerate(turns):
        codes = killed_at_point(case, config, run, rank, label, 1 if place else at)
        if codes[rank] != -signal.SIGKILL:
            tally.miss(number, [point for *_, point in turns[place:]])
            return
        tally.at_points += 1
        tally.by_case[case.name] += 1


def kill_at_instants(case: Case, run: Path, config: Path, most: int, tally: Tally, draw: random.Random) -> None:
    """Starts one run `most` times and kills it wherever it is; it may be at its end before."""
    for _ in range(most):
        rank = draw.randrange(case.processes)
        codes = killed_after(case, config, run, rank, draw.uniform(0.05, 0.9) * case.seconds)
        tally.at_instants += codes[rank] == -signal.SIGKILL
        tally.by_case[case.name] += codes[rank] == -signal.SIGKILL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help=f"in all; default: one a point, and {INSTANTS} at random instants")
    parser.add_argument("--chain", type=int, default=4, help="kills of one run before it is finished and compared")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settle()
    draw = random.Random(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        report = kill_all(Path(name), args.kills, args.chain, draw)
    print(json.dumps({**report, "seconds": round(time.monotonic() - began, 1)}))
    sys.exit(0 if report["runs"] == report["equal"] and not report["points_never_hit"] else 1)


def kill_all(folder: Path, kills: int | None, chain: int, draw: random.Random) -> dict[str, Any]:
    """Kills runs of all cases in turn until there were `kills`; returns the counts."""
    cases = undisturbed_cases(folder)
    points = [draw.sample(sorted(points_of(case)), len(points_of(case))) for case in cases]
    total = sum(map(len, points))
    kills = total + INSTANTS if kills is None else kills
    all_points = kills >= total
    at_points = total if all_points else kills - kills // 5
    tally = Tally(points)
    while tally.kills < kills:
        left = at_points - tally.at_points
        open_cases = [number for number, waiting in enumerate(tally.waiting) if waiting and left]
        number = (open_cases or range(len(cases)))[tally.runs % len(open_cases or cases)]
        case = cases[number]
        run, config = case.run(f"{tally.runs:04d}")
        if open_cases:
            kill_at_points(case, number, run, config, min(chain, left), tally, draw)
        else:
            kill_at_instants(case, run, config, min(chain, kills - tally.kills), tally, draw)
        tally.runs += 1
        tally.equal += same_as_undisturbed(case, config, run)
        print(f"{tally.kills} kills, {tally.equal} of {tally.runs} runs equal", file=sys.stderr, flush=True)
        shutil.rmtree(run, ignore_errors=True)
    return {
        "kills": tally.kills,
        "runs": tally.runs,
        "equal": tally.equal,
        "points": total,
        "points_killed_at": tally.at_points,
        "points_never_hit": total - tally.at_points if all_points else 0,
        "random_instants": tally.at_instants,
        "kills_by_case": tally.by_case,
    }


if __name__ == "__main__":
    main()
