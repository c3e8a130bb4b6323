"""Text to image: prompt -> condition -> sampler -> decoder -> pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from autoencoder import Decode, LatentCodec, strip_decode, tiled_decode
from autoencoder.codec import whole_decode
from conditioning import Conditioning, PromptSyntax, condition_batches
from ldm.data.transforms import resize_and_crop, to_images, to_rgb, to_tensor
from ldm.networks import uncropped
from ldm.pretrained import BUNDLED, Model, read_model, write_model
from ldm.process import timesteps as spaced_timesteps
from ldm.process.posterior import q_sample
from ldm.process.prediction import Prediction
from ldm.sampling import Callback, Denoiser, guided_denoiser, named_sampler, randn_rows
from ldm.sampling.denoiser import Network

DEFAULTS: Mapping[str, Any] = {"sampler": "ddim", "num_inference_steps": 50, "guidance_scale": 7.5}
DECODERS: Mapping[str | None, Decode] = {None: whole_decode, "strips": strip_decode, "tiles": tiled_decode}
MAX_ROWS, POSITIONS = 8, 1024
"""On the CPU the network runs on so many rows that they have about 1024 latent positions together, and on 8 at most."""


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
        self.schedule = model.diffusion.schedule()

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
        """Reads a model folder, a single file in the original layout or a hub id; None is the bundled model.

        Args:
            revision: branch, tag or commit of a hub id.
            variant: which weight files to read, such as "fp16".
            allow_pickle: read the tensors of .ckpt, .bin and .pt files too.

        Raises:
            ModelError: one sentence naming the file and the key at fault.
        """
        model = read_model(BUNDLED if name is None else name, revision, variant, allow_pickle)
        return cls(model, device, dtype)

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
        init_image: Image.Image | None = None,
        strength: float = 0.8,
        mask: Image.Image | None = None,
        tiled: Literal["strips", "tiles"] | None = None,
        callback: Callback | None = None,
        progress: Callable[[int], object] | None = None,
        prompt_syntax: PromptSyntax = "plain",
    ) -> list[Image.Image]:
        """Draws `num_images` pictures of every prompt, prompt by prompt.

        A prompt longer than the text encoder's window is encoded in several windows where the encoder can.

        Args:
            prompt_syntax: `a1111` reads weights such as `(word:1.3)` and `[word]`, see `conditioning.weighting`.
            seed: picture i of the call uses seed + i; its noise is drawn on the CPU from its own generator.
            latents: initial noise [N, C, h, w], N(0, I), instead of drawn noise.
            batch_size: pictures at once; changes speed and memory only.
            init_image: start from this picture noised to `strength` in (0, 1] of the way (Meng et al. 2022, SDEdit).
            mask: with `init_image`, white where to draw anew, black where to keep it; a grey is one of the two.
            tiled: decode in pieces, for large pictures: "strips" gives the same picture in less memory,
                "tiles" needs little however large the picture is, and its colours may drift from tile to tile.
            callback: called in every sampling step, see `ldm.sampling`.
            progress: called with the number of pictures just finished.

        Raises:
            ValueError: naming the argument that is out of range.
            FloatingPointError: a picture is not finite even with the decoder in float32.
        """
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if tiled not in DECODERS:
            raise ValueError(f"tiled is {tiled!r}; it must be 'strips', 'tiles' or None")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(prompts) * num_images
        shape = self._latent_shape(height, width)
        visited = self._timesteps(self.setting("num_inference_steps", steps), strength if init_image else 1.0)
        draw = named_sampler(self.setting("sampler", sampler))
        scale = float(self.setting("guidance_scale", guidance_scale))
        start = None if init_image is None else self._encode(self._pixels(init_image, shape))
        keep = None if mask is None else self._keep_mask(mask, shape, start)
        channels = self._inpainting_channels(init_image, mask, shape)
        if channels is not None:  # the network sees what to keep, and from strength 1 on nothing of the rest
            start, keep = start if strength < 1 else None, None
        if latents is not None and latents.shape != (count, *shape):
            raise ValueError(f"latents has shape {list(latents.shape)}; this call needs {[count, *shape]}")
        images: list[Image.Image] = []
        first = 0
        for condition, unconditional in condition_batches(
            self.model.text_encoder, prompts, negative_prompt, num_images, batch_size, prompt_syntax
        ):
            rows = range(first, first + len(condition))
            rng = [_generator(seed + row) for row in rows]
            noise = randn_rows((len(rows), *shape), rng) if latents is None else latents[first : first + len(rows)]
            x = self._start(noise.to(self.device, torch.float32), start, visited)
            denoise = self._denoiser(condition, unconditional, scale, shape, channels)
            if keep is not None and start is not None:
                denoise = self._inpainting(denoise, start, keep)
            z = draw(denoise, x, self.schedule, visited, rng, callback)
            if keep is not None and start is not None:
                z = torch.lerp(z, start.expand_as(z), keep)
            for row in torch.split(z, 1):
                images.extend(to_images(self._decode(row, DECODERS[tiled])))
            if progress is not None:
                progress(len(rows))
            first += len(rows)
        return images

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

    def _denoiser(
        self,
        condition: Conditioning,
        unconditional: Conditioning,
        scale: float,
        shape: tuple[int, int, int],
        channels: Tensor | None = None,
    ) -> Denoiser:
        return guided_denoiser(
            self._network if channels is None else with_channels(self._network, channels),
            self.schedule,
            self.model.diffusion.prediction_type,
            self._kwargs(condition, shape),
            self._kwargs(unconditional, shape),
            scale,
            dtype=self.dtype,
        )

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

    def _inpainting(self, denoise: Denoiser, start: Tensor, keep: Tensor) -> Denoiser:
        """The same denoiser, sure of the kept part: x0 there is the given picture's (Song et al. 2021, app. I.2)."""

        def masked(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = self.schedule.alpha_sigma(t, like=x)
            x0 = torch.lerp(denoise(x, t).x0, start.expand_as(x), keep)
            return Prediction(x0, (x - alpha * x0) / sigma)

        return masked

    def _start(self, noise: Tensor, start: Tensor | None, visited: Tensor) -> Tensor:
        if start is None:
            return noise
        alpha, sigma = self.schedule.alpha_sigma(visited[:1], like=noise)
        return q_sample(start, noise, alpha, sigma)

    def _timesteps(self, steps: int, strength: float) -> Tensor:
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; it must lie in (0, 1]")
        diffusion = self.model.diffusion
        if not 1 <= steps <= diffusion.num_train_timesteps:
            raise ValueError(f"steps is {steps}; this model accepts 1 to {diffusion.num_train_timesteps}")
        visited = spaced_timesteps(
            steps, diffusion.num_train_timesteps, diffusion.timestep_spacing, diffusion.steps_offset
        )
        return visited[len(visited) - max(1, int(steps * strength)) :]

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        # every downsampling of the U-Net halves the latent once more
        factor = self.model.vae.downsample_factor
        multiple = factor * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        sides = [self.default_size if side is None else side for side in (height, width)]
        for name, side in zip(("height", "width"), sides, strict=True):
            if side < 1 or side % multiple:
                raise ValueError(f"{name} is {side}; it must be a positive multiple of {multiple} for this model")
        return self.model.vae.latent_channels, sides[0] // factor, sides[1] // factor

    def _pixels(self, image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
        factor = self.model.vae.downsample_factor
        fitted = fit(to_rgb(image), shape[2] * factor, shape[1] * factor)
        return to_tensor(fitted)[None].to(self.device)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.codec.encode(pixels).float()

    def _redrawn(self, mask: Image.Image, shape: tuple[int, int, int]) -> Tensor:
        """1 where to draw anew, else 0, [1, 1, H, W] in pixels."""
        factor = self.model.vae.downsample_factor
        sized = mask.convert("L").resize((shape[2] * factor, shape[1] * factor), Image.Resampling.LANCZOS)
        return (to_tensor(sized.convert("RGB"))[None, :1] >= 0).float().to(self.device)

    def _keep_mask(self, mask: Image.Image, shape: tuple[int, int, int], start: Tensor | None) -> Tensor:
        if start is None:
            raise ValueError("mask needs init_image, the picture whose black part is kept")
        return 1 - interpolate(self._redrawn(mask, shape), shape[1:])

    def _inpainting_channels(
        self, image: Image.Image | None, mask: Image.Image | None, shape: tuple[int, int, int]
    ) -> Tensor | None:
        """Mask and masked picture's latents [1, C + 1, h, w] of a U-Net with so many more channels, else None."""
        if self.model.unet.config.in_channels == shape[0]:
            return None
        if image is None or mask is None:
            raise ValueError("this model redraws a part of a picture: it needs init_image and mask")
        redrawn = self._redrawn(mask, shape)
        seen = self._encode(self._pixels(image, shape) * (1 - redrawn))
        return torch.cat([interpolate(redrawn, shape[1:]), seen], dim=1)


def with_channels(net: Network, channels: Tensor) -> Network:
    """The same network with further input channels [1, C, h, w] behind those of x."""

    def run(x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        return net(torch.cat([x, channels.to(x).expand(len(x), -1, -1, -1)], dim=1), t, **condition)

    return run


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
