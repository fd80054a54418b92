"""What the parts of a sharp decoder's training are worth: the same tokenizer, other ways to train its decoder.

    python -m benchmarks.decoder --tokenizer DIR                        # as train-decoder does
    python -m benchmarks.decoder --tokenizer DIR --balance 2.4
    python -m benchmarks.decoder --tokenizer DIR --largest-ratio 1
    python -m benchmarks.decoder --tokenizer DIR --unconditional
    python -m benchmarks.decoder --tokenizer DIR --decays

Prints the error of the reconstructions of the test images, and how far they are from training images, by a judge that
had no part in the training. What is used of a run is its best evaluation, by the distance in the encoder's features.
"""

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import click
from torch import nn

from pipeline.evaluation.comparison import Comparison
from pipeline.evaluation.judge_cache import open_judge
from pipeline.evaluation.picture_numbers import picture_numbers
from pipeline.evaluation.reconstruction import measure_reconstruction
from pipeline.models.inference import reconstruct_images
from pipeline.models.loading import images_of, load_trained_tokenizer
from pipeline.training.loop_settings import LoopSettings
from pipeline.training.run_folder import RunFolder
from pipeline.training.train_decoder import train_decoder
from tokenizer import TokenizerConfig, adversarial
from tokenizer.discriminator import WIDTH, Discriminator


@click.command()
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=int, help="[default: those of train-decoder]")
@click.option("--balance", default=adversarial.BALANCE, show_default=True, help="Of the two gradients.")
@click.option("--largest-ratio", default=adversarial.LARGEST_RATIO, show_default=True, help="Of their norms.")
@click.option("--decays", is_flag=True, help="The learning rate falls to 0, as in the two stages.")
@click.option("--unconditional", is_flag=True, help="The discriminator does not see the codes.")
@click.option("--samples", default=2000, show_default=True, help="Test images.")
@click.option("--seed", default=0, show_default=True, help="Which test images.")
def main(
    tokenizer: Path,
    steps: int | None,
    balance: float,
    largest_ratio: float,
    decays: bool,
    unconditional: bool,
    samples: int,
    seed: int,
) -> None:
    """Train a decoder one way, and measure it."""
    adversarial.BALANCE, adversarial.LARGEST_RATIO = balance, largest_ratio
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tokenizer"
        with loop_that_decays(decays), blind(unconditional):
            info = train_decoder(RunFolder(out=out), {"steps": steps}, tokenizer)
        print(f"balance {balance:g}, largest ratio {largest_ratio:g}, decays {decays}, unconditional {unconditional}")
        print(f"best step {info.step:,}, " + ", ".join(f"{name} {value:.4g}" for name, value in info.metrics.items()))
        measure(out, samples, seed)


def measure(folder: Path, samples: int, seed: int) -> None:
    """Print the numbers of both decoders of a tokenizer."""
    sharp = load_trained_tokenizer(folder, "auto")
    images = images_of(sharp.info)
    comparison = Comparison.of(images, samples, seed)
    judge, test = open_judge(images, comparison.class_names), comparison.test_images()
    reference = judge.look(comparison.training_images().images)
    for trained in (sharp.with_plain_decoder(), sharp):
        error, _ = measure_reconstruction(trained.model, images.test)
        seen = judge.look(reconstruct_images(trained.model, test.images))
        numbers = picture_numbers(reference, seen, test.labels).to_json()
        shown = {"nmse": error.nmse, "psnr": error.psnr, **numbers}
        print(f"{trained.decoder:>6}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()), flush=True)


def loop_that_decays(decays: bool) -> AbstractContextManager[object]:
    """Return a patch by which the learning rate falls to 0, if it is to."""
    settings = LoopSettings.from_settings
    return mock.patch.object(
        LoopSettings, "from_settings", lambda *a, **extra: settings(*a, **{**extra, "decays": decays})
    )


def blind(unconditional: bool) -> AbstractContextManager[object]:
    """Return a patch by which a discriminator sees nothing of the codes, if it is not to."""
    build = Discriminator.__init__

    def without_codes(self: Discriminator, config: TokenizerConfig) -> None:
        build(self, config)
        if unconditional:
            self.embedding = nn.Conv2d(config.code_dim, 2 * WIDTH, 1).requires_grad_(False)
            for parameter in self.embedding.parameters():
                nn.init.zeros_(parameter)

    return mock.patch.object(Discriminator, "__init__", without_codes)


if __name__ == "__main__":
    main()
