"""What a training must survive besides being killed: signals, numbers that are not finite, a failing disk, restarts.

    python -m benchmarks.survival signals     SIGTERM and Ctrl-C in 12 places
    python -m benchmarks.survival numbers     NaN and infinity in 12 places
    python -m benchmarks.survival disk        a disk that fails while a state is saved
    python -m benchmarks.survival restarts    both stages stopped after each of 24 steps, with several settings
    python -m benchmarks.survival processes   one process, then two, then one
    python -m benchmarks.survival looking     validation, pictures and logging at every step, and at none

Each prints one line of JSON and ends with 1 if something was not as it must be.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.forked import (
    STEPS,
    Points,
    exit_codes,
    exported,
    final_hashes,
    forked,
    settle,
    train_autoencoder,
    train_here,
    train_ldm,
    write_config,
)
from ldm.data import order
from ldm.training import run_dir
from ldm.training.precision import LossScaling
from ldm.training.stop import StopSignal

Patch = Callable[[], None]

SIGNALS = (
    ("one", "before the generator's loss", 2),
    ("one", "after backward", 3),
    ("one", "before the discriminator's loss", 2),
    ("one", "after the optimiser's step", 3),
    ("one", "after putting the average in place", 1),
    ("one", "before encoding", 1),
    ("one", "before fsync of state/.tmp_step_N/PART.safetensors", 2),
    ("one", "before rename to state/step_N", 2),
    ("one", "before rename to export", 1),
    ("two", "before encoding", 3),
    ("two", "after the denoising loss", 4),
    ("two", "after writing metrics", 3),
)


def signals(folder: Path) -> dict[str, int]:
    """A signal at each place: the exit code is the signal's, and the run that goes on from it ends at the same bits."""
    wanted = {stage: finished(folder, stage) for stage in ("one", "two")}
    counts = {"places": len(SIGNALS), "exit_codes": 0, "saved": 0, "equal": 0}
    for number, (stage, label, at) in enumerate(SIGNALS):
        chosen = (signal.SIGTERM, signal.SIGINT)[number % 2]
        run = folder / f"signal_{number}"
        config = write_config(stage, run, folder / "one" / "export")
        code = in_fork(partial(signalled, stage, config, run, label, at, chosen), run)
        counts["exit_codes"] += code == 128 + chosen
        before_training = label == "before encoding" and stage == "two"
        counts["saved"] += before_training or run_dir.RunDir(run).newest_intact() is not None
        counts["equal"] += in_fork(partial(train_here, stage, config), run) == 0 and outcome(run) == wanted[stage]
    return counts


def signalled(stage: str, config: Path, run: Path, label: str, at: int, number: int) -> int:
    """Trains, and sends itself a signal at a point."""
    Points(run, label, at, lambda: os.kill(os.getpid(), number)).install()
    return train_here(stage, config)


def poisons() -> Iterator[tuple[str, str, Patch]]:
    """(stage, where, patch): each makes something of step 4 not finite."""
    task, ldm_task = train_autoencoder.AutoencoderTask, train_ldm.TextToImageTask
    for value in (float("nan"), float("inf")):
        yield "one", f"the pictures are {value}", lambda v=value: poison_argument(task, "generator_loss", "image", v)
        yield "one", f"the encoder's gradient is {value}", lambda v=value: poison_gradient(v)
        yield "one", f"the discriminator's loss is {value}", lambda v=value: poison_discriminator(task, v)
        yield "one", f"the KL is {value}", lambda v=value: poison_terms(task, "kl", v)
        yield "two", f"the loss is {value}", lambda v=value: poison_loss(ldm_task, v)
        yield "two", f"the cached latents are {value}", lambda v=value: poison_argument(ldm_task, "loss", "moments", v)


def poison_argument(task: Any, method: str, field: str, value: float) -> None:
    inner = getattr(task, method)

    def poisoned(self: Any, batch: Any, step: int, *rest: Any) -> Any:
        bad = getattr(batch, field).clone()
        bad[0].view(-1)[0] = value
        return inner(self, replace(batch, **{field: bad}) if step == 4 else batch, step, *rest)

    setattr(task, method, poisoned)


def poison_gradient(value: float) -> None:
    inner, calls = LossScaling.clip, []

    def poisoned(self: LossScaling, optimizer: Any, parameters: list[Any], most: float | None) -> torch.Tensor:
        calls.append(len(parameters))
        if calls.count(calls[0]) == 5 and calls[-1] == calls[0]:
            parameters[3].grad.view(-1)[0] = value
        return inner(self, optimizer, parameters, most)

    LossScaling.clip = poisoned  # type: ignore[method-assign]


