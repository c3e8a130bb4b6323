"""`ldm-evaluate`: the report, the picture beside it, and what it says about bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from ldm.cli import evaluate
from ldm.data.shapes import ShapesDataset

PLAIN = ["--suite", "reconstruction", "--perceptual", "none", "--features", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five captioned 32 px pictures for validation, of which the second is damaged."""
    split = tmp_path_factory.mktemp("data") / "validation"
    split.mkdir()
    for index, row in enumerate(ShapesDataset("validation", 5, 32)):
        row["image"].save(split / f"{index}.png")
        (split / f"{index}.txt").write_text(row["captions"][0])
    (split / "1.png").write_bytes(b"not a picture")
    return split.parent


@pytest.fixture
def refused(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command, expects exit code 2 and returns the sentence on stderr."""

    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ldm-evaluate", "--model", str(tiny_model_folder), *argv])
        with pytest.raises(SystemExit) as stopped:
            evaluate.main()
        said = capsys.readouterr()
        assert stopped.value.code == 2 and said.out == ""
        last = said.err.splitlines()[-1]
        assert last.startswith("error: ") and "Traceback" not in said.err
        return last

    return run


def test_the_reconstruction_suite_in_full(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "report.json"
    report = evaluate.run(
        ["--model", str(tiny_model_folder), "--suite", "reconstruction", "--num-samples", "3", "--batch-size", "2"]
        + ["--output", str(output)]
    )
    assert json.loads(output.read_text()) == report
    assert (report["suite"], report["num_samples"]) == ("reconstruction", 3)
    assert set(report["metrics"]) == {
        "psnr", "psnr_median", "psnr_worst", "ssim", "l1", "perceptual_efficientnet_lite2", "frechet_efficientnet_lite2",
    }  # fmt: skip
    assert all(isinstance(value, float) for value in report["metrics"].values())
    assert report["settings"] == {
        "model": str(tiny_model_folder),
        "revision": None,
        "data": "shapes:validation:0:None:32",
        "resolution": 32,
        "perceptual": "efficientnet_lite2",
        "features": "efficientnet_lite2",
        "feature_dimensions": 1280,
        "skipped": 0,
        "seed": 0,
    }
    with Image.open(output.with_suffix(".png")) as sheet:
        assert sheet.width > 3 * 64 and sheet.height > 4 * 64
    said = capsys.readouterr()
    title, *rows = said.out.splitlines()
    assert title == f"{tiny_model_folder} on shapes:validation:0:None:32, 3 pictures of 32 x 32"
    printed = [float(row.split()[-1]) for row in rows]
    assert printed == pytest.approx(list(report["metrics"].values()), abs=1e-4)
    assert "Frechet distance, efficientnet_lite2, 1280 features" in rows[-1]
    assert "warning: 3 pictures are fewer than the 1280 features of efficientnet_lite2" in said.err


def test_a_vae_folder_and_a_folder_of_pictures_at_another_resolution(
    tiny_model_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate.run(
        ["--model", str(tiny_model_folder / "vae"), *PLAIN, "--data", str(folder), "--resolution", "24"]
    )
    assert report["num_samples"] == 4
    assert report["settings"]["resolution"] == 24 and report["settings"]["skipped"] == 1
    assert report["settings"]["feature_dimensions"] is None
    assert set(report["metrics"]) == {"psnr", "psnr_median", "psnr_worst", "ssim", "l1"}
    said = capsys.readouterr()
    assert "4 pictures of 24 x 24" in said.out
    assert "warning: 1 samples could not be used, such as" in said.err and "1.png" in said.err


def test_the_batch_size_changes_no_figure(tiny_model_folder: Path) -> None:
    command = ["--model", str(tiny_model_folder), *PLAIN, "--num-samples", "5"]
    one, other = (evaluate.run([*command, "--batch-size", size])["metrics"] for size in ("2", "5"))
    assert one == pytest.approx(other, abs=1e-4)


def test_the_seed_chooses_the_shapes(tiny_model_folder: Path) -> None:
    command = ["--model", str(tiny_model_folder), *PLAIN, "--num-samples", "2"]
    reports = [evaluate.run([*command, "--seed", seed]) for seed in ("0", "1")]
    assert [r["settings"]["data"] for r in reports] == ["shapes:validation:0:None:32", "shapes:validation:1:None:32"]
    assert reports[0]["metrics"] != reports[1]["metrics"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([*PLAIN, "--num-samples", "0"], "--num-samples is 0; it must be at least 1"),
        ([*PLAIN, "--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        ([*PLAIN, "--resolution", "30"], "--resolution is 30; it must be a positive multiple of 4"),
        ([*PLAIN, "--resolution", "0"], "--resolution is 0; it must be a positive multiple of 4"),
        ([*PLAIN, "--output", "report.png"], "--output is report.png; it must be a .json file"),
        ([*PLAIN, "--device", "abacus"], "--device abacus cannot be used here"),
        ([*PLAIN, "--data", "./absent"], "'./absent' is neither a folder nor"),
        ([*PLAIN, "--model", "./absent"], "absent is no model folder or file here"),
        ([*PLAIN[:2], "--perceptual", "mse"], "--perceptual mse: not one of efficientnet_lite0"),
        ([*PLAIN[:2], "--features", "resnet"], "--features resnet: not one of efficientnet_lite0"),
        ([*PLAIN[:2], "--features", "inception"], "--features inception: `weights` must be a local copy"),
        ([*PLAIN[:2], "--features-weights", "x.pth"], "so x.pth would not be read"),
        (
            [*PLAIN[:2], "--perceptual", "lpips_vgg", "--perceptual-weights", "absent.pth"],
            "--perceptual lpips_vgg: cannot get the 'vgg' backbone of LPIPS from absent.pth",
        ),
        (
            [*PLAIN[:4], "--features", "efficientnet_lite0", "--num-samples", "1"],
            "a covariance needs at least 2 examples, got 1",
        ),
    ],
)
def test_bad_input_is_one_sentence(argv: list[str], sentence: str, refused: Any) -> None:
    assert sentence in refused(*argv)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A folder with a parquet file whose columns have other names than ours."""
    scenes = ShapesDataset("train", 4, 32)
    rows = {"photo": [row["image"] for row in scenes], "title": [row["captions"][0] for row in scenes]}
    data = Dataset.from_dict(rows, Features({"photo": ImageFeature(), "title": Value("string")}))
    data.to_parquet(tmp_path / "validation.parquet")
    return tmp_path


def test_columns_may_have_other_names(tiny_model_folder: Path, table: Path) -> None:
    named = ["--image-column", "photo", "--caption-column", "title"]
    report = evaluate.run(["--model", str(tiny_model_folder), *PLAIN, "--data", str(table), *named])
    assert report["num_samples"] == 4


def test_a_column_that_is_not_there_is_named(table: Path, refused: Any) -> None:
    assert "has no column 'image'; it has photo, title" in refused(*PLAIN, "--data", str(table))


def test_pictures_too_small_for_ssim(folder: Path, refused: Any) -> None:
    said = refused(*PLAIN, "--data", str(folder), "--resolution", "8")
    assert "SSIM needs pictures of at least 11 x 11 pixels, got 8 x 8" in said


def test_the_shapes_suite_prints_its_json(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "shapes.json"
    command = ["--model", str(tiny_model_folder), "--suite", "shapes", "--num-samples", "1", "--steps", "1"]
    report = evaluate.run([*command, "--output", str(output)])
    assert json.loads(capsys.readouterr().out) == json.loads(output.read_text()) == report
    assert set(report["splits"]) == {"train", "heldout"} and report["num_samples"] == 1
    assert output.with_suffix(".png").is_file()
