"""A tiny text-to-image model with random weights, as a folder, for every test that needs a whole model."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from autoencoder import AutoencoderConfig, AutoencoderKL
from conditioning import ClipTextConfig, ClipTextEncoder, ClipTextModel, ClipTokenizer
from ldm.data.shapes import captions, scene
from ldm.networks import UNet, UNetConfig
from ldm.pretrained import Model, write_model
from ldm.process import DiffusionConfig

WIDTH = 32
SETTINGS = {"sampler": "ddim", "num_inference_steps": 3, "guidance_scale": 3.0}


def random_vae() -> AutoencoderKL:
    """f4 with 4 latent channels; its pictures use the whole range of levels."""
    vae = AutoencoderKL(
        AutoencoderConfig(
            block_out_channels=(16, 32, 32), norm_num_groups=8, latent_channels=4, scaling_factor=0.7, sample_size=32
        )
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 8
    return vae.eval()


def random_unet() -> UNet:
    """Two levels for 8 x 8 latents, attending on the finer one; no layer is zero."""
    unet = UNet(
        UNetConfig(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            norm_num_groups=8,
            attention_head_dim=2,
        )
    )
    with torch.no_grad():
        unet.conv_out.weight *= 3
    return unet.eval()


def random_text_encoder() -> ClipTextEncoder:
    """A vocabulary learnt from captions of shapes and one transformer layer."""
    tokenizer = ClipTokenizer.train((c for i in range(100) for c in captions(scene(i, "train"))), 600, 24)
    config = ClipTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ClipTextEncoder(tokenizer, ClipTextModel.from_scratch(config, torch.Generator().manual_seed(1))).eval()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of 0.5 M random weights for 32 x 32 pictures; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(random_vae(), random_unet(), random_text_encoder(), DiffusionConfig(), SETTINGS, "# Tiny\n")
    write_model(model, folder)
    return folder


@pytest.fixture(scope="session")
def save_t5_tokenizer() -> Callable[[Path], None]:
    """Writes a small unigram vocabulary with T5's special tokens (pad 0, end 1, unknown 2) into a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def save(folder: Path) -> None:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=list(names.values()), unk_token="<unk>")
        texts = [c for i in range(100) for c in captions(scene(i, "train"))]
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory: pytest.TempPathFactory, save_t5_tokenizer: Callable[[Path], None]) -> Path:
    """The encoder of a T5 with random weights, 32 wide, and its tokenizer in one folder."""
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    sizes = {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(T5Config(**sizes)).save_pretrained(folder)
    save_t5_tokenizer(folder)
    return folder


class TooSlow(BaseException):
    """Not an Exception, because the readers rightly turn any of those into a sample that cannot be used."""


@contextmanager
def within(seconds: float = 2, clock_seconds: float | None = None) -> Iterator[None]:
    """Ends what computes for `seconds` or lasts for `clock_seconds`, also when it waits for a pipe.

    It fails as well where a library swallowed the exception. By the clock there is by default five times as much: a
    busy machine gives a process a part of a core only, and a disk that others use lets it wait; what hangs does so for
    ever, and is found all the same.
    """
    clock_seconds, late = 5 * seconds if clock_seconds is None else clock_seconds, list[str]()

    def end(number: int, frame: object) -> None:
        late.append(f"computed for {seconds} s" if number == signal.SIGPROF else f"lasted {clock_seconds} s")
        raise TooSlow(late[-1])

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, clock_seconds)}
    before = {number: signal.signal(number, end) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
    assert not late, late


def peak_memory() -> int:
    """The largest resident memory since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def without_growing(memory: float) -> Iterator[None]:
    """Fails what at any moment holds so many bytes more than at its start. Linux alone tells, and forgets, the peak."""
    if sys.platform != "linux":
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    yield
    grown = peak_memory() - before
    assert grown < memory, f"held {grown / 1e6:.0f} MB more than at the start"


@pytest.fixture(scope="session")
def limit_time() -> Callable[..., AbstractContextManager[None]]:
    """`with limit_time(seconds):` around what must not hang; two seconds if none are given."""
    return within


@pytest.fixture(scope="session")
def limit_memory() -> Callable[[float], AbstractContextManager[None]]:
    """`with limit_memory(bytes):` around what must not need much memory, even for a moment."""
    return without_growing