def poison_discriminator(task: Any, value: float) -> None:
    inner = task.discriminator_loss

    def poisoned(self: Any, batch: Any, image: Any, step: int) -> Any:
        loss, terms = inner(self, batch, image, step)
        return (loss * value if step == 4 else loss), terms

    task.discriminator_loss = poisoned


def poison_terms(task: Any, name: str, value: float) -> None:
    inner = task.generator_loss

    def poisoned(self: Any, batch: Any, step: int) -> Any:
        loss = inner(self, batch, step)
        return loss._replace(terms={**loss.terms, name: loss.terms[name] * value}) if step == 4 else loss

    task.generator_loss = poisoned


def poison_loss(task: Any, value: float) -> None:
    inner = task.loss

    def poisoned(self: Any, batch: Any, step: int, size: int) -> Any:
        loss = inner(self, batch, step, size)
        return loss._replace(loss=loss.loss * value) if step == 4 else loss

    task.loss = poisoned


def numbers(folder: Path) -> dict[str, int]:
    """Each poison: the run ends well, step 4 changes no weights, and no state on disk holds a number not finite."""
    finished(folder, "one")
    counts = {"places": 0, "ended": 0, "unchanged": 0, "finite": 0, "went_on": 0}
    for number, (stage, _, patch) in enumerate(poisons()):
        run = folder / f"poison_{number}"
        config = write_config(stage, run, folder / "one" / "export")
        counts["places"] += 1
        counts["ended"] += in_fork(partial(poisoned, stage, config, patch), run) == 0
        before, after, last = (weights_of(run, step) for step in (4, 5, 6))
        counts["unchanged"] += all(torch.equal(value, after[name]) for name, value in before.items())
        counts["went_on"] += any(not torch.equal(value, last[name]) for name, value in before.items())
        counts["finite"] += all(all(map(is_finite, weights_of(run, step).values())) for step in range(1, STEPS + 1))
    return counts


def poisoned(stage: str, config: Path, patch: Patch) -> int:
    """Trains with a poison, and keeps the state of every step."""
    patch()
    return train_here(stage, config, "--training.checkpointing_steps", "1", "--training.checkpoints_total_limit", "9")


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a state, by file and name."""
    files = sorted((run / "state" / f"step_{step:06d}").glob("*.safetensors"))
    return {f"{f.stem}/{name}": value for f in files for name, value in load_file(f).items()}


def is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all())


CALLS = {"write_text": 5, "save_file": 4, "sync_file": 4, "sync_folder": 1, "replace": 1}
"""How many of its calls each function fails in, one after the other."""


def disk(folder: Path, calls: Mapping[str, int] = CALLS) -> dict[str, int]:
    """Saving the second state fails in a different place each time; training goes on to the same bits."""
    wanted = {stage: finished(folder, stage) for stage in ("one", "two")}
    counts = {"faults": 0, "equal": 0, "nothing_left": 0, "told": 0}
    places = [(name, call) for name, most in calls.items() for call in range(most)]
    for stage, (name, call) in itertools.product(("one", "two"), places):
        run = folder / f"fault_{stage}_{name}_{call}"
        config = write_config(stage, run, folder / "one" / "export")
        counts["faults"] += 1
        counts["equal"] += (
            in_fork(partial(with_a_fault, stage, config, name, call), run) == 0 and outcome(run) == wanted[stage]
        )
        states = sorted(entry.name for entry in (run / "state").iterdir())
        counts["nothing_left"] += states == ["step_000002", "step_000006"]
        counts["told"] += "no state was saved" in run.with_suffix(".log").read_text()
    return counts


def with_a_fault(stage: str, config: Path, name: str, call: int) -> int:
    """Trains on a disk on which a function of `run_dir` fails in its `call`-th use for the state of step 4."""
    module = run_dir.os if name == "replace" else run_dir
    inner, uses = getattr(module, name), itertools.count()

    def failing(*args: Any) -> Any:
        if any("tmp_step_000004" in str(argument) for argument in args) and next(uses) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(*args)

    setattr(module, name, failing)
    return train_here(stage, config)


SETTINGS: tuple[tuple[str, int, int, float], ...] = (
    *(("one", *rest) for rest in itertools.product((0, 2), (1, 2), (0.9, 0.0))),
    *(("two", 0, *rest) for rest in itertools.product((1, 2), (0.9, 0.0))),
)
"""Stage, data-loading workers, micro-batches, and the average's decay, of which 0 is no average.

