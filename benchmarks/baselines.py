"""A VQ-VAE with its prior beside a VAE and a plain autoencoder with the same encoder and decoder.

    codegrid train-tokenizer --data DIR --steps 5000
    codegrid train-prior --steps 5000
    codegrid train-tokenizer --data DIR --steps 5000 --bottleneck vae --out checkpoints/vae
    codegrid train-tokenizer --data DIR --steps 5000 --bottleneck ae --out checkpoints/ae
    python -m benchmarks.baselines --vae checkpoints/vae --ae checkpoints/ae

Prints one table of the test split, and writes a picture of the VAE's samples (latents from N(0,1)) beside the VQ-VAE's
(codes from the prior).
"""

import math
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from pipeline import ImagePipeline
from pipeline.evaluation.evaluate import evaluate
from pipeline.images.image_set import split_of
from pipeline.images.png import enlarge, save_png, tile
from pipeline.models.checkpoint import read_info
from pipeline.models.loading import images_of, load_trained_autoencoder
from tokenizer import Baseline

from .latent_mixture import decode_latents, draw_standard_normal

COLUMNS, ROWS = 8, 8
SPACE = 16  # white pixels between the two halves


@click.command()
@click.option("--tokenizer", type=click.Path(path_type=Path), default=Path("checkpoints/tokenizer"), show_default=True)
@click.option("--prior", type=click.Path(path_type=Path), default=Path("checkpoints/prior"), show_default=True)
@click.option("--vae", type=click.Path(path_type=Path), required=True)
@click.option("--ae", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("baselines.png"), show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(tokenizer: Path, prior: Path, vae: Path, ae: Path, out: Path, seed: int) -> None:
    """Print one table and write one picture."""
    print("| bottleneck | nmse | PSNR | what it keeps of an image |\n|---|---|---|---|")
    for folder in (tokenizer, vae, ae):
        info, numbers = read_info(folder, "tokenizer"), evaluate(folder).reconstruction
        config = info.config
        positions = info.preprocessing["height"] * info.preprocessing["width"] // config["downsample"] ** 2
        kept = {
            "vq": f"{positions} codes of {config['num_codes']}, {positions * math.log2(config['num_codes']):.0f} bits",
            "vae": f"{positions * config['code_dim']} Gaussians, {kl_bits(folder):.0f} bits of KL",
            "ae": f"{positions * config['code_dim']} numbers",
        }[config["bottleneck"]]
        print(f"| {config['bottleneck']} | {numbers.nmse:.4f} | {numbers.psnr:.1f} dB | {kept} |", flush=True)
    pipeline = ImagePipeline.from_pretrained(tokenizer, prior, decoder="plain")
    of_vae = vae_samples(vae, pipeline.grid, seed)
    of_vqvae, _ = pipeline.sample(COLUMNS * ROWS, seed=seed)
    halves = [enlarge(tile(images, COLUMNS), images.shape[-1]) for images in (of_vae, of_vqvae)]
    white = halves[0].new_full((halves[0].shape[0], halves[0].shape[1], SPACE), 255)
    save_png(torch.cat([halves[0], white, halves[1]], dim=2), out)
    print(f"left the VAE's samples, right those of the VQ-VAE and its prior: {out}")


@torch.no_grad()
def kl_bits(folder: Path) -> float:
    """Return KL(posterior || N(0,1)) of the test images, in bits per image; 0 without a posterior."""
    trained = load_trained_autoencoder(folder, "cpu")
    model, info = trained.model, trained.info
    if model.config.bottleneck != "vae":
        return 0.0
    assert isinstance(model, Baseline)
    split = split_of(images_of(info, data=None, data_root=None), "test")
    subsets = np.array_split(np.arange(len(split)), math.ceil(len(split) / 250))
    nats = sum(float(model.bottleneck(model.encoder(split.batch(subset)))[1]) * len(subset) for subset in subsets)
    return nats / len(split) / math.log(2)


def vae_samples(folder: Path, grid: tuple[int, int], seed: int) -> Tensor:
    """Return images uint8 [n,C,H',W'] of latents drawn from N(0,1)."""
    model = load_trained_autoencoder(folder, "cpu").model
    assert isinstance(model, Baseline)
    latents, _ = draw_standard_normal(COLUMNS * ROWS, (model.config.code_dim, *grid), seed)
    return decode_latents(model, latents)


if __name__ == "__main__":
    main()
