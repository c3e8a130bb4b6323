from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ldm.config import AutoencoderTraining, ClassifierTraining, ConfigError, LdmTraining, PretrainedClip, ScratchClip
from ldm.config.file import completed, differences, dump_config, flat_settings, load_config, parse_command_line

STAGE_ONE = "output_dir: out\n"
STAGE_TWO = "output_dir: out\nautoencoder: vae\n"
FOLDER = Path(__file__).parent.parent / "train_configs"
CONFIGS = [f for f in sorted(FOLDER.rglob("*.yaml")) if f.parent.name != "accelerate"]


def load(folder: Path, kind: Any, text: str, *overrides: str) -> Any:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(kind, path, overrides)


def refused(folder: Path, kind: Any, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(folder, kind, text, *overrides)
    message = str(error.value)
    assert "\n" not in message and "<class" not in message
    return message


def test_values_come_from_the_file_and_defaults_from_the_class(tmp_path: Path) -> None:
    config = load(tmp_path, AutoencoderTraining, STAGE_ONE + "training: {max_train_steps: 7}\nseed: 3\n")
    assert (config.output_dir, config.seed, config.training.max_train_steps) == ("out", 3, 7)
    assert config.training.train_batch_size == AutoencoderTraining("out").training.train_batch_size


@pytest.mark.parametrize(
    ("kind", "text", "key", "meant"),
    [
        (AutoencoderTraining, "sed: 1", "`sed`", "`seed`"),
        (AutoencoderTraining, "training: {max_train_step: 1}", "`training.max_train_step`", "`training.max_train_steps`"),
        (AutoencoderTraining, "trainig: {max_train_steps: 1}", "`trainig`", "`training`"),
        (AutoencoderTraining, "max_train_steps: 1", "`max_train_steps`", "`training.max_train_steps`"),
        (AutoencoderTraining, "autoencoder: {latent_chanels: 4}", "`autoencoder.latent_chanels`", "`autoencoder.latent_channels`"),
        (LdmTraining, "unet: {cross_atention_dim: 4}", "`unet.cross_atention_dim`", "`unet.cross_attention_dim`"),
        (LdmTraining, "text_encoder: {type: clip, pth: x}", "`text_encoder.pth`", "`text_encoder.path`"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_named_with_the_nearest_one(
    tmp_path: Path, kind: Any, text: str, key: str, meant: str
) -> None:
    base = STAGE_ONE if kind is AutoencoderTraining else STAGE_TWO
    message = refused(tmp_path, kind, base + text)
    assert f"{key} is not a key of the config; did you mean {meant}?" in message
    assert str(tmp_path / "config.yaml") in message


def test_a_key_of_another_choice_is_refused_with_the_accepted_ones(tmp_path: Path) -> None:
    message = refused(tmp_path, LdmTraining, STAGE_TWO + "text_encoder: {type: clip, hidden_size: 8}")
    assert "`text_encoder.hidden_size`" in message and "accepted here: type, path, clip_skip, trainable" in message


@pytest.mark.parametrize(
    ("text", "key", "accepted"),
    [
        ("training: {max_train_steps: abc}", "training.max_train_steps", "a whole number"),
        ("training: {max_train_steps: 1.5}", "training.max_train_steps", "a whole number"),
        ("training: {max_train_steps: null}", "training.max_train_steps", "a whole number"),
        ("training: {max_train_steps: true}", "training.max_train_steps", "a whole number"),
        ("training: {max_train_steps: [1]}", "training.max_train_steps", "a whole number"),
        ("training: {gradient_checkpointing: 1}", "training.gradient_checkpointing", "true or false"),
        ("training: {mixed_precision: fp8}", "training.mixed_precision", "one of no, bf16, fp16"),
        ("training: 3", "training", "a section"),
        ("training:", "training", "a section"),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate", "a number"),
        ("optimizer: {learning_rate: true}", "optimizer.learning_rate", "a number"),
        ("data: {source: null}", "data.source", "text"),
        ("data: {source: [a, b]}", "data.source", "text"),
        ("data: {caption_columns: text}", "data.caption_columns", "a list, each entry of it text"),
        ("data: {max_train_samples: lots}", "data.max_train_samples", "a whole number or null"),
        ("autoencoder: {block_out_channels: 32}", "autoencoder.block_out_channels", "a list"),
    ],
)
def test_a_wrong_type_is_named_with_the_accepted_one(tmp_path: Path, text: str, key: str, accepted: str) -> None:
    message = refused(tmp_path, AutoencoderTraining, STAGE_ONE + text)
    assert f"`{key}` is " in message and f"must be {accepted}" in message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("data: {resolution: 33}\nautoencoder: {block_out_channels: [32, 32]}", ["`data.resolution`", "multiple of 2"]),
        ("autoencoder: {block_out_channels: [33]}", ["`autoencoder`", "norm_num_groups=32", "33"]),
        ("data: {resolution: 0}", ["`data.resolution` is 0", "at least 1"]),
        ("data: {max_bad_fraction: 2}", ["`data.max_bad_fraction` is 2.0", "[0, 1]"]),
        ("data: {shapes_per_image: 3}", ["`data.shapes_per_image` is 3"]),
        ("data: {caption_columns: []}", ["`data.caption_columns`", "at least one"]),
        ("data: {validation_split: train}", ["`data.validation_split` is 'train'", "`data.split`"]),
        ("data: {streaming: true}", ["`data.streaming`", "shapes"]),
        (
            "data: {streaming: true, source: f, max_train_samples: 9}",
            ["`data.max_train_samples` is 9", "`data.streaming`"],
        ),
        ("data: {max_train_samples: 0}", ["`data.max_train_samples` is 0"]),
        ("data: {buckets: {max_aspect_ratio: 0.5}}", ["`data.buckets.max_aspect_ratio` is 0.5", "at least 1"]),
        (
            "data: {buckets: {max_aspect_ratio: 2, step: 128}}",
            ["`data.buckets.step` is 128", "a multiple of", "`data.resolution` 64"],
        ),
        (
            "data: {streaming: true, source: f, buckets: {max_aspect_ratio: 2, step: 16}}",
            ["`data.buckets.max_aspect_ratio` is 2.0", "`data.streaming` true"],
        ),
        ("optimizer: {learning_rate: .nan}", ["`optimizer.learning_rate` is nan"]),
        ("optimizer: {max_grad_norm: 0}", ["`optimizer.max_grad_norm` is 0.0", "positive"]),
        ("optimizer: {adam_beta2: 1.0}", ["`optimizer.adam_beta2` is 1.0"]),
        ("training: {checkpoints_total_limit: 0}", ["`training.checkpoints_total_limit` is 0"]),
        ("training: {ema_decay: 1.0}", ["`training.ema_decay` is 1.0"]),
        ("validation: {steps: 0}", ["`validation.steps` is 0"]),
        ("scaling_factor: 0", ["`scaling_factor` is 0.0"]),
        ("loss: {reconstruction: huber}", ["`loss.reconstruction` is 'huber'", "l1, l2, charbonnier"]),
        ("loss: {logvar_init: .inf}", ["`loss.logvar_init` is inf", "finite"]),
        ("discriminator: {norm: layer}", ["`discriminator.norm` is 'layer'", "batch, group, act, none"]),
        ("discriminator: {r1: -1}", ["`discriminator.r1` is -1.0", "at least 0"]),
        ("discriminator: {r1_every: 0}", ["`discriminator.r1_every` is 0", "at least 1"]),
        ("discriminator: {lecam: -0.1}", ["`discriminator.lecam` is -0.1", "at least 0"]),
        (
            "pretrained: here\nautoencoder: {latent_channels: 8}",
            ["`pretrained` is 'here'", "`autoencoder` section", "one of the two"],
        ),
        ("freeze_encoder: true", ["`freeze_encoder` is true", "`pretrained` null"]),
        ("latent_noise: 0.5", ["`latent_noise` is 0.5", "`pretrained` null", "must be 0"]),
        ("pretrained: here\nlatent_noise: 0.5\nloss: {kl: 0}", ["`loss.kl` 0", "above 0", "outgrow"]),
        ("discriminator: {type: projected, norm: group}", ["`discriminator.type` is projected", "`norm`", "left out"]),
        ("loss: {discriminator_warmup: -1}", ["`loss.discriminator_warmup`", "at least 0"]),
        ("pretrained: here\nlatent_errors: file", ["`latent_errors` is 'file'", "`freeze_encoder` false"]),
        (
            "pretrained: here\nfreeze_encoder: true\nlatent_errors: file\ndata: {random_flip: true}",
            ["`data.random_flip` is True with `latent_errors`", "must be False"],
        ),
        ("latent_errors_share: 0", ["`latent_errors_share` is 0.0", "(0, 1]"]),
        ("pretrained: here\nlatent_labels: {names: [one]}", ["`latent_labels.names` is ['one']", "two or more"]),
        ("pretrained: here\nlatent_labels: {names: [a, a]}", ["`latent_labels.names` is ['a', 'a']", "different"]),
        ("pretrained: here\nlatent_labels: {names: [a, '']}", ["`latent_labels.names` is ['a', '']", "words"]),
        (
            "pretrained: here\nlatent_labels: {names: [glossy 3d, 3d]}",
            ["`latent_labels.names` has 'glossy 3d'", "name one of them alone"],
        ),
        ("discriminator: {labels: [Noto, noto]}", ["`discriminator.labels` has 'Noto'", "name one of them alone"]),
        ("discriminator: {labels: [one]}", ["`discriminator.labels` is ['one']", "two or more"]),
        (
            "discriminator: {labels: [a, b]}\ndata: {instance_prompt: a sks dog}",
            ["`discriminator.labels` is ['a', 'b']", "`data.instance_prompt` 'a sks dog'", "must be null"],
        ),
        ("latent_labels: {weight: 0}", ["`latent_labels.weight` is 0.0", "positive"]),
        ("latent_labels: {names: [a, b]}", ["`latent_labels.names` is ['a', 'b']", "`pretrained` null", "no scale"]),
        (
            "pretrained: here\nfreeze_encoder: true\nlatent_labels: {names: [a, b]}",
            ["`latent_labels.names` is ['a', 'b']", "`freeze_encoder` true", "must be false"],
        ),
        (
            "pretrained: here\nlatent_labels: {names: [a, b]}\ndata: {instance_prompt: a sks dog}",
            ["`latent_labels.names` is ['a', 'b']", "`data.instance_prompt` 'a sks dog'", "must be null"],
        ),
        ("pretrained: here\nfreeze_encoder: true\nlatent_noise: -1", ["`latent_noise` is -1.0", "at least 0"]),
        (
            "pretrained: here\nfreeze_encoder: true\nscaling_factor: 0.5",
            ["`scaling_factor` is 0.5", "`freeze_encoder` true", "must be null"],
        ),
    ],
)
def test_an_impossible_value_or_combination_is_refused(tmp_path: Path, text: str, names: list[str]) -> None:
    message = refused(tmp_path, AutoencoderTraining, STAGE_ONE + text)
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("data: {center_crop: false}", ["`data.center_crop` is False"]),
        ("data: {buckets: {step: 0}}", ["`data.buckets.step` is 0", "at least 1"]),
        ("objective: {weighting: p2, snr_gamma: 5}", ["`objective.weighting` is p2"]),
        ("objective: {p2_k: 0}", ["`objective.p2_k` is 0.0"]),
        ("validation: {sampler: dim}", ["`validation.sampler` is 'dim'", "ddim"]),
        ("validation: {num_inference_steps: 2000}", ["`validation.num_inference_steps` is 2000", "1000"]),
        ("objective: {proportion_empty_prompts: 2}", ["`objective.proportion_empty_prompts` is 2.0"]),
        ("objective: {curriculum_start: 1.5}", ["`objective.curriculum_start` is 1.5", "(0, 1]"]),
        (
            "objective: {curriculum_steps: 5, timestep_sampling: importance}",
            ["`objective.curriculum_steps` is 5", "must be 0"],
        ),
        ("objective: {snr_gamma: -1}", ["`objective.snr_gamma` is -1.0"]),
        ("latents: {shard_size: 0}", ["`latents.shard_size` is 0"]),
        ("unet: {block_out_channels: [32, 64]}", ["`unet`", "`down_block_types`", "2 entries"]),
        ("diffusion: {beta_start: 0.5}", ["`diffusion`", "beta_start"]),
        ("text_encoder: {type: clipp}", ["`text_encoder.type` is 'clipp'", "clip, clip_from_scratch"]),
        ("text_encoder: {path: x}", ["`text_encoder.type` is missing", "clip, clip_from_scratch"]),
    ],
)
def test_impossible_settings_of_stage_two_are_refused(tmp_path: Path, text: str, names: list[str]) -> None:
    message = refused(tmp_path, LdmTraining, STAGE_TWO + text)
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    ("overrides", "read"),
    [
        (["--training.max_train_steps", "9"], lambda c: c.training.max_train_steps == 9),
        (["--training.max_train_steps=9"], lambda c: c.training.max_train_steps == 9),
        (["--seed", "-1"], lambda c: c.seed == -1),
        (["--output_dir", "007"], lambda c: c.output_dir == "007"),
        (["--output_dir", "a=b"], lambda c: c.output_dir == "a=b"),
        (["--training.mixed_precision", "no"], lambda c: c.training.mixed_precision == "no"),
        (["--optimizer.learning_rate", "1e-3"], lambda c: c.optimizer.learning_rate == 1e-3),
        (["--optimizer.max_grad_norm", "null"], lambda c: c.optimizer.max_grad_norm is None),
        (["--data.validation_source", "null"], lambda c: c.data.validation_source is None),
        (["--data.caption_columns", "[a, b]"], lambda c: c.data.caption_columns == ("a", "b")),
        (["--data.random_flip", "true"], lambda c: c.data.random_flip is True),
    ],
)
def test_overrides_win_over_the_file(tmp_path: Path, overrides: list[str], read: Any) -> None:
    text = STAGE_ONE + "seed: 5\ntraining: {max_train_steps: 3}\noptimizer: {max_grad_norm: 2.0}\n"
    assert read(load(tmp_path, AutoencoderTraining, text, *overrides))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["--training.max_train_step", "9"], ["`training.max_train_step`", "`training.max_train_steps`"]),
        (["--training.max_train_steps", "x"], ["`training.max_train_steps` is 'x'", "a whole number"]),
        (["--training.max_train_steps"], ["--training.max_train_steps needs a value"]),
        (["--seed", "--output_dir", "x"], ["--seed needs a value"]),
        (["stray"], ["'stray'", "--section.field VALUE"]),
        (["--seed.x", "3"], ["`seed` is 5"]),
        (["--data.caption_columns", "[a"], ["`data.caption_columns` is '[a'", "YAML"]),
        (["--config_path", "other.yaml"], ["`config_path` is not a key"]),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, overrides: list[str], names: list[str]) -> None:
    message = refused(tmp_path, AutoencoderTraining, STAGE_ONE + "seed: 5\n", *overrides)
    assert all(name in message for name in names), message


