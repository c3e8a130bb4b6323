"""What is logged: speeds against a clock that is turned by hand, losses by timestep against a loop, trackers by name."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process
from PIL import Image

from ldm.config import AutoencoderTraining, ConfigError, TrainingConfig
from ldm.config.file import Launch
from ldm.training import launch, log
from ldm.training.log import TimestepLosses, TrainingLog, forget_after


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


class Clock:
    """Stands still unless it is turned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(log.time, "perf_counter", lambda: self.now)


def test_speeds_count_steps_and_not_validations(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    told = TrainingLog(accelerator, tmp_path, 0, 4, examples_per_step=8, quiet=True)
    for loss in (1.0, 3.0):
        with told.waiting():
            clock.now += 0.5
        with told.waiting():
            clock.now += 0.25
        clock.now += 1.25
        told.add({"loss": torch.tensor(loss)})
        clock.now += 50
    row = told.report(2, {"learning_rate": 1e-4})
    assert row["loss"] == 2.0 and row["learning_rate"] == 1e-4
    assert row["step_seconds"] == pytest.approx(2.0) and row["images_per_second"] == pytest.approx(4.0)
    assert row["data_wait_share"] == pytest.approx(0.375) and row["seconds"] == pytest.approx(104.0)
    assert 0.1 < row["peak_memory_gib"] < 100
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 2, **row}
    with told.waiting():
        clock.now += 1.0
    told.add({"loss": torch.tensor(5.0)})
    assert told.report(3)["loss"] == 5.0 and told.report(4)["images_per_second"] == 0.0


def test_losses_by_timestep_are_those_of_a_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    found, expected = TimestepLosses(1000, lambda value: value), {}
    for _ in range(3):
        loss, t = torch.rand(16, generator=rng), torch.randint(0, 700, (16,), generator=rng)
        found.add(loss, t)
        for value, time in zip(loss.tolist(), t.tolist(), strict=True):
            low = time // 100 * 100
            expected.setdefault(f"loss_t_{low}_{low + 99}", []).append(value)
    means = found.means()
    assert means == pytest.approx({name: sum(values) / len(values) for name, values in expected.items()}, rel=1e-5)
    assert found.means() == {}


def test_edges_and_flows_fall_into_their_tenth() -> None:
    found = TimestepLosses(1000, lambda value: value)
    found.add(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 99.99, 100.0, 1000.0]))
    assert found.means() == {"loss_t_0_99": 1.5, "loss_t_100_199": 3.0, "loss_t_900_999": 4.0}


def test_processes_are_weighed_by_their_examples() -> None:
    """Another process with three examples of loss 5 beside this one's single example of loss 1: the mean is 4."""
    found = TimestepLosses(10, lambda value: (value + torch.tensor([[15.0], [3.0]])) / 2, bins=1)
    found.add(torch.tensor([1.0]), torch.tensor([4]))
    assert found.means() == {"loss_t_0_9": 4.0}


def test_rows_after_the_state_and_a_torn_line_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 2, "lo')
    forget_after(path, 2)
    assert path.read_text() == '{"step": 1, "loss": 2}\n'


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(
        ConfigError, match=rf"{name} is not installed; `pip install {name}`, or one of none, tensorboard"
    ):
        launch.trackers(f"tensorboard,{name}")
    monkeypatch.setattr(launch, "get_available_trackers", lambda: ["tensorboard", name])
    assert launch.trackers(f"tensorboard,{name}") == ["tensorboard", name] and launch.trackers("none") == []


def test_an_unknown_tracker_is_refused_by_the_config() -> None:
    with pytest.raises(ConfigError, match=r"`training.report_to` has 'wandbb'; accepted: none, tensorboard, wandb"):
        TrainingConfig(report_to="tensorboard,wandbb")
    assert TrainingConfig(report_to="tensorboard,wandb").report_to == "tensorboard,wandb"


class Notebook(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "wandb"
    requires_logging_directory = False
    rows: ClassVar[list[tuple[int, dict[str, float]]]] = []
    images: ClassVar[list[str]] = []
    settings: ClassVar[dict[str, object]] = {}

    @on_main_process
    def __init__(self, run_name: str, **_: object) -> None:
        super().__init__()
        self.run_name = run_name

    @property
    def tracker(self) -> object:
        return self

    @on_main_process
    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.settings.update(values)

    @on_main_process
    def log(self, values: dict[str, float], step: int, **_: object) -> None:
        self.rows.append((step, values))

    def log_images(self, values: dict[str, object], step: int) -> None:
        self.images.extend(values)


class Ledger(Notebook):
    """One that takes no pictures, as accelerate's class for this one does not."""

    name = "mlflow"
    log_images = None  # type: ignore[assignment]


@pytest.fixture(params=[Notebook, Ledger], ids=lambda kind: kind.name)
def told(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TrainingLog, Path]]:
    """The log of a run that reports to such a tracker, and the run's folder."""
    from accelerate import tracking

    kind = request.param
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, kind.name, kind)
    available = [*tracking._available_trackers, tracking.LoggerType(kind.name)]
    monkeypatch.setattr(tracking, "_available_trackers", available)
    for name, empty in {"rows": [], "images": [], "settings": {}}.items():
        monkeypatch.setattr(kind, name, empty)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, log_with=launch.trackers(kind.name), project_dir=str(tmp_path))
    config = AutoencoderTraining(str(tmp_path / "run"), training=TrainingConfig(report_to=kind.name))
    run = launch.open_run(accelerator, config, Launch("auto", False, False))
    yield TrainingLog(accelerator, run.folder, 0, 1, 1, quiet=True), run.folder
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_tracker_of_accelerate_gets_the_rows_and_the_pictures_that_it_takes(
    told: tuple[TrainingLog, Path],
) -> None:
    written, folder = told
    written.write(1, {"loss": 0.5})
    written.show("samples", Image.new("RGB", (4, 4)), folder / "x.png", 1)
    tracker = written.accelerator.trackers[0]
    assert isinstance(tracker, Notebook) and tracker.rows == [(1, {"loss": 0.5})]
    assert tracker.images == ([] if isinstance(tracker, Ledger) else ["samples"]) and (folder / "x.png").is_file()
    assert tracker.run_name == "ldm" and tracker.settings["training.train_batch_size"] == 16


def test_a_disk_that_fails_costs_rows_and_pictures_and_no_more(
    told: tuple[TrainingLog, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written, folder = told
    said: list[str] = []
    monkeypatch.setattr(written, "say", said.append)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(written, "path", Path("/dev/full"))
        patched.setattr(Notebook, "log", full)
        written.write(1, {"loss": 0.5})
        patched.setattr(Image.Image, "save", full)
        written.show("samples", Image.new("RGB", (4, 4)), folder / "x.png", 1)
    assert [line.split(" could")[0] for line in said] == [
        "step 1: warning: a row of metrics",
        "step 1: warning: what the trackers were given",
        "step 1: warning: x.png",
    ]
    assert all("No space left on device" in line and "training goes on" in line for line in said)
    written.write(2, {"loss": 0.25})
    assert json.loads((folder / "metrics.jsonl").read_text()) == {"step": 2, "loss": 0.25} and len(said) == 3