Stage two reads its latents from mapped files in the process itself, so it has no workers to vary.
"""


def restarts(folder: Path, settings: Sequence[tuple[str, int, int, float]] = SETTINGS) -> dict[str, int]:
    """Three epochs of 24 steps in one go and with a stop after every step: the same bits for every setting."""
    finished(folder, "one")
    counts = {"settings": 0, "starts": 0, "equal_in_stage_one": 0, "equal_in_stage_two": 0}
    for stage, workers, accumulation, decay in settings:
        argv = ["--training.max_train_steps", "24", "--training.gradient_accumulation_steps", str(accumulation)]
        argv += ["--training.train_batch_size", str(4 // accumulation), "--training.ema_decay", str(decay)]
        argv += ["--data.dataloader_num_workers", str(workers), "--data.max_train_samples", "32"]
        argv += ["--validation.steps", "24", "--training.checkpointing_steps", "24"]
        argv += ["--loss.discriminator_start", "10"] if stage == "one" else []
        whole, stopped = (folder / f"{name}_{stage}_{workers}_{accumulation}_{decay}" for name in ("whole", "stopped"))
        configs = [write_config(stage, run, folder / "one" / "export") for run in (whole, stopped)]
        code = in_fork(partial(train_here, stage, configs[0], *argv), whole)
        pieces = in_fork(partial(in_pieces, stage, configs[1], argv), stopped)
        counts["settings"] += 1
        counts["starts"] += 24
        same = (code, pieces) == (0, 0) and final_hashes(whole, 24) == final_hashes(stopped, 24)
        counts[f"equal_in_stage_{stage}"] += same
    return counts


def in_pieces(stage: str, config: Path, argv: list[str]) -> int:
    """Trains with a stop after every step, also the last, as a SIGTERM in it would cause."""

    def requested(self: StopSignal, _: Any) -> bool:
        self.number = signal.SIGTERM
        return True

    StopSignal.requested = requested  # type: ignore[method-assign]
    codes = [train_here(stage, config, *argv) for _ in range(24)]
    return 0 if codes == [143] * 24 else 1


def looking(folder: Path) -> dict[str, int]:
    """Both stages with everything that is only looked at switched on at every step, and off: the same weights."""
    finished(folder, "one")
    counts = {"stages": 0, "equal": 0}
    for stage in ("one", "two"):
        off = ["--validation.steps", "1000", "--training.logging_steps", "1000"]
        on = ["--validation.steps", "1", "--training.report_to", "tensorboard"]
        on += ["--validation.seed", "7"] if stage == "two" else []
        hashes = []
        for name, argv in (("on", on), ("off", off)):
            run = folder / f"{name}_{stage}"
            config = write_config(stage, run, folder / "one" / "export")
            in_fork(partial(train_here, stage, config, *argv), run)
            hashes.append(final_hashes(run))
        counts["stages"] += 1
        counts["equal"] += hashes[0] == hashes[1]
    return counts


def processes(folder: Path) -> dict[str, float]:
    """Two steps on one process, two on two, two on one: the samples of every step and the losses are one process's."""
    finished(folder, "one")
    report: dict[str, float] = {"stages": 0, "same_samples": 0, "largest_difference": 0.0}
    for stage in ("one", "two"):
        alone, run = folder / f"alone_{stage}", folder / f"elastic_{stage}"
        elastic(stage, alone, write_config(stage, alone, folder / "one" / "export"), 1, 0, STEPS)
        config = write_config(stage, run, folder / "one" / "export")
        for count, first, last in ((1, 0, 2), (2, 2, 4), (1, 4, STEPS)):
            elastic(stage, run, config, count, first, last)
        report["stages"] += 1
        report["same_samples"] += samples(run) == samples(alone)
        report["largest_difference"] = max(report["largest_difference"], loss_difference(run, alone))
    return report