def test_numbers_and_words_that_yaml_reads_otherwise(tmp_path: Path) -> None:
    text = STAGE_ONE + "optimizer: {learning_rate: 1e-4}\ntraining: {mixed_precision: no}\n"
    config = load(tmp_path, AutoencoderTraining, text)
    assert config.optimizer.learning_rate == 1e-4 and config.training.mixed_precision == "no"


def test_fine_tuning_needs_no_autoencoder_section_and_is_written_back(tmp_path: Path) -> None:
    config = load(tmp_path, AutoencoderTraining, STAGE_ONE, "--pretrained", "vae", "--freeze_encoder", "true")
    assert (config.pretrained, config.freeze_encoder, config.scaling_factor) == ("vae", True, None)
    assert load(tmp_path, AutoencoderTraining, dump_config(config)) == config


def test_the_type_chooses_the_text_encoder(tmp_path: Path) -> None:
    clip = load(tmp_path, LdmTraining, STAGE_TWO, "--text_encoder.type", "clip", "--text_encoder.path", "here")
    assert clip.text_encoder == PretrainedClip("here")
    assert load(tmp_path, LdmTraining, STAGE_TWO).text_encoder == ScratchClip()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"training: [1", "not a YAML file"), (b"\xff\xfe", "not a YAML file"), (b"- 1\n- 2\n", "`key: value`"), (b"", "`output_dir`")],
)  # fmt: skip
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(AutoencoderTraining, path)
    assert str(path) in str(error.value) and reason in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file .*none\.yaml"):
        load_config(AutoencoderTraining, tmp_path / "none.yaml")


