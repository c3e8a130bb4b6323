"""`ldm-evaluate --suite generation`: the report, its page and pictures, sweeps, processes and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from autoencoder import AutoencoderKL
from ldm.cli import evaluate, evaluate_generation
from ldm.data.shapes import ShapesDataset
from ldm.evaluation.generation import draw, judge_pictures
from ldm.evaluation.label_reader import LabelReader, pixels

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 1},
}
METRICS = ("frechet_", "kid_", "precision_", "recall_")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve and six scenes in parquet, each with a shade that a classifier can read: the half inverted ones."""
    folder = tmp_path_factory.mktemp("data")
    columns = Features({"image": ImageFeature(), "text": Value("string"), "shade": Value("string")})
    for split, count in (("train", 12), ("validation", 6)):
        scenes = [row | {"dark": i % 2} for i, row in enumerate(ShapesDataset(split, count, 32))]
        rows = {
            "image": [row["image"].point(lambda v, d=row["dark"]: v // 8 if d else 255 - v // 8) for row in scenes],
            "text": [row["captions"][0] for row in scenes],
            "shade": [("bright", "dark")[row["dark"]] for row in scenes],
        }
        Dataset.from_dict(rows, columns).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of random weights, small enough to judge a picture in a millisecond."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def command(tiny_model_folder: Path, data: Path, clip: str) -> list[str]:
    return [
        "--suite", "generation", "--model", str(tiny_model_folder), "--data", str(data), "--num-samples", "6",
        "--features", f"open_clip:{clip}", "--clip", clip, "--candidates", "3", "--bootstrap", "20",
        "--steps", "1", "--batch-size", "2", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture
def refused(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command with other flags, expects exit code 2 and returns the sentence on stderr."""

    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ldm-evaluate", *command, *argv])
        with pytest.raises(SystemExit) as stopped:
            evaluate.main()
        said = capsys.readouterr()
        assert stopped.value.code == 2 and said.out == "" and "Traceback" not in said.err
        last = said.err.splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return run


def test_the_report_its_page_and_its_pictures(
    command: list[str],
    clip: str,
    data: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new" / "folder"
    report = evaluate.run([*command, "--label-column", "shade", "--output", str(output)])
    said = capsys.readouterr()
    assert json.loads((output / "report.json").read_text()) == report
    names = [f"{metric}open_clip:{clip}" for metric in METRICS]
    names += ["near_duplicates", "clip_score", "r_precision", "shade_accuracy"]
    assert list(report["metrics"]) == names == list(report["intervals"])
    for name, (low, high) in report["intervals"].items():
        assert low <= report["metrics"][name] <= high
    assert (report["suite"], report["num_samples"], len(report["runs"])) == ("generation", 6, 1)
    run = {"guidance_scale": 3.0, "steps": 1, "metrics": report["metrics"], "intervals": report["intervals"]}
    assert report["runs"] == [run]
    assert set(report["reference"]["metrics"]) == {"clip_score", "r_precision", "shade_accuracy"}
    assert report["reference"]["metrics"]["shade_accuracy"] > 0.8  # the untrained decoder leaves little of a shade
    assert report["settings"] == {
        "model": str(tiny_model_folder), "revision": None, "data": str(data), "split": "validation",
        "caption_split": "validation", "caption_column": "text", "resolution": 32, "sampler": "ddim", "seed": 0, "features": f"open_clip:{clip}", "feature_dimensions": 16,
        "clip": clip, "candidates": 3, "best_of": 1, "ranker": None, "ranker_weights": None, "num_reference": 6, "num_training": 12, "label_column": "shade",
        "bootstrap": 20, "skipped": 0,
    }  # fmt: skip
    page = (output / "report.md").read_text()
    assert page.strip() == said.out.strip() and "| metric | guidance 3, 1 steps | reference |" in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert sorted(pictures) == sorted(path.name for path in output.glob("*.png"))
    assert pictures == ["report_samples.png", "report_copies.png"]
    with Image.open(output / "report_copies.png") as sheet:
        assert sheet.width == 6 * (96 + 8) + 8
    assert "warning: 6 pictures are fewer than the 16 features" in said.err


def test_the_captions_of_another_split_are_drawn_beside_the_same_reference(
    command: list[str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = list[Any]()

    def drawn(pipe: Any, prompts: Any, *rest: Any, **settings: Any) -> Any:
        found = draw(pipe, prompts, *rest, **settings)
        sets.append(found.judged)
        return found

    monkeypatch.setattr(evaluate_generation, "draw", drawn)
    flags = ["--num-samples", "8", "--num-reference", "6", "--label-column", "shade", "--caption-split", "train"]
    report = evaluate.run([*command, *flags])
    rows = load_dataset("parquet", data_files=str(data / "train.parquet"), split="train")[:8]
    assert (sets[0].captions, sets[0].labels) == (rows["text"], rows["shade"])
    assert (report["settings"]["caption_split"], report["settings"]["num_reference"]) == ("train", 6)


def test_the_best_of_several_by_the_judge_itself_fits_its_caption_better(command: list[str], clip: str) -> None:
    alone = evaluate.run(command)
    ranked = evaluate.run([*command, "--best-of", "5", "--ranker", clip])
    assert ranked["metrics"]["clip_score"] > alone["metrics"]["clip_score"]
    assert (ranked["settings"]["best_of"], ranked["settings"]["ranker"]) == (5, clip)
    assert ranked["reference"] == alone["reference"]


def test_a_sweep_measures_every_pair_and_draws_a_chart(command: list[str], tmp_path: Path) -> None:
    sweep = ["--guidance-scale", "1", "4", "--num-inference-steps", "1", "2", "--output", str(tmp_path / "s.json")]
    report = evaluate.run([*command, *sweep, "--num-training", "0"])
    assert [(run["guidance_scale"], run["steps"]) for run in report["runs"]] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert report["metrics"] == report["runs"][0]["metrics"] != report["runs"][3]["metrics"]
    assert "near_duplicates" not in report["metrics"]
    ends = [f"samples_guidance_{g}_steps_{s}" for g in (1, 4) for s in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["s.json", "s.md", "s_sweep.png", *(f"s_{end}.png" for end in ends)]
    )
    alone = evaluate.run([*command, "--guidance-scale", "4", "--steps", "2", "--num-training", "0"])
    assert alone["metrics"] == report["runs"][3]["metrics"]


def test_two_processes_report_what_one_does(command: list[str], tmp_path: Path) -> None:
    alone = evaluate.run([*command, "--label-column", "shade", "--output", str(tmp_path / "alone")])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    argv = [sys.executable, "-m", "ldm.cli.evaluate", *command, "--label-column", "shade"]
    ranks = [
        subprocess.Popen(
            [*argv, "--output", str(tmp_path / "both")],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "| metric |" in said[0][0] and said[1][0] == "" and "warning" not in said[1][1]
    both = json.loads((tmp_path / "both" / "report.json").read_text())
    assert both["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)
    assert both["settings"] == alone["settings"]
    for name in ("report_samples.png", "report_copies.png"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_the_clip_alone_over_the_built_in_shapes(command: list[str]) -> None:
    report = evaluate.run([*command, "--data", "shapes", "--features", "none", "--num-reference", "4"])
    assert set(report["metrics"]) == {"clip_score", "r_precision"}
    assert report["settings"]["num_reference"] == 4 and report["settings"]["num_training"] == 0
    assert report["settings"]["feature_dimensions"] is None


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--candidates", "32"], "R-precision among 32 captions needs so many different ones, and 2 at least; got 6"),
        (["--candidates", "1"], "--candidates is 1; it must be at least 2"),
        (["--bootstrap", "-1"], "--bootstrap is -1; it must be at least 0"),
        (["--num-reference", "0"], "--num-reference is 0; it must be at least 1"),
        (["--features", "none", "--clip", "none"], "--features and --clip are none, so there is nothing to measure"),
        (["--features", "none", "--label-column", "shade"], "--label-column trains a classifier"),
        (["--num-training", "0", "--label-column", "shade"], "--label-column trains a classifier"),
        (["--label-column", "style"], "--label-column is style, and "),
        (["--data", "shapes", "--label-column", "style"], "--label-column is style, and shapes has no such column"),
        (["--features", "resnet"], "--features resnet: not one of efficientnet_lite0"),
        (["--features", "timm:resnet18"], "--features timm:resnet18: `weights` must be a local checkpoint"),
        (["--clip", "local-dir:./absent"], "--clip local-dir:./absent: ./absent holds no open_clip_config.json"),
        (["--clip", "ViT-B-32"], "--clip ViT-B-32: its `weights` must be a local checkpoint, got no file"),
        (["--steps", "5", "5000"], "steps is 5000; this model accepts 1 to 1000"),
        (["--resolution", "30"], "height is 30; it must be a positive multiple of"),
        (["--sampler", "magic"], "magic"),
        (["--num-samples", "3"], "precision and recall need more than 3 pictures on each side, got 3 and 3"),
        (["--split", "absent"], "absent"),
        (["--caption-split", "missing"], "missing"),
        (["--output", "report.png"], "--output is report.png; it must be a .json file or a folder"),
    ],
)
def test_bad_input_is_one_sentence(argv: list[str], sentence: str, refused: Any) -> None:
    assert sentence in refused(*argv)


def test_the_shapes_suite_takes_one_setting(refused: Any) -> None:
    assert "--steps has 2 values; the shapes suite takes one" in refused("--suite", "shapes", "--steps", "1", "2")


# --- what the judges saw, kept


def test_a_second_run_reads_what_the_judges_saw_and_reports_the_same(
    command: list[str], data: Path, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, copied = tmp_path / "cache", tmp_path / "moved data"
    flags = [*command, "--label-column", "shade", "--feature-cache", str(cache)]
    first = evaluate.run([*flags, "--output", str(tmp_path / "first")])
    assert len(list(cache.iterdir())) == 3  # validation and training pictures, and the classifier of labels
    judged: list[str] = []

    def judge(pictures: Any, *rest: Any) -> Any:
        judged.append(pictures.source.name)
        return judge_pictures(pictures, *rest)

    monkeypatch.setattr(evaluate_generation, "judge_pictures", judge)
    second = evaluate.run([*flags, "--output", str(tmp_path / "second")])
    assert judged == [] and second == first
    pages = [(tmp_path / name / "report_copies.png").read_bytes() for name in ("first", "second")]
    assert pages[0] == pages[1]
    shutil.copytree(data, copied)
    flags[flags.index(str(data))] = str(copied)
    assert evaluate.run(flags)["metrics"] == first["metrics"] and judged == []


def test_other_data_other_judges_and_damaged_files_are_judged_anew(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    flags = [*command, "--num-training", "0", "--feature-cache", str(cache)]
    first = evaluate.run(flags)
    (file,) = cache.iterdir()
    for more in (["--num-reference", "5"], ["--clip", "none"], ["--split", "train"]):
        before = set(cache.iterdir())
        evaluate.run([*flags, *more])
        assert len(set(cache.iterdir()) - before) == 1, more
    file.write_bytes(file.read_bytes()[:-100])
    assert evaluate.run(flags)["metrics"] == first["metrics"]
    assert evaluate.run(flags)["metrics"] == first["metrics"]


def test_labels_are_read_from_what_this_autoencoder_makes_of_the_data(
    command: list[str], tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt, read, decoded = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    fit, forward, decode = LabelReader.fit, LabelReader.forward, AutoencoderKL.reconstruct

    def fitted(self: LabelReader, images: torch.Tensor, *rest: Any) -> None:
        learnt.append(images)
        fit(self, images, *rest)
        read.clear()

    def reading(self: LabelReader, x: torch.Tensor) -> torch.Tensor:
        read.append(x)
        return forward(self, x)

    def reconstructed(self: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
        decoded.append(decode(self, x).clamp(-1, 1))
        return decoded[-1]

    monkeypatch.setattr(LabelReader, "fit", fitted)
    monkeypatch.setattr(LabelReader, "forward", reading)
    monkeypatch.setattr(AutoencoderKL, "reconstruct", reconstructed)
    cache, other = tmp_path / "cache", tmp_path / "other"
    flags = [*command, "--label-column", "shade", "--feature-cache", str(cache)]
    first = evaluate.run(flags)
    assert len(decoded) == 6 + 3 and torch.equal(learnt[0], torch.cat([pixels(x) for x in decoded[:6]]))
    assert len(read) == 3 + 3 and all(map(torch.equal, read[:3], decoded[6:]))  # the reference, then what was drawn
    assert evaluate.run(flags) == first and len(learnt) == 1
    shutil.copytree(tiny_model_folder, other)
    vae = AutoencoderKL.from_pretrained(other / "vae")
    vae.decoder.conv_out.weight.data += 1
    vae.save_pretrained(other / "vae")
    before = set(cache.iterdir())
    evaluate.run([str(other) if flag == str(tiny_model_folder) else flag for flag in flags])
    assert len(learnt) == 2 and len(set(cache.iterdir()) - before) == 1
    (file,) = set(cache.iterdir()) - before
    file.write_bytes(file.read_bytes()[:-100])
    evaluate.run([str(other) if flag == str(tiny_model_folder) else flag for flag in flags])
    assert len(learnt) == 3