def elastic(stage: str, run: Path, config: Path, count: int, first: int, last: int) -> None:
    """Trains from step `first` to step `last` on `count` processes, with a global batch of 8.

    Batch norm would see the rows of one process only, so the discriminator has group norm here.
    """
    argv = ["--training.train_batch_size", str(8 // count), "--allow-config-change"]
    argv += ["--discriminator.norm", "group"] if stage == "one" else []
    work = partial(noting_samples, run, stage, config, argv, last - first if last < STEPS else 0)
    with forked(lambda _: work(), count, run.with_suffix(".log")) as children:
        codes = exit_codes(children)
    if codes != [143 if last < STEPS else 0] * count:
        sys.exit(f"{run}: {codes}\n{run.with_suffix('.log').read_text()[-4000:]}")


def noting_samples(run: Path, stage: str, config: Path, argv: list[str], stop_after: int) -> int:
    """Trains for some steps, 0 for all; every process notes which sample stood at which row of which step."""
    inner, note, done = order.slot, run.with_suffix(f".{os.getpid()}.samples"), [0]
    requested = StopSignal.requested

    def noted(step: int, row: int, *rest: Any) -> Any:
        found = inner(step, row, *rest)
        with open(note, "a") as file:
            file.write(json.dumps([step, row, found.epoch, found.index]) + "\n")
        return found

    def stopping(self: StopSignal, accelerator: Any) -> bool:
        done[0] += 1
        self.number = signal.SIGTERM if done[0] == stop_after else self.number
        return requested(self, accelerator)

    order.slot, StopSignal.requested = noted, stopping  # type: ignore[method-assign]
    return train_here(stage, config, *argv)


def samples(run: Path) -> list[list[int]]:
    """(step, row, epoch, index) of everything that was used, in order; what was read ahead counts once."""
    notes = run.parent.glob(f"{run.name}.*.samples")
    return sorted({tuple(json.loads(line)) for note in notes for line in note.read_text().splitlines()})


def loss_difference(run: Path, other: Path) -> float:
    """The largest relative difference of a loss between two runs."""
    curves = []
    for folder in (run, other):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves.append({row["step"]: row.get("nll", row.get("loss")) for row in rows if "nll" in row or "loss" in row})
    if sorted(curves[0]) != sorted(curves[1]) or len(curves[0]) != STEPS:
        return float("inf")
    return max(abs(curves[0][step] / curves[1][step] - 1) for step in curves[0])


def finished(folder: Path, stage: str) -> tuple[dict[str, str], dict[str, bytes]]:
    """The outcome of the undisturbed run of a stage, in a folder of its name."""
    run = folder / stage
    if not run.exists():
        if stage == "two":
            finished(folder, "one")
        config = write_config(stage, run, folder / "one" / "export")
        if in_fork(partial(train_here, stage, config), run):
            sys.exit(run.with_suffix(".log").read_text())
    return outcome(run)


def outcome(run: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    return final_hashes(run), exported(run)


def in_fork(work: Callable[[], int], run: Path) -> int:
    """The exit code of work done in one forked process."""
    with forked(lambda _: work(), 1, run.with_suffix(".log")) as children:
        return exit_codes(children)[0]


KINDS: dict[str, tuple[Callable[[Path], dict[str, Any]], Callable[[dict[str, Any]], bool]]] = {
    "signals": (signals, lambda r: r["places"] == r["exit_codes"] == r["saved"] == r["equal"]),
    "numbers": (numbers, lambda r: len(set(r.values())) == 1),
    "disk": (disk, lambda r: len(set(r.values())) == 1),
    "restarts": (restarts, lambda r: r["equal_in_stage_one"] + r["equal_in_stage_two"] == r["settings"]),
    "looking": (looking, lambda r: r["equal"] == r["stages"]),
    "processes": (processes, lambda r: r["same_samples"] == r["stages"] and r["largest_difference"] < 1e-6),
}

QUICK: dict[str, Callable[[Path], dict[str, Any]]] = {
    "disk": partial(disk, calls=dict.fromkeys(CALLS, 1)),
    "restarts": partial(restarts, settings=(SETTINGS[0], SETTINGS[7], SETTINGS[-2])),
}
"""What CI runs of the two longest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--quick", action="store_true", help="fewer disk faults (10), fewer settings of restarts (3)")
    args = parser.parse_args()
    measure, good = KINDS[args.kind]
    if args.quick and args.kind in QUICK:
        measure = QUICK[args.kind]
    settle()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        report = measure(Path(name))
    print(json.dumps({**report, "seconds": round(time.monotonic() - began, 1)}))
    sys.exit(0 if good(report) else 1)


if __name__ == "__main__":
    main()
