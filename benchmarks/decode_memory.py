"""Peak memory and seconds of decoding one large picture with a Stable Diffusion 1.x autoencoder, whole and in pieces.

    python benchmarks/decode_memory.py [--size 1024] [--tile 64] [--overlap 16] [--threads 0] [--ways WAY ...]

Weights are random, in float32, on the CPU. Each way runs in a fresh process; its peak resident set is read at the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

SD1_LEVELS = (128, 256, 512, 512)
MIB = 2**20
WAYS = ("strips", "tiled", "untiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--tile", type=int, default=64, help="side of a tile in latent positions")
    parser.add_argument("--overlap", type=int, default=16, help="what neighbouring tiles share, in latent positions")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 leaves its choice")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to measure")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    for way in args.ways:
        print(report(way, fresh_process(way)), flush=True)


def fresh_process(way: str) -> dict[str, float] | None:
    """Figures of one way; None where its process was killed, as happens when memory runs out.

    This process imports no torch: Linux counts the peak of the process that starts another into the other's.
    """
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:
        return None
    done.check_returncode()
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Peak resident set before and after one decoding in this process, and its seconds."""
    import torch

    from autoencoder import AutoencoderConfig, AutoencoderKL, strip_decode, tiled_decode

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderConfig(block_out_channels=SD1_LEVELS, layers_per_block=2, sample_size=512)).eval()
    z = torch.randn(1, 4, args.size // vae.downsample_factor, args.size // vae.downsample_factor)
    before, started = peak_mib(), time.perf_counter()
    with torch.no_grad():
        match args.way:
            case "strips":
                image = strip_decode(vae, z)
            case "tiled":
                image = tiled_decode(vae, z, args.tile, args.overlap)
            case _:
                image = vae.decode(z)
    seconds = time.perf_counter() - started
    return {"side": image.shape[-1], "before": before, "peak": peak_mib(), "seconds": seconds}


def peak_mib() -> float:
    """Largest resident set that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def report(way: str, figures: dict[str, float] | None) -> str:
    if figures is None:
        return f"{way:8s} killed, probably for lack of memory"
    side, before, peak, seconds = (figures[key] for key in ("side", "before", "peak", "seconds"))
    return f"{way:8s} {side:.0f} px  peak {peak:.0f} MiB ({before:.0f} before decoding)  {seconds:.1f} s"


if __name__ == "__main__":
    main()
