"""Both training scripts as a user starts them: to the end, killed, stopped, on two processes, and poisoned."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.cli import convert, data, generate
from ldm.data.shapes import ShapesDataset
from ldm.data.transforms import to_tensor
from ldm.networks import LatentClassifier
from ldm.pretrained import read_diffusion
from ldm.process import DiffusionConfig, FlowConfig, VeConfig

ROOT = Path(__file__).parent.parent
STEPS = 6
CLOCK = {"images_per_second", "step_seconds", "data_wait_share", "seconds", "peak_memory_gib"}
STAGE_ONE: dict[str, Any] = {
    "data": {"source": "shapes", "resolution": 32, "max_train_samples": 64, "max_validation_samples": 8},
    "autoencoder": {
        "block_out_channels": [16, 32, 32],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
    },
    "loss": {"perceptual": 0.0, "kl": 1.0e-3, "discriminator": 0.2, "discriminator_start": 3},
    "perceptual": {"type": "none"},
    "discriminator": {"num_layers": 1, "base_channels": 8, "norm": "group"},
    "optimizer": {"learning_rate": 1.0e-4, "lr_warmup_steps": 2},
    "statistics_samples": 64,
    "training": {
        "max_train_steps": STEPS,
        "train_batch_size": 8,
        "ema_decay": 0.9,
        "checkpointing_steps": 2,
        "logging_steps": 1,
    },
    "validation": {"steps": 3, "num_images": 4},
}
STAGE_TWO: dict[str, Any] = {
    "data": {"source": "shapes", "resolution": 32, "max_train_samples": 64},
    "latents": {"shard_size": 16, "batch_size": 8},
    "text_encoder": {
        "type": "clip_from_scratch",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 600,
        "max_length": 24,
    },
    "unet": {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
    },
    "objective": {"snr_gamma": 5.0},
    "optimizer": {"learning_rate": 1.0e-3, "lr_warmup_steps": 2},
    "training": {
        "max_train_steps": STEPS,
        "train_batch_size": 8,
        "ema_decay": 0.9,
        "checkpointing_steps": 2,
        "logging_steps": 1,
    },
    "validation": {"steps": 3, "validation_prompts": ["a red circle", "a blue square"], "num_inference_steps": 2},
}

AFTER_UPDATE = """
import os, signal
from ldm.training import ema
update = ema.Ema.update
def then_die(self):
    update(self)
    if self.updates == {updates} and os.environ.get("RANK", "{rank}") == "{rank}":
        os.kill(os.getpid(), signal.{signal})
ema.Ema.update = then_die
"""
WHILE_ENCODING = """
import os, signal
from ldm.data import latent_writing
write = latent_writing.write_text
def then_die(path, text):
    if path.name == "shard_00002.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)
latent_writing.write_text = then_die
"""
WHILE_SAVING = """
import os, signal
from ldm.training import run_dir
write = run_dir.write_text
def then_die(path, text):
    if path.parent.name == ".tmp_step_000004" and path.name == "optimizer.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)
run_dir.write_text = then_die
"""
POISONED_STAGE_ONE = """
import dataclasses
from ldm.tasks import autoencoder
loss = autoencoder.AutoencoderTask.generator_loss
def poisoned(self, batch, step):
    return loss(self, dataclasses.replace(batch, image=batch.image * (float("nan") if step == 4 else 1.0)), step)
autoencoder.AutoencoderTask.generator_loss = poisoned
"""
POISONED_STAGE_TWO = """
from ldm.tasks import text_to_image
loss = text_to_image.TextToImageTask.loss
def poisoned(self, batch, step, size):
    found = loss(self, batch, step, size)
    return found._replace(loss=found.loss * (float("nan") if step == 4 else 1.0))
text_to_image.TextToImageTask.loss = poisoned
"""
POISONED_SECOND_PROCESS = """
import os
from ldm.tasks import text_to_image
loss = text_to_image.TextToImageTask.loss
def poisoned(self, batch, step, size):
    found = loss(self, batch, step, size)
    bad = step == 4 and os.environ["RANK"] == "1"
    return found._replace(loss=found.loss * (float("nan") if bad else 1.0))
text_to_image.TextToImageTask.loss = poisoned
"""
SCALED = """
import torch
from ldm.training import sharding
prepare = sharding.ShardingAccelerator.prepare
def then_scale(self, network):
    self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    return prepare(self, network)
sharding.ShardingAccelerator.prepare = then_scale
"""
SHARES = """
import torch
from ldm.training import ema
def told(name, tensors):
    tensors = list(tensors)
    print("share of", name, sum(t.to_local().numel() for t in tensors) / sum(t.numel() for t in tensors))
step = torch.optim.AdamW.step
def step_then_tell(self):
    step(self)
    trained = self.param_groups[0]["params"]
    told("weights", trained)
    told("gradients", (p.grad for p in trained))
    for name in ("exp_avg", "exp_avg_sq"):
        told(name, (self.state[p][name] for p in trained))
torch.optim.AdamW.step = step_then_tell
update = ema.Ema.update
def update_then_tell(self):
    update(self)
    told("average", self.average.values())