def test_the_command_line_mixes_flags_and_overrides_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(STAGE_ONE)
    argv = ["--seed", "4", "--config", str(tmp_path / "c.yaml"), "--dry-run", "--training.max_train_steps", "2"]
    config, launch = parse_command_line(AutoencoderTraining, [*argv, "--resume", "never"])
    assert (config.seed, config.training.max_train_steps) == (4, 2)
    assert launch.dry_run and launch.resume == "never" and not launch.allow_config_change


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_shipped_config_loads_and_reads_back_as_dumped(tmp_path: Path, path: Path) -> None:
    kind: Any = AutoencoderTraining if "autoencoder" in path.stem else LdmTraining
    kind = ClassifierTraining if "classifier" in path.stem else kind
    config = load_config(kind, path)
    assert load(tmp_path, kind, dump_config(config)) == config


def test_dumping_keeps_difficult_values(tmp_path: Path) -> None:
    prompts = ("a: b", "no", "007", "", "line\nbreak", "naïve ☃")
    config = LdmTraining("true", "1e3", text_encoder=PretrainedClip("~", 2, True))
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.1e-7, max_grad_norm=None),
        validation=dataclasses.replace(config.validation, validation_prompts=prompts),
        unet=dataclasses.replace(config.unet, attention_head_dim=(8, 8, 8, 8)),
    )
    assert load(tmp_path, LdmTraining, dump_config(config)) == config


