"""Trainings that are killed, signalled, poisoned and moved between processes end as if nothing had happened.

The work is in `benchmarks/`, which forks after its imports; here it runs with few enough repetitions for every commit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def run(module: str, *argv: str) -> dict[str, Any]:
    """The last line that a benchmark prints, which must have ended well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1,1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", f"benchmarks.{module}", *argv]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_twenty_kills_change_nothing() -> None:
    report = run("kills", "--kills", "20")
    assert report["kills"] == 20 and report["equal"] == report["runs"]
    assert len(report["kills_by_case"]) == 4 and report["points"] >= 300
    assert report["points_killed_at"] == 16 and report["random_instants"] == 4


def test_a_signal_in_twelve_places_saves_and_leaves_with_its_code() -> None:
    report = run("survival", "signals")
    assert report["places"] == report["exit_codes"] == report["saved"] == report["equal"] == 12


def test_what_is_not_finite_in_twelve_places_is_never_stored() -> None:
    report = run("survival", "numbers")
    assert report["places"] == report["ended"] == report["unchanged"] == report["finite"] == report["went_on"] == 12


def test_a_failing_disk_costs_one_state() -> None:
    report = run("survival", "disk", "--quick")
    assert report["faults"] == report["equal"] == report["nothing_left"] == report["told"] == 10


def test_one_then_two_then_one_process_is_one_training() -> None:
    report = run("survival", "processes")
    assert report["same_samples"] == report["stages"] == 2 and report["largest_difference"] < 1e-6


def test_a_stop_after_every_step_changes_nothing() -> None:
    report = run("survival", "restarts", "--quick")
    assert report["settings"] == 3 and report["starts"] == 72
    assert report["equal_in_stage_one"] == 2 and report["equal_in_stage_two"] == 1


def test_looking_at_a_training_does_not_change_it() -> None:
    report = run("survival", "looking")
    assert report["equal"] == report["stages"] == 2
