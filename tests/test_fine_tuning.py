"""train_ldm.py from a pretrained model: whole, LoRA with prior preservation, textual inversion; killed and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from ldm import TextToImage
from ldm.config import ConfigError, LdmTraining
from ldm.config.file import load_config
from ldm.data.instances import InstanceSource
from ldm.data.latent_batches import batches_with_prior
from ldm.data.latents import LatentCache
from ldm.data.order import BatchPlan
from ldm.data.sources import open_source

ROOT = Path(__file__).parent.parent
STEPS = 6
TRAINING: dict[str, Any] = {
    "optimizer": {"learning_rate": 1.0e-2},
    "latents": {"batch_size": 8},
    "training": {
        "max_train_steps": STEPS,
        "train_batch_size": 4,
        "ema_decay": 0.9,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
    },
    "validation": {"steps": STEPS, "validation_prompts": ["a <heart>"], "num_inference_steps": 2},
}
LORA: dict[str, Any] = {
    "text_encoder": {"type": "pretrained", "trainable": True},
    "adapter": {"type": "lora", "rank": 2, "targets": ["to_q", "to_out.0", "conv1"]},
    "prior_preservation": {"class_prompts": ["a red star", "a blue circle"], "num_class_images": 5, "batch_size": 2},
}
INVERSION: dict[str, Any] = {"adapter": {"type": "textual_inversion", "token": "<heart>", "initializer": "star"}}
WHOLE: dict[str, Any] = {
    "text_encoder": {"type": "pretrained", "trainable": True},
    "diffusion": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "beta_end": 0.013,
    },
}
KINDS = {"lora": LORA, "inversion": INVERSION, "whole": WHOLE}
KILL = """
import os, signal
from ldm.training import {module}
original = {target}
def then_die(*args, **kwargs):
    result = original(*args, **kwargs)
    then_die.calls += 1
    if then_die.calls == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
then_die.calls = 0
{target} = then_die
"""
IN_THE_LOOP = KILL.format(module="ema", target="ema.Ema.update", calls=3)
WHILE_DRAWING = KILL.format(module="fine_tuning", target="fine_tuning.TextToImage.__call__", calls=2)


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of one subject, without captions."""
    folder = tmp_path_factory.mktemp("instances")
    for number, ground in enumerate(("white", "navy", "beige")):
        image = Image.new("RGB", (32, 32), ground)
        ImageDraw.Draw(image).chord((6, 4 + number, 26, 26), 0, 180, fill="crimson")
        image.save(folder / f"{number}.png")
    return folder


def train(
    run: Path, model: Path, instances: Path, kind: str, *argv: str, patch: str = ""
) -> subprocess.CompletedProcess[str]:
    data = {"source": str(instances), "instance_prompt": "a <heart>", "resolution": 32}
    content = {"output_dir": str(run), "pretrained": str(model), "data": data, **TRAINING, **KINDS[kind]}
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(content))
    argv = ("--config", str(path), *argv)
    code = f"{patch}\nimport runpy, sys\nsys.argv = {['train_ldm.py', *argv]!r}\nrunpy.run_path('train_ldm.py', run_name='__main__')"
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1,1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def written(run: Path) -> dict[str, bytes]:
    """The bytes of every weight that a run leaves, and of the hashes of its last state."""
    files = [*(run / "export").rglob("*.safetensors"), *(run / "adapter").rglob("*.safetensors")]
    return {
        str(f.relative_to(run)): f.read_bytes() for f in [*files, run / "state" / f"step_{STEPS:06d}" / "manifest.json"]
    }