def test_differences_lists_dotted_keys() -> None:
    before = "a: 1\nb: {c: [1, 2], d: x}\ne: null\n"
    after = "a: 2\nb: {c: [1, 3], d: x, f: new}\n"
    assert differences(before, after) == ["a: 1 -> 2", "b.c: [1, 2] -> [1, 3]", "b.f: None -> 'new'"]
    assert differences(before, before) == []


def test_a_config_written_before_a_setting_came_is_the_same_config() -> None:
    now = dump_config(LdmTraining("out", "vae"))
    before = now.replace("  ema_snapshots: false\n", "")
    assert before != now
    assert completed(LdmTraining, before) == now
    assert differences(completed(LdmTraining, before.replace("\nseed: 0", "\nseed: 1")), now) == ["seed: 1 -> 0"]
    for other in ("a: 1\n", "- 1\n", "{", ""):
        assert completed(LdmTraining, other) == other


def test_flat_settings_are_dotted_keys_and_plain_values() -> None:
    config = AutoencoderTraining("out", seed=3)
    flat = flat_settings(config)
    assert (flat["seed"], flat["training.train_batch_size"], flat["pretrained"]) == (3, 16, None)
    assert flat["autoencoder.block_out_channels"] == str(list(config.autoencoder.block_out_channels))
    assert all(isinstance(value, (bool, int, float, str, type(None))) for value in flat.values())
