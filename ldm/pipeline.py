"""Text to image: prompt -> condition -> sampler -> decoder -> pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from autoencoder import Decode, LatentCodec, strip_decode, tiled_decode
from autoencoder.codec import whole_decode
from autoencoder.preview import LinearPreview
from conditioning import Conditioning, PromptSyntax, condition_batches
from ldm.adapters import LORA_NAMES, MergedLoras, adapted_parts, read_lora
from ldm.canvas import Canvas
from ldm.data.transforms import to_images
from ldm.networks import uncropped
from ldm.pretrained import BUNDLED, DEFAULT_MODEL, Model, read_model, resolve, write_model
from ldm.process import at_unit_variance
from ldm.process.posterior import q_sample
from ldm.process.prediction import check_choice
from ldm.process.spacing import TIMESTEP_SPACINGS
from ldm.sampling import (
    SIGMA_SPACINGS,
    Callback,
    ClassifierGuidance,
    Guidance,
    Sampler,
    classifier_gradient,
    lerp_conditions,
    named_sampler,
    randn_rows,
    sigma_spaced_timesteps,
    slerp,
)
from ldm.sampling.denoiser import Conditioning as NetworkConditioning
from ldm.sampling.denoiser import in_chunks
from ldm.sampling.inpainting import inpainting_denoiser, with_channels

DEFAULTS: Mapping[str, Any] = {"sampler": "ddim", "num_inference_steps": 50, "guidance_scale": 7.5}
DECODERS: Mapping[str | None, Decode] = {None: whole_decode, "strips": strip_decode, "tiles": tiled_decode}
SPACINGS = (*TIMESTEP_SPACINGS, *SIGMA_SPACINGS)
MAX_ROWS, POSITIONS = 8, 1024
"""On the CPU the network runs on so many rows that they have about 1024 latent positions together, and on 8 at most."""


@dataclass(frozen=True)
class Plan:
    """How one call draws, whatever the prompts.

    `shape` is [C, h, w] of the latents, `start` the encoded picture to begin with, `keep` 1 where it stays, `channels`
    what an inpainting U-Net reads besides, `decode` the way from latents to pixels.
    """

    shape: tuple[int, int, int]
    timesteps: Tensor
    sampler: Sampler
    guidance: Guidance
    start: Tensor | None
    keep: Tensor | None
    channels: Tensor | None
    decode: Decode
    callback: Callback | None


class TextToImage:
    """A model ready to draw. Image i of a call uses seed + i, so any picture can be made again alone.

    On one machine's CPU it is then the same byte for byte, whatever else the call draws; on a GPU kernels are chosen by
    batch size and a pixel may come out one level off.
    """

    def __init__(self, model: Model, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        """Places the parts; `dtype` None computes in float32 on CPU and float16 on a GPU."""
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.model = model
        for part in (model.vae, model.unet, model.text_encoder):
            part.to(self.device, self.dtype).eval()
        self.loras = MergedLoras(adapted_parts(model.unet, model.text_encoder))
        self.codec = LatentCodec.from_config(model.vae)
        self.process = model.diffusion.schedule()
        self.schedule = at_unit_variance(self.process)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        variant: str | None = None,
        allow_pickle: bool = False,
    ) -> TextToImage:
        """Reads a folder, a single file in the original layout, a bundled model by name or a hub id; None: the default.

        Args:
            revision: branch, tag or commit of a hub id.
            variant: which weight files to read, such as "fp16".
            allow_pickle: read the tensors of .ckpt, .bin and .pt files too.

        Raises:
            ModelError: one sentence naming the file and the key at fault.
        """
        model = read_model(BUNDLED[DEFAULT_MODEL] if name is None else name, revision, variant, allow_pickle)
        return cls(model, device, dtype)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Writes the model folder in the diffusers pipeline layout, its weights in `dtype`."""
        write_model(self.model, folder, dtype)

    def load_lora(self, name: str | os.PathLike[str], scale: float = 1.0) -> None:
        """Merges a LoRA into the weights, `scale` times, beside those that are there already.

        Args:
            name: a file in the format of diffusers, PEFT or kohya, a folder with one, or a hub id.

        Raises:
            ModelError: one sentence naming the file and the key at fault; the weights are as before.
        """
        self.loras.add(read_lora(resolve(name, files=LORA_NAMES), self.model.unet.config), scale)

    def unload_loras(self) -> None:
        """Puts the model's own weights back, bit for bit."""
        self.loras.eject()

    @property
    def default_size(self) -> int:
        """Side in pixels of the pictures that the model was trained on."""
        return int(self.model.unet.config.sample_size or 64) * self.model.vae.downsample_factor

    def setting(self, name: str, value: Any = None) -> Any:
        """`value`, or the model's own default for it, or the general one."""
        return value if value is not None else self.model.settings.get(name, DEFAULTS[name])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        *,
        batch_size: int = 8,
        prompt_syntax: PromptSyntax = "plain",
        progress: Callable[[int], object] | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Draws `num_images` pictures of every prompt, prompt by prompt.

        A prompt longer than the text encoder's window is encoded in several windows where the encoder can.

        Args:
            prompt_syntax: `a1111` reads weights such as `(word:1.3)` and `[word]`, see `conditioning.weighting`.
            seed: picture i of the call uses seed + i; its noise is drawn on the CPU from its own generator.
            latents: initial noise [N, C, h, w], N(0, I), instead of drawn noise.
            batch_size: pictures at once; changes speed and memory only.
            progress: called with the number of pictures just finished.
            settings: the other arguments of `plan`.

        Raises:
            ValueError: naming the argument that is out of range.
            FloatingPointError: a picture is not finite even with the decoder in float32.
        """
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        plan = self.plan(steps, guidance_scale, sampler, height, width, **settings)
        count = len(prompts) * num_images
        if latents is not None and latents.shape != (count, *plan.shape):
            raise ValueError(f"latents has shape {list(latents.shape)}; this call needs {[count, *plan.shape]}")
        images: list[Image.Image] = []
        first = 0
        for condition, unconditional in condition_batches(
            self.model.text_encoder, prompts, negative_prompt, num_images, batch_size, prompt_syntax
        ):
            rows = range(first, first + len(condition))
            rng = [_generator(seed + row) for row in rows]
            noise = randn_rows((len(rows), *plan.shape), rng) if latents is None else latents[first : first + len(rows)]
            told, untold = self._kwargs(condition, plan.shape), self._kwargs(unconditional, plan.shape)
            images += self._pictures(plan, self._latents(plan, told, untold, noise, rng))
            if progress is not None:
                progress(len(rows))
            first += len(rows)
        return images

    @torch.no_grad()
    def interpolate(
        self,
        prompts: tuple[str, str],
        seeds: tuple[int, int],
        parts: Sequence[float],
        *,
        negative_prompt: str | None = None,
        batch_size: int = 8,
        progress: Callable[[int], object] | None = None,
        prompt_syntax: PromptSyntax = "plain",
        **settings: Any,
    ) -> list[Image.Image]:
        """Draws the way from one prompt and seed to another: a picture for each of `parts` in [0, 1].

        The noise goes along a great circle, the context along a straight line, so part 0 is the picture of the first
        prompt and seed and, with a deterministic sampler, part 1 that of the second; a stochastic one draws its noise
        from the first seed throughout. Other arguments as in `__call__`. Raises ValueError for a part outside [0, 1].
        """
        if not all(0 <= part <= 1 for part in parts):
            raise ValueError(f"parts are {list(parts)}; each must lie in [0, 1]")
        plan = self.plan(**settings)
        ends = [randn_rows((1, *plan.shape), [_generator(seed)])[0] for seed in seeds]
        (condition, unconditional), *rest = condition_batches(
            self.model.text_encoder, prompts, negative_prompt, 1, len(prompts), prompt_syntax
        )
        if rest:
            raise ValueError("the prompts to interpolate between take different numbers of the text encoder's windows")
        one, other = (self._kwargs(condition.index(torch.tensor([row])), plan.shape) for row in (0, 1))
        images: list[Image.Image] = []
        for first in range(0, len(parts), batch_size):
            here = torch.tensor(parts[first : first + batch_size], dtype=torch.float64)
            rng = [_generator(seeds[0]) for _ in here]
            randn_rows((len(rng), *plan.shape), rng)
            between = lerp_conditions(one, other, here)
            away = self._kwargs(unconditional.index(torch.zeros(len(here), dtype=torch.long)), plan.shape)
            z = self._latents(plan, between, away, slerp(ends[0], ends[1], here), rng)
            images += self._pictures(plan, z)
            if progress is not None:
                progress(len(here))
        return images

    def plan(
        self,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        init_image: Image.Image | None = None,
        strength: float = 0.8,
        mask: Image.Image | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        dynamic_threshold: float | None = None,
        threshold_limit: float = 3.0,
        classifier: ClassifierGuidance | None = None,
        tiled: Literal["strips", "tiles"] | None = None,
        callback: Callback | None = None,
    ) -> Plan:
        """What `__call__` and `interpolate` do with their settings; None is the model's own default.

        Args:
            init_image: start from this picture noised to `strength` in (0, 1] of the way (Meng et al. 2022, SDEdit).
            mask: with `init_image`, white where to draw anew, black where to keep it; a grey is one of the two.
            spacing: of the timesteps, one of `SPACINGS`.
            eta: of the ddim sampler, 0 deterministic to 1 ancestral.
            guidance_rescale: pulls the spread of a guided prediction back, 0 not at all to 1 wholly.
            guidance_interval: the noise levels sigma / alpha, low to high, at which guidance acts.
            dynamic_threshold: the quantile of |x0| that is pulled back to `threshold_limit`.
            classifier: a classifier of noisy latents to follow besides.
            tiled: decode in pieces, for large pictures: "strips" gives the same picture in less memory,
                "tiles" needs little however large the picture is, and its colours may drift from tile to tile.
            callback: called in every sampling step, see `ldm.sampling`.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        if tiled not in DECODERS:
            raise ValueError(f"tiled is {tiled!r}; it must be 'strips', 'tiles' or None")
        shape = self._latent_shape(height, width)
        start, keep, channels = self._given(init_image, mask, strength, shape)
        scale = float(self.setting("guidance_scale", guidance_scale))
        return Plan(
            shape,
            self._timesteps(self.setting("num_inference_steps", steps), strength if init_image else 1.0, spacing),
            self._sampler(self.setting("sampler", sampler), eta, classifier),
            Guidance(scale, guidance_rescale, guidance_interval, dynamic_threshold, threshold_limit),
            start,
            keep,
            channels,
            DECODERS[tiled],
            callback,
        )

    @cached_property
    def preview(self) -> LinearPreview:
        """The linear map from latents to small pictures that comes nearest to the decoder, for use in a callback."""
        with torch.no_grad():
            return LinearPreview.of_decoder(self.codec, _generator(0))

    @torch.no_grad()
    def redraw(
        self, prompts: Sequence[str], z: Tensor, strength: float, seeds: Sequence[int], **settings: Any
    ) -> Tensor:
        """Latents as the model would have drawn them: noised to `strength` of the way and denoised with their prompts.

        SDEdit (Meng et al. 2022) between latents; at strength 1 nothing of z is left.

        Args:
            prompts: one for each picture.
            z: latents [N, C, h, w] as the denoiser has them, see `LatentCodec`.
            seeds: one for each picture.
            settings: those of `plan` but for the size, which is z's, and what it starts from.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        if not len(prompts) == len(z) == len(seeds):
            raise ValueError(f"{len(z)} latents need as many prompts and seeds, got {len(prompts)} and {len(seeds)}")
        height, width = (side * self.model.vae.downsample_factor for side in z.shape[2:])
        plan = self.plan(height=height, width=width, **settings)
        plan = replace(plan, timesteps=shortened(plan.timesteps, strength))
        drawn: list[Tensor] = []
        for told, untold in condition_batches(self.model.text_encoder, prompts, None, 1, len(prompts), "plain"):
            rows = range(sum(map(len, drawn)), sum(map(len, drawn)) + len(told))
            rng = [_generator(seeds[row]) for row in rows]
            noise = randn_rows((len(rows), *plan.shape), rng)
            start = z[rows.start : rows.stop].to(self.device, torch.float32) if strength < 1 else None
            conditions = self._kwargs(told, plan.shape), self._kwargs(untold, plan.shape)
            drawn.append(self._latents(replace(plan, start=start), *conditions, noise, rng))
        return torch.cat(drawn)

    def _pictures(self, plan: Plan, z: Tensor) -> list[Image.Image]:
        """Latents [B, C, h, w], decoded one by one."""
        return [image for row in torch.split(z, 1) for image in to_images(self._decode(row, plan.decode))]

    def _latents(
        self,
        plan: Plan,
        condition: NetworkConditioning,
        unconditional: NetworkConditioning,
        noise: Tensor,
        rng: Sequence[torch.Generator],
    ) -> Tensor:
        """One batch of latents [B, C, h, w] from noise of that shape, under conditions of B rows."""
        x = self._start(noise.to(self.device, torch.float32), plan.start, plan.timesteps)
        denoise = plan.guidance.denoiser(
            self._network if plan.channels is None else with_channels(self._network, plan.channels),
            self.process,
            self.model.diffusion.prediction_type,
            condition,
            unconditional,
            self.dtype,
        )
        if plan.keep is not None and plan.start is not None:
            denoise = inpainting_denoiser(denoise, self.schedule, plan.start, plan.keep)
        z = plan.sampler(denoise, x, self.schedule, plan.timesteps, rng, plan.callback)
        if plan.keep is not None and plan.start is not None:
            z = torch.lerp(z, plan.start.expand_as(z), plan.keep)
        return z

    def _decode(self, z: Tensor, network: Decode) -> Tensor:
        """The picture [1, 3, H, W] of one row of latents; where the decoder overflows in half precision, in float32."""
        image = self.codec.decode(z.to(self.dtype), network)
        if not image.isfinite().all() and self.dtype != torch.float32:
            self.model.vae.float()
            image = self.codec.decode(z, network)
            self.model.vae.to(self.dtype)
        if image.isfinite().all():
            return image
        part = "decoder" if z.isfinite().all() else "U-Net"
        raise FloatingPointError(
            f"the {part} gave values that are not finite in {self.dtype}, so there is no picture; its weights are "
            "damaged or, in half precision, its values too large: try dtype float32"
        )

    def _sampler(self, name: str, eta: float | None, classifier: ClassifierGuidance | None) -> Sampler:
        gradient = None
        if classifier is not None:
            gradient = classifier_gradient(classifier.log_prob, classifier.scale, self.schedule)
        fixed_large = self.model.diffusion.variance_type == "fixed_large"
        return named_sampler(name, eta=eta, kind="fixed_large" if fixed_large else "fixed_small", gradient=gradient)

    def _network(self, x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        rows = max(1, min(MAX_ROWS, POSITIONS // x[0, 0].numel())) if self.device.type == "cpu" else len(x)
        return in_chunks(self.model.unet, rows)(x, t, **condition)

    def _kwargs(self, condition: Conditioning, shape: tuple[int, int, int]) -> dict[str, Tensor | None]:
        """What the U-Net is told besides x and t; SDXL's sizes are those of an uncropped picture of this size."""
        told = {"context": condition.context, "context_mask": condition.context_mask}
        if self.model.unet.config.addition_embed_type == "text_time":
            height, width = (side * self.model.vae.downsample_factor for side in shape[1:])
            sizes = uncropped(len(condition), height, width).to(self.device)
            told |= {"pooled": condition.pooled, "size_ids": sizes}
        return told

    def _start(self, noise: Tensor, start: Tensor | None, visited: Tensor) -> Tensor:
        if start is None:
            return noise
        alpha, sigma = self.schedule.alpha_sigma(visited[:1], like=noise)
        return q_sample(start, noise, alpha, sigma)

    def _timesteps(self, steps: int, strength: float, spacing: str | None) -> Tensor:
        diffusion = self.model.diffusion
        if not 1 <= steps <= diffusion.num_train_timesteps:
            raise ValueError(f"steps is {steps}; this model accepts 1 to {diffusion.num_train_timesteps}")
        check_choice("spacing", spacing or diffusion.timestep_spacing, SPACINGS)
        match spacing:
            case "karras" | "exponential":
                visited = sigma_spaced_timesteps(self.schedule, steps, spacing)
            case None | "leading" | "trailing" | "linspace":
                visited = diffusion.timesteps(steps, spacing)
        return shortened(visited, strength)

    def _given(
        self, image: Image.Image | None, mask: Image.Image | None, strength: float, shape: tuple[int, int, int]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`start`, `keep` and `channels` of a plan.

        An inpainting U-Net, which has more input channels than the latents, reads the mask itself, and from strength 1
        on it starts from nothing but noise.
        """
        inpaints = self.model.unet.config.in_channels != shape[0]
        if mask is not None and image is None:
            raise ValueError("mask needs init_image, the picture whose black part is kept")
        if inpaints and mask is None:
            raise ValueError("this model redraws a part of a picture: it needs init_image and mask")
        if image is None:
            return None, None, None
        factor = self.model.vae.downsample_factor
        canvas = Canvas(self.codec, shape[1] * factor, shape[2] * factor, self.device)
        if mask is not None and inpaints:
            channels = canvas.inpainting_channels(image, mask)
            return None if strength >= 1 else canvas.latents(image), None, channels
        start = canvas.latents(image)
        return start, None if mask is None else canvas.keep(mask, start), None

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        # every downsampling of the U-Net halves the latent once more
        factor = self.model.vae.downsample_factor
        multiple = factor * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        sides = [self.default_size if side is None else side for side in (height, width)]
        for name, side in zip(("height", "width"), sides, strict=True):
            if side < 1 or side % multiple:
                raise ValueError(f"{name} is {side}; it must be a positive multiple of {multiple} for this model")
        return self.model.vae.latent_channels, sides[0] // factor, sides[1] // factor


def check_strength(strength: float) -> None:
    """Raises a ValueError outside (0, 1]."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must lie in (0, 1]")


def shortened(timesteps: Tensor, strength: float) -> Tensor:
    """The last of the timesteps [N], `strength` of them and one at least."""
    check_strength(strength)
    return timesteps[len(timesteps) - max(1, int(len(timesteps) * strength)) :]


def _generator(seed: int) -> torch.Generator:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be an integer of 64 bits")
    return torch.Generator().manual_seed(seed)
