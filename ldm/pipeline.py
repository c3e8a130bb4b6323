"""Text to image: prompt -> condition -> sampler -> decoder -> pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from autoencoder import LatentCodec
from autoencoder.preview import LinearPreview
from conditioning import Conditioning
from ldm.data.transforms import resize_and_crop, to_images, to_rgb, to_tensor
from ldm.pretrained import BUNDLED, Model, read_model, write_model
from ldm.process import at_unit_variance
from ldm.process.posterior import q_sample
from ldm.process.prediction import Prediction, check_choice
from ldm.process.spacing import TIMESTEP_SPACINGS
from ldm.sampling import (
    SIGMA_SPACINGS,
    Callback,
    ClassifierGuidance,
    Denoiser,
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
from ldm.sampling.denoiser import Network

DEFAULTS: Mapping[str, Any] = {"sampler": "ddim", "num_inference_steps": 50, "guidance_scale": 7.5}
SPACINGS = (*TIMESTEP_SPACINGS, *SIGMA_SPACINGS)
MAX_ROWS, POSITIONS = 8, 1024
"""On the CPU the network runs on so many rows that they have about 1024 latent positions together, and on 8 at most."""


@dataclass(frozen=True)
class Plan:
    """How one call draws, whatever the prompts.

    `shape` is [C, h, w] of the latents, `start` the encoded picture to begin with, `keep` 1 where it stays.
    """

    shape: tuple[int, int, int]
    timesteps: Tensor
    sampler: Sampler
    guidance: Guidance
    negative_prompt: str
    start: Tensor | None
    keep: Tensor | None
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
        self.codec = LatentCodec.from_config(model.vae)
        self.process = model.diffusion.schedule()
        self.schedule = at_unit_variance(self.process)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> TextToImage:
        """Reads a model folder or hub id; None is the bundled model.

        Raises:
            ModelError: one sentence naming the file and the key at fault.
        """
        return cls(read_model(BUNDLED if name is None else name), device, dtype)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Writes the model folder in the diffusers pipeline layout, its weights in `dtype`."""
        write_model(self.model, folder, dtype)

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
        progress: Callable[[int], object] | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Draws `num_images` pictures of every prompt, prompt by prompt.

        Args:
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
        texts = [text for text in prompts for _ in range(num_images)]
        plan = self.plan(negative_prompt, steps, guidance_scale, sampler, height, width, **settings)
        if latents is not None and latents.shape != (len(texts), *plan.shape):
            raise ValueError(f"latents has shape {list(latents.shape)}; this call needs {[len(texts), *plan.shape]}")
        images: list[Image.Image] = []
        for first in range(0, len(texts), batch_size):
            rows = range(first, min(first + batch_size, len(texts)))
            rng = [_generator(seed + row) for row in rows]
            noise = randn_rows((len(rows), *plan.shape), rng) if latents is None else latents[first : first + len(rows)]
            images += self._draw(plan, self._condition([texts[row] for row in rows]), noise, rng)
            if progress is not None:
                progress(len(rows))
        return images

    @torch.no_grad()
    def interpolate(
        self,
        prompts: tuple[str, str],
        seeds: tuple[int, int],
        parts: Sequence[float],
        *,
        batch_size: int = 8,
        progress: Callable[[int], object] | None = None,
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
        conditions = [self._condition([prompt]) for prompt in prompts]
        images: list[Image.Image] = []
        for first in range(0, len(parts), batch_size):
            here = torch.tensor(parts[first : first + batch_size], dtype=torch.float64)
            rng = [_generator(seeds[0]) for _ in here]
            randn_rows((len(rng), *plan.shape), rng)
            condition = lerp_conditions(conditions[0], conditions[1], here)
            images += self._draw(plan, condition, slerp(ends[0], ends[1], here), rng)
            if progress is not None:
                progress(len(here))
        return images

    def plan(
        self,
        negative_prompt: str | None = None,
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
        callback: Callback | None = None,
    ) -> Plan:
        """What `__call__` and `interpolate` do with their settings; None is the model's own default.

        Args:
            init_image: start from this picture noised to `strength` in (0, 1] of the way (Meng et al. 2022, SDEdit).
            mask: with `init_image`, white where to draw anew, black where to keep it.
            spacing: of the timesteps, one of `SPACINGS`.
            eta: of the ddim sampler, 0 deterministic to 1 ancestral.
            guidance_rescale: pulls the spread of a guided prediction back, 0 not at all to 1 wholly.
            guidance_interval: the noise levels sigma / alpha, low to high, at which guidance acts.
            dynamic_threshold: the quantile of |x0| that is pulled back to `threshold_limit`.
            classifier: a classifier of noisy latents to follow besides.
            callback: called in every sampling step, see `ldm.sampling`.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        shape = self._latent_shape(height, width)
        start = None if init_image is None else self._encode(init_image, shape)
        scale = float(self.setting("guidance_scale", guidance_scale))
        return Plan(
            shape,
            self._timesteps(self.setting("num_inference_steps", steps), strength if init_image else 1.0, spacing),
            self._sampler(self.setting("sampler", sampler), eta, classifier),
            Guidance(scale, guidance_rescale, guidance_interval, dynamic_threshold, threshold_limit),
            negative_prompt or "",
            start,
            None if mask is None else self._keep_mask(mask, shape, start),
            callback,
        )

    @cached_property
    def preview(self) -> LinearPreview:
        """The linear map from latents to small pictures that comes nearest to the decoder, for use in a callback."""
        with torch.no_grad():
            return LinearPreview.of_decoder(self.codec, _generator(0))

    def _draw(
        self, plan: Plan, condition: NetworkConditioning, noise: Tensor, rng: Sequence[torch.Generator]
    ) -> list[Image.Image]:
        """One batch: noise [B, C, h, w] under a condition of B rows, decoded one by one."""
        x = self._start(noise.to(self.device, torch.float32), plan.start, plan.timesteps)
        denoise = plan.guidance.denoiser(
            self._network,
            self.process,
            self.model.diffusion.prediction_type,
            condition,
            self._unconditional(plan.negative_prompt, len(x)),
            self.dtype,
        )
        if plan.keep is not None and plan.start is not None:
            denoise = self._inpainting(denoise, plan.start, plan.keep)
        z = plan.sampler(denoise, x, self.schedule, plan.timesteps, rng, plan.callback)
        if plan.keep is not None and plan.start is not None:
            z = torch.lerp(z, plan.start.expand_as(z), plan.keep)
        return [image for row in torch.split(z, 1) for image in to_images(self._decode(row))]

    def _decode(self, z: Tensor) -> Tensor:
        """The picture [1, 3, H, W] of one row of latents; where the decoder overflows in half precision, in float32."""
        image = self.codec.decode(z.to(self.dtype))
        if not image.isfinite().all() and self.dtype != torch.float32:
            self.model.vae.float()
            image = self.codec.decode(z)
            self.model.vae.to(self.dtype)
        if image.isfinite().all():
            return image
        part = "decoder" if z.isfinite().all() else "U-Net"
        raise FloatingPointError(
            f"the {part} gave values that are not finite in {self.dtype}, so there is no picture; its weights are "
            "damaged or, in half precision, its values too large: try dtype float32"
        )

    def _condition(self, texts: Sequence[str]) -> dict[str, Tensor | None]:
        encoder = self.model.text_encoder
        return self._kwargs(Conditioning.cat([encoder.encode(encoder.tokenize([text])) for text in texts]))

    def _unconditional(self, negative: str, count: int) -> dict[str, Tensor | None]:
        encoder = self.model.text_encoder
        return self._kwargs(encoder.encode(encoder.tokenize([negative])).repeat_interleave(count))

    def _sampler(self, name: str, eta: float | None, classifier: ClassifierGuidance | None) -> Sampler:
        gradient = None
        if classifier is not None:
            gradient = classifier_gradient(classifier.log_prob, classifier.scale, self.schedule)
        fixed_large = self.model.diffusion.variance_type == "fixed_large"
        return named_sampler(name, eta=eta, kind="fixed_large" if fixed_large else "fixed_small", gradient=gradient)

    def _network(self, x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        rows = max(1, min(MAX_ROWS, POSITIONS // x[0, 0].numel())) if self.device.type == "cpu" else len(x)
        return in_chunks(self.model.unet, rows)(x, t, **condition)

    @staticmethod
    def _kwargs(condition: Conditioning) -> dict[str, Tensor | None]:
        return {"context": condition.context, "context_mask": condition.context_mask}

    def _inpainting(self, denoise: Denoiser, start: Tensor, keep: Tensor) -> Denoiser:
        """The same denoiser, sure of the kept part: x0 there is the given picture's (Song et al. 2021, app. I.2)."""

        def masked(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = self.schedule.alpha_sigma(t, like=x)
            prediction = denoise(x, t)
            x0 = torch.lerp(prediction.x0, start.expand_as(x), keep)
            return prediction._replace(x0=x0, eps=(x - alpha * x0) / sigma)

        return masked

    def _start(self, noise: Tensor, start: Tensor | None, visited: Tensor) -> Tensor:
        if start is None:
            return noise
        alpha, sigma = self.schedule.alpha_sigma(visited[:1], like=noise)
        return q_sample(start, noise, alpha, sigma)

    def _timesteps(self, steps: int, strength: float, spacing: str | None) -> Tensor:
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; it must lie in (0, 1]")
        diffusion = self.model.diffusion
        if not 1 <= steps <= diffusion.num_train_timesteps:
            raise ValueError(f"steps is {steps}; this model accepts 1 to {diffusion.num_train_timesteps}")
        check_choice("spacing", spacing or diffusion.timestep_spacing, SPACINGS)
        match spacing:
            case "karras" | "exponential":
                visited = sigma_spaced_timesteps(self.schedule, steps, spacing)
            case None | "leading" | "trailing" | "linspace":
                visited = diffusion.timesteps(steps, spacing)
        return visited[len(visited) - max(1, round(steps * strength)) :]

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        # every downsampling of the U-Net halves the latent once more
        factor = self.model.vae.downsample_factor
        multiple = factor * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        sides = [self.default_size if side is None else side for side in (height, width)]
        for name, side in zip(("height", "width"), sides, strict=True):
            if side < 1 or side % multiple:
                raise ValueError(f"{name} is {side}; it must be a positive multiple of {multiple} for this model")
        return self.model.vae.config.latent_channels, sides[0] // factor, sides[1] // factor

    def _encode(self, image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
        factor = self.model.vae.downsample_factor
        fitted = fit(to_rgb(image), shape[2] * factor, shape[1] * factor)
        return self.codec.encode(to_tensor(fitted)[None].to(self.device)).float()

    def _keep_mask(self, mask: Image.Image, shape: tuple[int, int, int], start: Tensor | None) -> Tensor:
        if start is None:
            raise ValueError("mask needs init_image, the picture whose black part is kept")
        small = mask.convert("L").resize((shape[2], shape[1]), Image.Resampling.BOX)
        redraw = (to_tensor(small.convert("RGB"))[:1] + 1) / 2
        return 1 - redraw[None].to(self.device)


def in_chunks(net: Network, rows: int) -> Network:
    """The same network, run on exactly `rows` rows at a time; the last ones are filled up with copies.

    Kernels are chosen by the shapes of their inputs and sum in another order for another batch size, so that a picture
    would otherwise depend, in its last bits, on how many others are drawn with it.
    """

    def run(x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        filled = torch.arange(len(x) + -len(x) % rows, device=x.device).clamp(max=len(x) - 1)
        given = {name: value for name, value in condition.items() if value is not None}
        parts = torch.split(filled, rows)
        chunks = [net(x[i], t[i], **{name: value[i] for name, value in given.items()}) for i in parts]
        return torch.cat(chunks)[: len(x)]

    return run


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resizes and centre-crops a picture to exactly width x height."""
    if width == height:
        return resize_and_crop(image, width)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    x, y = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((x, y, x + width, y + height))


def _generator(seed: int) -> torch.Generator:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be an integer of 64 bits")
    return torch.Generator().manual_seed(seed)