ema.Ema.update = update_then_tell
"""


def environment(**more: str) -> dict[str, str]:
    """On the CPU; with one thread, but not as a plain 1, which is what the launcher writes for a user without a wish."""
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1,1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **cpu, **more}


def begin(script: str, argv: list[str], patch: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """Starts a script; `patch` is run before it in the same process."""
    code = (
        f"{patch}\nimport runpy, sys\nsys.argv = {[script, *argv]!r}\nrunpy.run_path({script!r}, run_name='__main__')"
    )
    command = ["-c", code] if patch else [script, *argv]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipes)


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train(script: str, *argv: str, patch: str = "") -> subprocess.CompletedProcess[str]:
    return finished(begin(script, list(argv), patch, environment()))


def train_on_two(script: str, *argv: str, patch: str = "", **more: str) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks as torchrun starts them, with `more` in their environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **more}
    ranks = [environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    return [finished(process) for process in [begin(script, list(argv), patch, env) for env in ranks]]


def accelerate_launch(script: str, *argv: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """The documented command for two processes on the CPU, as a user types it."""
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        *options,
        "--cpu",
        "--num_processes",
        "2",
        script,
        *argv,
    ]
    unset = {"ACCELERATE_USE_CPU", "OMP_NUM_THREADS"}
    env = {name: value for name, value in environment().items() if name not in unset}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def config_file(folder: Path, content: dict[str, Any]) -> str:
    """A config whose `output_dir` is `folder`, beside it."""
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps({"output_dir": str(folder), **content}))
    return str(path)


def metrics(run: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        known = found.setdefault(row.pop("step"), {})
        assert not known.keys() & row.keys(), f"{line} tells a step for the second time"
        known.update(row)
    return found


def weights(run: Path) -> dict[str, bytes]:
    """Names and contents of the exported tensors and their configs, and of the hashes of the last state."""
    kept = [f for f in (run / "export").rglob("*") if f.suffix in (".safetensors", ".json") and f.name != "ldm.json"]
    kept.append(run / "state" / f"step_{STEPS:06d}" / "manifest.json")
    assert len(kept) >= 3
    return {str(f.relative_to(run)): f.read_bytes() for f in kept}


def states(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "state").glob("step_*"))


def assert_same_curve(one: Path, other: Path, rtol: float = 1e-3) -> None:
    expected, found = metrics(one), metrics(other)
    assert sorted(expected) == sorted(found) == list(range(1, STEPS + 1))
    for step, row in expected.items():
        names = row.keys() - CLOCK
        assert names == found[step].keys() - CLOCK
        for name in names:
            assert found[step][name] == pytest.approx(row[name], rel=rtol, abs=1e-5), (step, name)


def assert_weights_close(one: Path, other: Path, part: str, atol: float) -> None:
    a, b = (load_file(run / "export" / part / "diffusion_pytorch_model.safetensors") for run in (one, other))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# --- stage one


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def autoencoder(workshop: Path) -> Path:
    """The undisturbed run of stage one."""
    done = train("train_autoencoder.py", "--config", config_file(workshop / "autoencoder", STAGE_ONE))
    assert done.returncode == 0, done.stderr
    return workshop / "autoencoder"


def test_stage_one_leaves_a_complete_run_folder(autoencoder: Path) -> None:
    names = {p.name for p in autoencoder.iterdir()}
    assert {"config.yaml", "state", "export", "samples", "logs", "metrics.jsonl"} <= names
    assert states(autoencoder) == ["step_000004", "step_000006"]
    assert sorted(p.name for p in (autoencoder / "samples").iterdir()) == ["step_000003.png", "step_000006.png"]
    assert list((autoencoder / "logs").rglob("events.out.tfevents*"))
    rows = metrics(autoencoder)
    assert sorted(rows) == list(range(1, STEPS + 1))
    assert all({"nll", "kl", "l1", "gradient_norm", "learning_rate", *CLOCK} <= row.keys() for row in rows.values())
    assert all(0 <= row["data_wait_share"] <= 1 for row in rows.values())
    assert ["discriminator" in rows[step] for step in rows] == [False] * 3 + [True] * 3
    assert "validation_psnr" in rows[3] and "validation_psnr" in rows[6]


def test_diffusers_reads_the_exported_autoencoder_with_centred_latents(autoencoder: Path) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(autoencoder / "export" / "vae")
    images = torch.stack([to_tensor(ShapesDataset("train", 64, 32)[i]["image"]) for i in range(64)])
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    assert posterior.mean.mean((0, 2, 3)).abs().max() < 1e-4
    variance = (posterior.mean.square() + posterior.var).mean() * vae.config.scaling_factor**2
    assert float(variance) == pytest.approx(1, abs=1e-3)


def test_stage_one_stopped_and_killed_ends_at_the_same_bits(autoencoder: Path, workshop: Path) -> None:
    run = workshop / "interrupted_autoencoder"
    command = ("train_autoencoder.py", "--config", config_file(run, STAGE_ONE))
    stopped = train(*command, patch=AFTER_UPDATE.format(updates=1, signal="SIGTERM", rank=0))
    assert (stopped.returncode, states(run)) == (143, ["step_000001"])
    killed = train(*command, patch=AFTER_UPDATE.format(updates=5, signal="SIGKILL", rank=0))
    assert killed.returncode == -9 and not (run / "export").exists()
    assert states(run) == ["step_000002", "step_000004"]
    resumed = train(*command)
    assert resumed.returncode == 0 and "resuming" in resumed.stdout and "at step 4" in resumed.stdout
    assert weights(run) == weights(autoencoder)
    assert_same_curve(autoencoder, run, rtol=1e-6)


def test_stage_one_on_two_processes_is_the_same_training(autoencoder: Path, workshop: Path) -> None:
    run = workshop / "two_autoencoders"
    argv = ("--config", config_file(run, STAGE_ONE), "--training.train_batch_size", "4")
    done = accelerate_launch("train_autoencoder.py", *argv)
    assert done.returncode == 0, done.stderr
    assert_same_curve(autoencoder, run)
    assert_weights_close(autoencoder, run, "vae", atol=1e-4)


@pytest.mark.parametrize(("stage", "script"), [("autoencoder", "train_autoencoder.py"), ("ldm", "train_ldm.py")])
def test_starting_a_finished_run_again_changes_nothing(request: pytest.FixtureRequest, stage: str, script: str) -> None:
    run: Path = request.getfixturevalue(stage)
    before, told = weights(run), (run / "metrics.jsonl").read_text()
    again = train(script, "--config", str(run.with_suffix(".yaml")))
    assert again.returncode == 0, again.stderr
    assert weights(run) == before and states(run) == ["step_000004", "step_000006"]
    assert (run / "metrics.jsonl").read_text() == told


def test_a_dry_run_of_stage_one_writes_nothing(workshop: Path) -> None:
    run = workshop / "dry_autoencoder"
    done = train("train_autoencoder.py", "--config", config_file(run, STAGE_ONE), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "block_out_channels:" in done.stdout and "M parameters" in done.stdout
    for phase in (" s per step, ", " s per step with the discriminator, ", " s per validation, ", " s per save; "):
        assert phase in done.stdout
    assert re.search(r"about [0-9.]+ min in all; peak memory [0-9.]+ GiB; a state takes [0-9.]+ MiB", done.stdout)
    assert not run.exists()


def test_an_unknown_key_ends_with_a_suggestion(workshop: Path) -> None:
    run = workshop / "unknown"
    argv = ["--config", config_file(run, STAGE_ONE), "--training.max_train_step", "5"]
    done = train("train_autoencoder.py", *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "did you mean `training.max_train_steps`?" in done.stderr
    assert not run.exists()


def test_a_damaged_picture_never_reaches_the_autoencoder(workshop: Path) -> None:
    run = workshop / "poisoned_autoencoder"
    argv = [
        "--config",
        config_file(run, STAGE_ONE),
        "--training.checkpointing_steps",
        "1",
        "--training.report_to",
        "none",
    ]
    done = train("train_autoencoder.py", *argv, "--training.checkpoints_total_limit", "9", patch=POISONED_STAGE_ONE)
    assert done.returncode == 0, done.stderr
    assert "1 updates skipped" in done.stderr + done.stdout
    assert_untouched(run, ("autoencoder", "discriminator", "ema", "optimizer", "discriminator_optimizer"))


def assert_untouched(run: Path, parts: tuple[str, ...]) -> None:
    """The state after the poisoned fifth step holds what the state before it held; then training went on."""
    before, poisoned, after = (run / "state" / f"step_{step:06d}" for step in (4, 5, 6))
    for part in parts:
        assert (poisoned / f"{part}.safetensors").read_bytes() == (before / f"{part}.safetensors").read_bytes()
        final = load_file(after / f"{part}.safetensors")
        assert all(torch.isfinite(value).all() for value in final.values())
        assert (after / f"{part}.safetensors").read_bytes() != (before / f"{part}.safetensors").read_bytes()
    assert None in metrics(run)[5].values() and metrics(run)[5]["skipped_updates"] == 1


PROJECTED = {
    **STAGE_ONE,
    "loss": {**STAGE_ONE["loss"], "discriminator_start": 1, "discriminator_warmup": 2},
    "discriminator": {"type": "projected", "base_channels": 8},
}


@pytest.fixture(scope="module")
def projected(workshop: Path) -> Path:
    """The undisturbed run of stage one against a discriminator on features, which warms up."""
    done = train("train_autoencoder.py", "--config", config_file(workshop / "projected", PROJECTED))
    assert done.returncode == 0, done.stderr
    return workshop / "projected"


def test_a_run_against_features_killed_in_its_warm_up_ends_at_the_same_bits(projected: Path, workshop: Path) -> None:
    rows = metrics(projected)
    assert ["discriminator" in rows[step] for step in rows] == [False] + [True] * 5
    assert ["adaptive_weight" in rows[step] for step in rows] == [False] * 3 + [True] * 3
    run = workshop / "interrupted_projected"
    command = ("train_autoencoder.py", "--config", config_file(run, PROJECTED))
    killed = train(*command, patch=AFTER_UPDATE.format(updates=3, signal="SIGKILL", rank=0))
    assert killed.returncode == -9 and states(run) == ["step_000002"]
    resumed = train(*command)
    assert resumed.returncode == 0 and "at step 2" in resumed.stdout, resumed.stderr
    assert weights(run) == weights(projected)


def test_a_run_against_features_on_two_processes_is_the_same_training(projected: Path, workshop: Path) -> None:
    run = workshop / "two_projected"
    command = ("--config", config_file(run, PROJECTED), "--training.train_batch_size", "4")
    done = train_on_two("train_autoencoder.py", *command)
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert_weights_close(projected, run, "vae", atol=1e-4)


def test_a_decoder_learns_the_errors_of_stage_two_and_survives_a_kill(
    ldm: Path, autoencoder: Path, workshop: Path
) -> None:
    """`ldm-data errors`, then the training: the same bits after a kill, nearly the same on two processes."""
    errors = workshop / "errors.safetensors"
    argv = ["errors", "shapes", "--model", str(ldm / "export"), "--output", str(errors), "--steps", "2"]
    data.run([*argv, "--max-samples", str(STAGE_ONE["data"]["max_train_samples"]), "--device", "cpu"])
    content = {key: value for key, value in STAGE_ONE.items() if key != "autoencoder"}
    content |= {"pretrained": str(autoencoder / "export"), "freeze_encoder": True, "latent_errors": str(errors)}
    whole, killed, two = (workshop / f"{name}_errors" for name in ("whole", "killed", "two"))
    done = train("train_autoencoder.py", "--config", config_file(whole, content))
    assert done.returncode == 0, done.stderr
    command = ("train_autoencoder.py", "--config", config_file(killed, content))
    assert train(*command, patch=AFTER_UPDATE.format(updates=3, signal="SIGKILL", rank=0)).returncode == -9
    resumed = train(*command)
    assert resumed.returncode == 0 and "at step 2" in resumed.stdout, resumed.stderr
    assert weights(killed) == weights(whole)
    ranks = train_on_two(
        "train_autoencoder.py", "--config", config_file(two, content), "--training.train_batch_size", "4"
    )
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    assert_weights_close(whole, two, "vae", atol=1e-4)
    without = train(*command[:2], config_file(workshop / "no_errors", content | {"latent_errors": None}))
    assert without.returncode == 0 and weights(workshop / "no_errors") != weights(whole)


def test_labels_are_one_training_on_two_processes(autoencoder: Path, workshop: Path) -> None:
    """Captions of shapes that name none of the labels, or several, count in no cut of the batch."""
    content = {key: value for key, value in STAGE_ONE.items() if key != "autoencoder"}
    labels = ["circle", "square", "star"]
    content |= {"pretrained": str(autoencoder / "export"), "latent_labels": {"names": labels}}
    content["discriminator"] = content["discriminator"] | {"labels": labels}
    whole, two = (workshop / f"{name}_labels" for name in ("whole", "two"))
    done = train("train_autoencoder.py", "--config", config_file(whole, content))
    assert done.returncode == 0, done.stderr
    for term in ("labelled", "discriminator_labelled"):
        assert any(0 < row[term] < 1 for row in metrics(whole).values() if term in row)
    ranks = train_on_two(
        "train_autoencoder.py", "--config", config_file(two, content), "--training.train_batch_size", "4"
    )
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    assert_weights_close(whole, two, "vae", atol=1e-4)
    content["latent_labels"] = {"names": ["circel", "squere"]}
    content["discriminator"] = content["discriminator"] | {"labels": ["circel", "squere"]}
    mistaken = train("train_autoencoder.py", "--config", config_file(workshop / "no_labels", content))
    assert mistaken.returncode == 0
    assert "no caption named exactly one of latent_labels.names or of discriminator.labels" in mistaken.stdout


# --- stage one with a codebook


CODEBOOK = {"num_vq_embeddings": 24, "update": "ema", "decay": 0.9}


@pytest.fixture(scope="module")
def vq_autoencoder(workshop: Path) -> Path:
    """The undisturbed run of stage one with a codebook that moving averages move."""
    content = {**STAGE_ONE, "codebook": CODEBOOK}
    done = train("train_autoencoder.py", "--config", config_file(workshop / "vq_autoencoder", content))
    assert done.returncode == 0, done.stderr
    return workshop / "vq_autoencoder"


def test_a_codebook_run_logs_its_codes_and_diffusers_reads_it(vq_autoencoder: Path) -> None:
    rows = metrics(vq_autoencoder)
    assert all({"codebook", "commitment", "perplexity", "codes_used"} <= row.keys() for row in rows.values())
    assert {"codebook_used", "codebook_perplexity", "validation_psnr"} <= rows[STEPS].keys()
    vae = diffusers.VQModel.from_pretrained(vq_autoencoder / "export" / "vae")
    images = torch.stack([to_tensor(ShapesDataset("train", 64, 32)[i]["image"]) for i in range(64)])
    with torch.no_grad():
        latents = vae.encode(images).latents
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert float(latents.square().mean()) * vae.config.scaling_factor**2 == pytest.approx(1, abs=1e-2)


def test_a_killed_codebook_run_ends_at_the_same_bits(vq_autoencoder: Path, workshop: Path) -> None:
    run = workshop / "interrupted_vq"
    command = ("train_autoencoder.py", "--config", config_file(run, {**STAGE_ONE, "codebook": CODEBOOK}))
    killed = train(*command, patch=AFTER_UPDATE.format(updates=5, signal="SIGKILL", rank=0))
    assert killed.returncode == -9 and states(run) == ["step_000002", "step_000004"]
    resumed = train(*command)
    assert resumed.returncode == 0 and "at step 4" in resumed.stdout, resumed.stderr
    assert weights(run) == weights(vq_autoencoder)


def test_a_codebook_run_on_two_processes_is_the_same_training(vq_autoencoder: Path, workshop: Path) -> None:
    run = workshop / "two_vq"
    command = ("--config", config_file(run, {**STAGE_ONE, "codebook": CODEBOOK}), "--training.train_batch_size", "4")
    done = train_on_two("train_autoencoder.py", *command)
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert_weights_close(vq_autoencoder, run, "vae", atol=1e-4)


def test_stage_two_trains_on_the_latents_of_a_codebook(vq_autoencoder: Path, workshop: Path, tmp_path: Path) -> None:
    run = workshop / "vq_ldm"
    content = {**STAGE_TWO, "autoencoder": str(vq_autoencoder / "export")}
    done = train("train_ldm.py", "--config", config_file(run, content), "--training.max_train_steps", "2")
    assert done.returncode == 0, done.stderr
    generate.run(["-p", "a red circle", "-m", str(run / "export"), "-o", str(tmp_path / "out.png"), "--json"])
    assert Image.open(tmp_path / "out.png").size == (32, 32)


# --- stage two


@pytest.fixture(scope="module")
def stage_two(autoencoder: Path) -> dict[str, Any]:
    return {"autoencoder": str(autoencoder / "export"), **STAGE_TWO}


@pytest.fixture(scope="module")
def ldm(workshop: Path, stage_two: dict[str, Any]) -> Path:
    """The undisturbed run of stage two."""
    done = train("train_ldm.py", "--config", config_file(workshop / "ldm", stage_two))
    assert done.returncode == 0, done.stderr
    return workshop / "ldm"


def test_stage_two_reads_cached_encodings_of_a_frozen_t5(
    workshop: Path, stage_two: dict[str, Any], tiny_t5_folder: Path, tmp_path: Path
) -> None:
    run = workshop / "t5"
    text = {"type": "t5", "path": str(tiny_t5_folder), "max_length": 20}
    latents = STAGE_TWO["latents"] | {"cache_text": True}
    config = config_file(run, stage_two | {"text_encoder": text, "latents": latents})
    done = train("train_ldm.py", "--config", config)
    assert done.returncode == 0, done.stderr
    assert (run / "latents" / "text" / "manifest.json").exists() and "captions are longer" in done.stdout
    report = generate.run(["-p", "a red circle", "-m", str(run / "export"), "-o", str(tmp_path / "t5.png"), "--json"])
    assert Path(report["images"][0]).is_file()
    made, ahead = tmp_path / "latents", workshop / "t5_ahead"
    argv = ["cache", "shapes", "--max-samples", "64", "--resolution", "32", "--model", stage_two["autoencoder"]]
    argv += ["--shard-size", "16", "--batch-size", "8", "--text-encoder", json.dumps(text), "--output", str(made)]
    data.run([*argv, "--device", "cpu"])
    times = {file: file.stat().st_mtime_ns for file in (made / "text").iterdir()}
    config = config_file(ahead, stage_two | {"text_encoder": text, "latents": latents | {"folder": str(made)}})
    assert train("train_ldm.py", "--config", config).returncode == 0
    assert times == {file: file.stat().st_mtime_ns for file in (made / "text").iterdir()}, "encoded a second time"
    shards = [load_file(folder / "text" / "shard_00000.safetensors") for folder in (run / "latents", made)]
    torch.testing.assert_close(*shards)


def test_stage_two_writes_a_model_that_the_command_draws_with(ldm: Path, tmp_path: Path) -> None:
    assert states(ldm) == ["step_000004", "step_000006"]
    assert sorted(p.name for p in (ldm / "samples").iterdir()) == ["step_000003.png", "step_000006.png"]
    rows = metrics(ldm)
    assert all({"loss", "gradient_norm", "learning_rate", *CLOCK} <= row.keys() for row in rows.values())
    assert "validation_loss" in rows[3] and "validation_loss" in rows[6]
    for row in rows.values():
        parts = [value for name, value in row.items() if name.startswith("loss_t_")]
        assert parts and min(parts) <= row["loss"] <= max(parts)
    assert (ldm / "export/README.md").read_text().startswith("# ")
    report = generate.run(["-p", "a red circle", "-m", str(ldm / "export"), "-o", str(tmp_path / "out.png"), "--json"])
    assert report["settings"]["steps"] == 2 and report["settings"]["sampler"] == "ddim"
    assert Image.open(tmp_path / "out.png").size == (32, 32)


def test_stage_two_stopped_and_killed_ends_at_the_same_bits(
    ldm: Path, workshop: Path, stage_two: dict[str, Any]
) -> None:
    run = workshop / "interrupted_ldm"
    command = ("train_ldm.py", "--config", config_file(run, stage_two))
    encoding = train(*command, patch=WHILE_ENCODING)
    assert encoding.returncode == -9 and (run / "latents/shard_00002.safetensors").exists()
    assert sorted(p.name for p in (run / "latents").glob("shard*.json")) == ["shard_00000.json", "shard_00001.json"]
    stopped = train(*command, patch=AFTER_UPDATE.format(updates=1, signal="SIGTERM", rank=0))
    assert (stopped.returncode, states(run)) == (143, ["step_000001"])
    saving = train(*command, patch=WHILE_SAVING)
    assert saving.returncode == -9 and (run / "state/.tmp_step_000004").exists()
    assert states(run) == ["step_000001", "step_000002"]
    resumed = train(*command)
    assert resumed.returncode == 0 and "at step 2" in resumed.stdout
    assert weights(run) == weights(ldm)
    assert_same_curve(ldm, run, rtol=1e-6)


def test_stage_two_on_two_processes_is_the_same_training(ldm: Path, workshop: Path, stage_two: dict[str, Any]) -> None:
    run = workshop / "two_ldms"
    command = ("train_ldm.py", "--config", config_file(run, stage_two), "--training.train_batch_size", "4")
    stopped = train_on_two(*command, patch=AFTER_UPDATE.format(updates=3, signal="SIGTERM", rank=1))
    assert [d.returncode for d in stopped] == [143, 143], stopped[0].stderr + stopped[1].stderr
    assert states(run) == ["step_000002", "step_000003"]
    done = accelerate_launch(*command)
    assert done.returncode == 0, done.stderr
    assert_same_curve(ldm, run)
    assert_weights_close(ldm, run, "unet", atol=1e-4)


def test_accumulating_two_batches_is_the_same_training(ldm: Path, workshop: Path, stage_two: dict[str, Any]) -> None:
    run = workshop / "accumulated"
    sizes = ["--training.train_batch_size", "4", "--training.gradient_accumulation_steps", "2"]
    done = train("train_ldm.py", "--config", config_file(run, stage_two), *sizes)
    assert done.returncode == 0, done.stderr
    assert_same_curve(ldm, run)
    assert_weights_close(ldm, run, "unet", atol=1e-4)


def test_a_dry_run_of_stage_two_writes_nothing(
    workshop: Path, stage_two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scratch = workshop / "dry_ldm", workshop / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    done = train("train_ldm.py", "--config", config_file(run, stage_two), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "max_train_samples: 64" in done.stdout and "U-Net 0.20 M" in done.stdout
    assert " s per 64 encoded pictures, " in done.stdout and " s per validation, " in done.stdout
    assert not run.exists() and list(scratch.iterdir()) == []


# --- stage two, sharded over two processes


def train_sharded(*argv: str, patch: str = "") -> list[subprocess.CompletedProcess[str]]:
    return train_on_two("train_ldm.py", *argv, patch=patch, ACCELERATE_USE_FSDP="true")


@pytest.fixture(scope="module")
def sharded(workshop: Path, stage_two: dict[str, Any]) -> Path:
    """The undisturbed run of stage two with sharded weights, started by the documented command."""
    argv = ("--config", config_file(workshop / "sharded", stage_two), "--training.train_batch_size", "4")
    done = accelerate_launch("train_ldm.py", *argv, options=["--config_file", "train_configs/accelerate/fsdp.yaml"])
    assert done.returncode == 0, done.stderr
    return workshop / "sharded"


def test_sharded_weights_are_the_same_training(ldm: Path, sharded: Path) -> None:
    """Only the order differs in which the gradients of 8 rows are summed; 1e-6 was seen in the weights."""
    assert_same_curve(ldm, sharded)
    assert_weights_close(ldm, sharded, "unet", atol=1e-4)
    assert sorted(weights(ldm)) == sorted(weights(sharded)) and states(ldm) == states(sharded)
    for name in ("step_000003.png", "step_000006.png"):
        one, other = (to_tensor(Image.open(run / "samples" / name)) for run in (ldm, sharded))
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)


def test_a_sharded_run_stopped_and_killed_ends_at_the_same_bits(
    sharded: Path, workshop: Path, stage_two: dict[str, Any]
) -> None:
    run = workshop / "interrupted_sharded"
    command = ("--config", config_file(run, stage_two), "--training.train_batch_size", "4")
    stopped = train_sharded(*command, patch=AFTER_UPDATE.format(updates=1, signal="SIGTERM", rank=1))
    assert [d.returncode for d in stopped] == [143, 143], stopped[0].stderr + stopped[1].stderr
    killed = train_sharded(*command, patch=AFTER_UPDATE.format(updates=5, signal="SIGKILL", rank=1))
    assert [d.returncode for d in killed] == [1, -9] and "was lost" in killed[0].stderr
    assert states(run) == ["step_000002", "step_000004"]
    resumed = train_sharded(*command)
    assert [d.returncode for d in resumed] == [0, 0], resumed[0].stderr + resumed[1].stderr
    assert weights(run) == weights(sharded)
    assert_same_curve(sharded, run, rtol=1e-6)


@pytest.mark.parametrize("first", ["sharded", "whole"])
def test_a_run_goes_on_with_its_weights_sharded_or_whole(
    ldm: Path, workshop: Path, stage_two: dict[str, Any], first: str
) -> None:
    """The sharded half also recomputes its layers and sums two micro-batches, which changes nothing either."""
    run = workshop / f"first_{first}"
    command = ("--config", config_file(run, stage_two), "--allow-config-change")
    stop = AFTER_UPDATE.format(updates=3, signal="SIGTERM", rank=0)

    def half(patch: str, code: int) -> None:
        if (first == "sharded") == (code == 143):
            sizes = ["--training.train_batch_size", "2", "--training.gradient_accumulation_steps", "2"]
            done = train_sharded(*command, *sizes, "--training.gradient_checkpointing", "true", patch=patch)
        else:
            done = [train("train_ldm.py", *command, patch=patch)]
        assert {d.returncode for d in done} == {code}, done[0].stderr

    half(stop, 143)
    assert states(run) == ["step_000002", "step_000003"]
    half("", 0)
    assert_same_curve(ldm, run)
    assert_weights_close(ldm, run, "unet", atol=1e-4)


def test_a_loss_that_is_not_finite_on_one_process_stops_the_update_of_all_shards(
    ldm: Path, workshop: Path, stage_two: dict[str, Any]
) -> None:
    """With a loss scale besides, which as a power of two changes no bit."""
    run = workshop / "poisoned_sharded"
    argv = ["--config", config_file(run, stage_two), "--training.train_batch_size", "4"]
    argv += ["--training.checkpointing_steps", "1", "--training.checkpoints_total_limit", "9"]
    done = train_sharded(*argv, patch=POISONED_SECOND_PROCESS + SCALED + SHARES)
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "1 updates skipped" in done[0].stderr + done[0].stdout
    assert_untouched(run, ("network", "ema", "optimizer"))
    assert all(
        metrics(run)[step]["loss"] == pytest.approx(metrics(ldm)[step]["loss"], rel=1e-3) for step in range(1, 5)
    )
    for rank in done:
        shares = dict(re.findall(r"share of (\w+) ([0-9.]+)", rank.stdout))
        assert sorted(shares) == ["average", "exp_avg", "exp_avg_sq", "gradients", "weights"]
        assert all(float(share) == pytest.approx(0.5, abs=0.02) for share in shares.values())


def test_muon_orthogonalises_whole_matrices_of_shards(workshop: Path, stage_two: dict[str, Any]) -> None:
    one, two = workshop / "muon", workshop / "sharded_muon"
    muon = ("--optimizer.type", "muon", "--training.max_train_steps", "2")
    single = train("train_ldm.py", "--config", config_file(one, stage_two), *muon)
    done = train_sharded("--config", config_file(two, stage_two), *muon, "--training.train_batch_size", "4")
    assert [d.returncode for d in (single, *done)] == [0, 0, 0], single.stderr + done[0].stderr + done[1].stderr
    assert_weights_close(one, two, "unet", atol=1e-4)


def test_what_cannot_be_sharded_ends_with_one_sentence(workshop: Path, stage_two: dict[str, Any]) -> None:
    run = workshop / "unsharded"
    done = train_sharded("--config", config_file(run, stage_two), "--training.torch_compile", "true")
    assert [d.returncode for d in done] == [2, 2] and not run.exists()
    assert all("`training.torch_compile` is true" in d.stderr and d.stderr.count("\n") == 1 for d in done)


def test_a_non_finite_loss_never_reaches_the_network(workshop: Path, stage_two: dict[str, Any]) -> None:
    run = workshop / "poisoned_ldm"
    argv = [
        "--config",
        config_file(run, stage_two),
        "--training.checkpointing_steps",
        "1",
        "--training.report_to",
        "none",
    ]
    done = train("train_ldm.py", *argv, "--training.checkpoints_total_limit", "9", patch=POISONED_STAGE_TWO)
    assert done.returncode == 0, done.stderr
    assert "1 updates skipped" in done.stderr + done.stdout
    assert_untouched(run, ("network", "ema", "optimizer"))


def test_a_size_that_would_fail_at_the_first_validation_fails_at_once(
    workshop: Path, stage_two: dict[str, Any]
) -> None:
    run = workshop / "odd_size"
    done = train("train_ldm.py", "--config", config_file(run, stage_two), "--data.resolution", "36")
    assert done.returncode == 2 and not (run / "latents").exists()
    assert done.stderr == "error: `data.resolution` is 36; this autoencoder and U-Net need a multiple of 8\n"


# --- averages made afterwards


@pytest.fixture(scope="module")
def snapshots(workshop: Path, tiny_model_folder: Path) -> Path:
    """A run that kept its averaged weights, killed after its second state and resumed."""
    content = {**STAGE_TWO, "autoencoder": str(tiny_model_folder)}
    content["training"] = {**STAGE_TWO["training"], "ema_snapshots": True, "checkpoints_total_limit": 1}
    command = ("train_ldm.py", "--config", config_file(workshop / "snapshots", content))
    assert train(*command, patch=AFTER_UPDATE.format(updates=5, signal="SIGKILL", rank=0)).returncode == -9
    done = train(*command)
    assert done.returncode == 0, done.stderr
    return workshop / "snapshots"


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_average_of_the_same_decay_is_the_one_that_training_made(snapshots: Path, tmp_path: Path) -> None:
    assert [p.name for p in sorted((snapshots / "ema").iterdir())] == ["step_000002", "step_000004", "step_000006"]
    assert states(snapshots) == ["step_000006"]
    convert.run([str(snapshots), str(tmp_path / "same"), "--to", "diffusers", "--ema-decay", "0.9"])
    expected = unet_of(snapshots / "export")
    for name, value in unet_of(tmp_path / "same").items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)


def test_another_average_is_another_model_that_draws(
    snapshots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert.run([str(snapshots), str(tmp_path / "other"), "--to", "diffusers", "--ema-sigma-rel", "0.01"])
    assert "3 snapshots give this average with an error of" in capsys.readouterr().err
    told = json.loads((tmp_path / "other" / "ldm.json").read_text())["average"]
    assert told["sigma_rel"] == 0.01 and told["snapshots"] == 3 and told["error"] > 0.2
    one, other = unet_of(snapshots / "export"), unet_of(tmp_path / "other")
    assert any(not torch.equal(one[name], other[name]) for name in one)
    report = generate.run(
        ["-m", str(tmp_path / "other"), "-o", str(tmp_path), "--prompt", "a red circle", "--steps", "2", "--json"]
    )
    assert len(report["images"]) == 1


def test_snapshots_follow_the_state_that_is_resumed(snapshots: Path, workshop: Path) -> None:
    """One that is missing is written again, one of a later step removed; a damaged one is named."""
    run = workshop / "branched"
    shutil.copytree(snapshots, run)
    shutil.copytree(run / "ema" / "step_000006", run / "ema" / "step_000009")
    shutil.rmtree(run / "ema" / "step_000006")
    content = json.loads(snapshots.with_suffix(".yaml").read_text()) | {"output_dir": str(run)}
    run.with_suffix(".yaml").write_text(json.dumps(content))
    done = train("train_ldm.py", "--config", str(run.with_suffix(".yaml")), "--allow-config-change")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in sorted((run / "ema").iterdir())] == ["step_000002", "step_000004", "step_000006"]
    again, first = (load_file(folder / "ema" / "step_000006" / "ema.safetensors") for folder in (run, snapshots))
    assert all(torch.equal(again[name], first[name]) for name in first)
    (run / "ema" / "step_000004" / "ema.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step_000004/ema\.safetensors is missing or damaged; remove this snapshot"):
        convert.run([str(run), str(workshop / "x"), "--to", "diffusers", "--ema-sigma-rel", "0.1"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "single-file", "--ema-decay", "0.9"], "--ema-decay writes a folder, .* does not go with --to single"),
        (["--to", "diffusers", "--ema-decay", "1"], r"--ema-decay: a decay of 1 lies outside \[0.9, 1\)"),
        (["--to", "diffusers", "--ema-decay", "0.5"], r"--ema-decay: a decay of 0.5 lies outside \[0.9, 1\)"),
        (["--to", "diffusers", "--ema-sigma-rel", "0.4"], r"--ema-sigma-rel: a relative width of 0.4 lies outside \(0"),
        (["--to", "diffusers", "--ema-sigma-rel", "0.1", "--variant", "fp16"], "does not go with --variant"),
    ],
)
def test_averages_that_cannot_be_made_are_refused(
    argv: list[str], message: str, snapshots: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        convert.run([str(snapshots), str(tmp_path / "x.safetensors"), *argv])
    assert not list(tmp_path.iterdir())


def test_a_folder_without_snapshots_is_named(tiny_model_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    for source, message in ((tiny_model_folder, "is no run folder of train_ldm.py"), (undisturbed, "has no snapshots")):
        with pytest.raises(ValueError, match=message):
            convert.run([str(source), str(tmp_path / "x"), "--to", "diffusers", "--ema-decay", "0.9"])


def test_stage_one_keeps_no_snapshots(workshop: Path) -> None:
    argv = ("--config", config_file(workshop / "one", STAGE_ONE), "--training.ema_snapshots", "true")
    done = train("train_autoencoder.py", *argv)
    assert done.returncode == 2 and "`training.ema_snapshots` is true; it is for train_ldm.py" in done.stderr


# --- other processes and objectives


@pytest.fixture(scope="module")
def learned(tiny_model_folder: Path) -> dict[str, Any]:
    """A learned variance over 10 timesteps, so that importance sampling leaves its uniform start within the run."""
    return {
        **STAGE_TWO,
        "autoencoder": str(tiny_model_folder),
        "unet": {**STAGE_TWO["unet"], "out_channels": 8},
        "diffusion": {"num_train_timesteps": 10, "variance_type": "learned_range"},
        "objective": {"timestep_sampling": "importance", "noise_offset": 0.1, "input_perturbation": 0.1},
        "training": {**STAGE_TWO["training"], "train_batch_size": 32},
        "validation": {"num_inference_steps": 2, "steps": STEPS, "sampler": "ddpm"},
    }


@pytest.fixture(scope="module")
def undisturbed(workshop: Path, learned: dict[str, Any]) -> Path:
    done = train("train_ldm.py", "--config", config_file(workshop / "learned", learned))
    assert done.returncode == 0, done.stderr
    return workshop / "learned"


def test_importance_sampling_resumes_with_what_it_had_learnt(
    undisturbed: Path, workshop: Path, learned: dict[str, Any]
) -> None:
    run = workshop / "stopped"
    command = ("train_ldm.py", "--config", config_file(run, learned))
    stopped = train(*command, patch=AFTER_UPDATE.format(updates=5, signal="SIGTERM", rank=0))
    assert stopped.returncode == 143 and states(run)[-1] == "step_000005"
    resumed = train(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert weights(run) == weights(undisturbed)
    assert read_diffusion(run / "export") == DiffusionConfig(num_train_timesteps=10, variance_type="learned_range")


def test_importance_sampling_on_two_processes_is_the_same_training(
    undisturbed: Path, workshop: Path, learned: dict[str, Any]
) -> None:
    run = workshop / "two"
    done = train_on_two("train_ldm.py", "--config", config_file(run, learned), "--training.train_batch_size", "16")
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert_same_curve(undisturbed, run)


@pytest.fixture(scope="module")
def flow(workshop: Path, tiny_model_folder: Path) -> Path:
    config = {
        **STAGE_TWO,
        "autoencoder": str(tiny_model_folder),
        "data": {**STAGE_TWO["data"], "shapes_per_image": 1},
        "diffusion": {"type": "flow", "shift": 2.0},
        "objective": {"timestep_sampling": "logit_normal", "time_shift": 2.0},
        "validation": {"num_inference_steps": 2, "steps": STEPS, "sampler": "euler"},
    }
    done = train("train_ldm.py", "--config", config_file(workshop / "flow", config))
    assert done.returncode == 0, done.stderr
    return workshop / "flow"


def test_a_flow_is_trained_and_drawn(flow: Path, tmp_path: Path) -> None:
    assert read_diffusion(flow / "export") == FlowConfig("flow", shift=2.0)
    index = json.loads((flow / "export/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    report = generate.run(["-p", "two", "-m", str(flow / "export"), "-o", str(tmp_path / "flow.png"), "--json"])
    assert report["settings"]["sampler"] == "euler" and (tmp_path / "flow.png").is_file()


def test_a_variance_exploding_process_is_trained_and_drawn(
    workshop: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = {
        **STAGE_TWO,
        "autoencoder": str(tiny_model_folder),
        "diffusion": {"type": "ve", "num_train_timesteps": 100},
        "objective": {"timestep_sampling": "importance"},
        "validation": {"num_inference_steps": 2, "steps": STEPS, "sampler": "heun"},
    }
    run = workshop / "ve"
    done = train("train_ldm.py", "--config", config_file(run, config))
    assert done.returncode == 0, done.stderr
    assert read_diffusion(run / "export") == VeConfig("ve", num_train_timesteps=100)
    for sampler in ("langevin", "predictor_corrector"):
        target = tmp_path / f"{sampler}.png"
        flags = ["--sampler", sampler, "--steps", "3"]
        generate.run(["-p", "two", "-m", str(run / "export"), "-o", str(target), "--json", *flags])
        assert target.is_file()


def test_a_classifier_is_trained_on_the_latents_of_a_run_and_followed(
    flow: Path, workshop: Path, tmp_path: Path
) -> None:
    config = {
        "model": str(flow / "export"),
        "latents": str(flow / "latents"),
        "classifier": {"labels": ["circle", "square", "triangle", "star"], "block_out_channels": [16, 16]},
        "optimizer": STAGE_TWO["optimizer"],
        "training": STAGE_TWO["training"],
    }
    run = workshop / "classifier"
    done = train("train_classifier.py", "--config", config_file(run, config))
    assert done.returncode == 0, done.stderr
    assert {"loss", "accuracy", "gradient_norm"} <= metrics(run)[STEPS].keys()
    assert LatentClassifier.from_pretrained(run / "export").config.labels[3] == "star"
    flags = ["--classifier", str(run / "export"), "--class-label", "star", "--classifier-scale", "3"]
    generate.run(["-p", "two", "-m", str(flow / "export"), "-o", str(tmp_path / "star.png"), "--json", *flags])
    assert (tmp_path / "star.png").is_file()
    other = config_file(workshop / "unknown", config)
    unknown = train("train_classifier.py", "--config", other, "--classifier.labels", "[circle, dog]")
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: `classifier.labels` has 'dog', but no caption")