@pytest.fixture(scope="module")
def runs(tiny_model_folder: Path, instances: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An undisturbed run of each kind."""
    root = tmp_path_factory.mktemp("fine_tuning")
    for kind in KINDS:
        done = train(root / kind, tiny_model_folder, instances, kind)
        assert done.returncode == 0, done.stderr
    return {kind: root / kind for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "patch"), [("lora", IN_THE_LOOP), ("lora", WHILE_DRAWING), ("inversion", IN_THE_LOOP)]
)
def test_a_killed_run_ends_at_the_same_bits(
    runs: dict[str, Path], tiny_model_folder: Path, instances: Path, tmp_path: Path, kind: str, patch: str
) -> None:
    killed = train(tmp_path / "run", tiny_model_folder, instances, kind, patch=patch)
    assert killed.returncode == -9, killed.stderr
    done = train(tmp_path / "run", tiny_model_folder, instances, kind)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "run") == written(runs[kind])


def test_the_state_of_an_adapter_is_small(runs: dict[str, Path]) -> None:
    sizes = {
        kind: sum(f.stat().st_size for f in (run / "state" / f"step_{STEPS:06d}").glob("*.safetensors"))
        for kind, run in runs.items()
    }
    assert sizes["lora"] < sizes["whole"] / 5 and sizes["inversion"] < sizes["whole"] / 100


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_and_nothing_else_differs_in_the_export(
    runs: dict[str, Path], tiny_model_folder: Path, kind: str
) -> None:
    files = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
    changed: dict[str, list[str]] = {}
    for part, stem in files.items():
        old, new = (load_file(f / part / f"{stem}.safetensors") for f in (tiny_model_folder, runs[kind] / "export"))
        assert old.keys() == new.keys()
        changed[part] = [n for n in old if old[n].shape != new[n].shape or not torch.equal(old[n], new[n])]
    assert changed["vae"] == []
    if kind == "inversion":
        assert changed == {"vae": [], "unet": [], "text_encoder": ["text_model.embeddings.token_embedding.weight"]}
    if kind == "lora":
        ends = (
            "to_q.weight",
            "to_out.0.weight",
            "conv1.weight",
            "q_proj.weight",
            "k_proj.weight",
            "v_proj.weight",
            "out_proj.weight",
        )
        assert all(name.endswith(ends) for part in changed.values() for name in part)
        assert changed["unet"] and changed["text_encoder"]
    if kind == "whole":
        assert len(changed["unet"]) > 100 and len(changed["text_encoder"]) > 10


def test_a_process_of_the_configs_own_replaces_the_models(runs: dict[str, Path], tiny_model_folder: Path) -> None:
    given = WHOLE["diffusion"]
    own, whole, lora = (
        json.loads((f / "scheduler" / "scheduler_config.json").read_text())
        for f in (tiny_model_folder, runs["whole"] / "export", runs["lora"] / "export")
    )
    assert whole == own | given and lora == own != whole


def test_the_exported_lora_on_the_model_is_the_exported_model(runs: dict[str, Path], tiny_model_folder: Path) -> None:
    pipe = TextToImage.from_pretrained(tiny_model_folder)
    pipe.load_lora(runs["lora"] / "adapter")
    exported = TextToImage.from_pretrained(runs["lora"] / "export").model.unet.state_dict()
    for name, value in pipe.model.unet.state_dict().items():
        torch.testing.assert_close(value, exported[name], rtol=0, atol=1e-6)


def test_class_images_are_the_models_own(runs: dict[str, Path], tiny_model_folder: Path) -> None:
    source = open_source(str(runs["lora"] / "class_images"), "train", 32)
    assert [source[i].captions for i in range(len(source))] == [("a red star",), ("a blue circle",)] * 2 + [
        ("a red star",)
    ]
    (expected,) = TextToImage.from_pretrained(tiny_model_folder)("a blue circle", seed=3)
    assert source[3].image.tobytes() == expected.tobytes()


def test_other_class_prompts_are_refused_and_a_dry_run_tells_the_sizes(
    runs: dict[str, Path], tiny_model_folder: Path, instances: Path
) -> None:
    other = ["--prior_preservation.class_prompts", "[a green star]", "--allow-config-change"]
    done = train(runs["lora"], tiny_model_folder, instances, "lora", *other)
    assert done.returncode == 2 and "holds class pictures whose prompts differ" in done.stderr
    done = train(runs["lora"], tiny_model_folder, instances, "lora", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "adapter 0.0" in done.stdout and "type: lora" in done.stdout and "s per 2 class pictures" in done.stdout


def test_pictures_of_a_killed_run_are_not_kept_under_other_prompts(
    tiny_model_folder: Path, instances: Path, tmp_path: Path
) -> None:
    killed = train(tmp_path / "run", tiny_model_folder, instances, "lora", patch=WHILE_DRAWING)
    assert killed.returncode == -9 and list((tmp_path / "run" / "class_images").rglob("*.png"))
    other = ["--prior_preservation.class_prompts", "[a green star]", "--allow-config-change"]
    done = train(tmp_path / "run", tiny_model_folder, instances, "lora", *other)
    assert done.returncode == 2 and "holds class pictures whose prompts differ" in done.stderr


def test_class_pictures_of_a_source_are_taken_as_they_are(
    tiny_model_folder: Path, instances: Path, tmp_path: Path
) -> None:
    given = "{class_source: shapes, num_class_images: 6}"
    done = train(tmp_path / "run", tiny_model_folder, instances, "lora", "--prior_preservation", given)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "class_images").exists()
    cache, source = LatentCache(tmp_path / "run" / "class_latents"), open_source("shapes", "train", 32)
    assert [cache.captions[i] for i in range(len(cache))] == [list(source[i].captions) for i in range(6)]


def test_the_pretrained_model_stays_the_teacher_of_class_pictures_when_a_killed_run_goes_on(
    tiny_model_folder: Path, instances: Path, tmp_path: Path, runs: dict[str, Path]
) -> None:
    for name, patches in {"whole": [""], "killed": [IN_THE_LOOP, ""]}.items():
        run, taught = tmp_path / name, ["--prior_preservation.target", "model"]
        codes = [train(run, tiny_model_folder, instances, "lora", *taught, patch=p).returncode for p in patches]
        assert codes == [-9, 0][-len(patches) :]
    assert written(tmp_path / "killed") == written(tmp_path / "whole") != written(runs["lora"])
    losses = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in (tmp_path / "whole", runs["lora"])
    ]
    assert losses[0]["loss"] < 0.8 * losses[1]["loss"], "the class pictures' part is zero at first"


def test_rows_of_instances_and_prior_alternate_whatever_the_processes() -> None:
    """The same global batch from one process and from two; weights give the sum of both means."""

    class Cache:
        def __init__(self, start: float, size: int) -> None:
            self.values = torch.arange(size).float() + start
            self.captions = [[f"{value:.0f}"] for value in self.values.tolist()]

        def __len__(self) -> int:
            return len(self.values)

        def shapes(self) -> tuple[list[tuple[int, int]], None]:
            return [(1, 1)], None

        def gather(self, indices: list[int]) -> torch.Tensor:
            return self.values[indices, None, None, None]

    instance: Any = Cache(0, 5)
    prior: Any = Cache(100, 7)
    (whole,) = batches_with_prior(instance, prior, 0.5, BatchPlan(8), 3, 2, 3)
    dealt = [next(batches_with_prior(instance, prior, 0.5, BatchPlan(4, 1, 2, rank), 3, 2, 3)) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.moments for part in dealt]), whole.moments)
    assert [row for part in dealt for row in part.rows] == list(whole.rows) == list(range(8))
    values = whole.moments.flatten()
    assert (values[0::2] < 5).all() and (values[1::2] >= 100).all()
    assert whole.captions == tuple(f"{value:.0f}" for value in values.tolist())
    assert whole.weights is not None
    mean = (torch.tensor(whole.weights) * values).mean()
    torch.testing.assert_close(mean, values[0::2].mean() + 0.5 * values[1::2].mean())


def test_instance_pictures_are_all_used_and_their_order_is_fixed(instances: Path, tmp_path: Path) -> None:
    source = InstanceSource(str(instances), "a <heart>")
    assert [source[i].captions for i in range(len(source))] == [("a <heart>",)] * 3
    assert source.size(1) == (32, 32) and source[0].key < source[1].key
    assert source.fingerprint() != InstanceSource(str(instances), "a star").fingerprint()
    with pytest.raises(ValueError, match="holds no pictures"):
        InstanceSource(str(tmp_path), "a <heart>")


def test_a_source_without_splits_can_be_used_whole(instances: Path, tmp_path: Path) -> None:
    rows = [{"file_name": str(file), "text": file.stem} for file in sorted(instances.glob("*.png"))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [len(open_source(str(tmp_path), split, 32)) for split in ("train", "validation", "all")] == [2, 1, 3]


REFUSED = {
    "neither model": ({"pretrained": None}, "one of the two must name a model"),
    "both": ({"autoencoder": "vae"}, "one of the two must name a model"),
    "adapter alone": (
        {"pretrained": None, "autoencoder": "vae", **INVERSION},
        "`adapter` is given without `pretrained`",
    ),
    "prior alone": (
        {"pretrained": None, "autoencoder": "vae", "prior_preservation": {"class_prompts": ["x"]}},
        "`prior_preservation` names class pictures without `pretrained`",
    ),
    "muon": ({**INVERSION, "optimizer": {"type": "muon"}}, "`optimizer.type` is muon with an `adapter`"),
    "rank": ({"adapter": {"type": "lora", "rank": 0}}, "`adapter.rank` is 0"),
    "type": ({"adapter": {"type": "lore"}}, "`adapter.type` is 'lore'; it must be one of lora, textual_inversion"),
    "token": ({"adapter": {"type": "textual_inversion", "token": "a heart", "initializer": "x"}}, "`adapter.token`"),
    "prompts twice": (
        {"prior_preservation": {"class_prompts": ["x"], "class_prompts_file": "y.txt"}},
        "`prior_preservation.class_prompts` is ('x',) and `prior_preservation.class_prompts_file` is 'y.txt'; give one",
    ),
    "captions of instances": (
        {"data": {"source": "x", "instance_prompt": "a sks dog", "caption_columns": ["title"]}},
        "`data.caption_columns` is given with `data.instance_prompt`",
    ),
    "taught token": (
        {**INVERSION, "prior_preservation": {"class_prompts": ["x"], "target": "model"}},
        "`prior_preservation.target` is model with `adapter.type` textual_inversion",
    ),
    "teacher without a class": ({"prior_preservation": {"target": "model"}}, "there are no class pictures"),
    "revision of nothing": (
        {"pretrained": None, "autoencoder": "vae", "revision": "main"},
        "`revision` is 'main' without `pretrained`",
    ),
    "odd batch": (
        {"training": {"train_batch_size": 3}, "prior_preservation": {"class_prompts": ["x"]}},
        "`training.train_batch_size` is 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_work_is_one_sentence(tmp_path: Path, case: str) -> None:
    changes, sentence = REFUSED[case]
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"output_dir": "out", "pretrained": "model", **changes}))
    with pytest.raises(ConfigError) as raised:
        load_config(LdmTraining, path)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--adapter.targets", "[to_z]"], "`adapter`: 'to_z' ends the name of no"),
        (["--unet.layers_per_block", "3"], "`unet` is given with `pretrained`"),
        (["--diffusion.prediction_type", "sample"], "`diffusion` is not that of the `pretrained` model"),
        (
            ["--adapter", "{}", "--prior_preservation.target", "model", "--diffusion.prediction_type", "sample"],
            "whose predictions `prior_preservation.target` model asks for",
        ),
        (
            ["--prior_preservation.class_prompts", "[]", "--prior_preservation.class_prompts_file", "no.txt"],
            "no.txt cannot be read",
        ),
        (["--pretrained", "nowhere/at/all"], "`pretrained`: nowhere/at/all is no model folder"),
        (["--text_encoder", "{type: clip}"], "`text_encoder.type` must be pretrained"),
    ],
)
def test_what_contradicts_the_model_is_one_sentence(
    tiny_model_folder: Path, instances: Path, tmp_path: Path, argv: list[str], sentence: str
) -> None:
    done = train(tmp_path / "run", tiny_model_folder, instances, "lora", *argv)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
