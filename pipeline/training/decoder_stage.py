"""A sharp decoder as the training loop sees it: encoder and codebook are frozen, decoder and discriminator learn.

Legend: B images in a batch, C channels, H' W' image, H W grid of codes, D code dimension.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from prior.uniforms import draw_uniforms
from tokenizer import VQVAE
from tokenizer.adversarial import Augmentation, SharpeningLosses, sharpening_losses
from tokenizer.discriminator import Discriminator
from tokenizer.networks import Decoder

from ..evaluation.decoder_distance import DecoderDistance
from ..images.holdout import MOST_HELD_OUT, held_out, split_rows
from ..images.image_set import ImageSplit
from ..images.png import above_and_below, save_grid
from ..images.preprocessing import to_float, to_uint8
from ..images.rows import evenly_spaced
from ..models.tensor_file import check_outlines, outlines_of
from ..runtime.process_group import ALONE, ProcessGroup
from .stage import Batch, Evaluation
from .tokenizer_stage import PREVIEW_IMAGES

WINDOWS = 9  # the moving average of the decoder's weights is over about the last ninth of the steps so far


class DecoderStage:
    """A decoder in training with its discriminator, for the frozen codes of a tokenizer.

    It logs `loss`, of no meaning of its own; `reconstruction`, squared error / data variance; `discriminator`, its
    hinge loss, 2 if it cannot tell real pictures from drawn ones; and `weight`, of its term in the decoder's loss.

    Where a batch is computed in parts, each has a weight of its own: with another number of parts, results differ by
    a little more than rounding.

    Args:
        tokenizer: on the device to train on, in `eval()` mode; its decoder is where the training starts.
        images: the training split of an image set, of which some are held out.
        group: the processes that share the training.
        measured: held-out items to evaluate on, at most.
    """

    def __init__(
        self, tokenizer: VQVAE, images: ImageSplit, group: ProcessGroup = ALONE, measured: int = MOST_HELD_OUT
    ) -> None:
        self.tokenizer, self.images, self.group = tokenizer.requires_grad_(False), images, group
        self.device = next(tokenizer.parameters()).device
        self.train_rows, self.held_out_rows = split_rows(held_out(images.names), measured)
        self.num_items = len(self.train_rows)
        self.decoder = copy.deepcopy(tokenizer.decoder).requires_grad_(True)
        self.discriminator = Discriminator(tokenizer.config).to(self.device)
        self.model = nn.ModuleDict({"decoder": self.decoder, "discriminator": self.discriminator})
        self.network: nn.Module = _Sharpening(self.decoder, self.discriminator, tokenizer.config.data_variance, group)
        self.compilable: tuple[nn.Module, ...] = ()
        self.average = AveragedModel(self.decoder, avg_fn=_moving_average)
        self.distance = DecoderDistance(tokenizer, images, self.held_out_rows, group=group)
        self.plain = self.distance.measure(tokenizer.decoder)

    def weights_to_use(self) -> dict[str, Tensor]:
        return self._averaged().state_dict()

    def load(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        return (self.images.batch_uint8(self.train_rows[indices]),)

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Average the weights that the last step led to."""
        self.average.update_parameters(self.decoder)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        images = to_float(batch.data[0])
        vectors = self._vectors(images)
        uniforms = draw_uniforms(batch.keys.tolist(), 3).to(torch.float32)
        augment = Augmentation.draw(uniforms, (vectors.shape[2], vectors.shape[3]), self.device)
        found: SharpeningLosses = self.network(vectors, images, augment)
        numbers = {"reconstruction": found.error, "discriminator": found.discriminator, "weight": found.weight}
        return {"loss": found.loss, **numbers}

    def finish_step(self) -> None:
        pass

    def discard_step(self) -> None:
        pass

    def names(self, indices: np.ndarray) -> list[str]:
        return [self.images.names[row] for row in self.train_rows[indices]]

    def status(self) -> dict[str, float]:
        return {}

    def evaluate(self) -> Evaluation:
        found, plain = self.distance.measure(self._averaged()), self.plain
        numbers = {"distance": found.distance, **asdict(found.error)}
        summary = f"of the plain decoder: distance {plain.distance:.4g}, nmse {plain.error.nmse:.4g}"
        return Evaluation(numbers=numbers, score_name="distance", summary=summary)

    def preview(self, path: Path, evaluation: Evaluation) -> None:
        """Write images above what the plain decoder and the sharp one make of their codes."""
        rows = self.held_out_rows[evenly_spaced(len(self.held_out_rows), PREVIEW_IMAGES)]
        images, columns = self.images.batch(rows).to(self.device), min(8, len(rows))
        vectors = self._vectors(images)
        decoded = [decoder(vectors).clamp(0, 1) for decoder in (self.tokenizer.decoder, self._averaged())]
        shown = [to_uint8(pictures) for pictures in (images, *decoded)]
        save_grid(above_and_below(*shown, columns=columns), path, columns=columns)

    def state(self) -> dict[str, Tensor]:
        return {f"average/{name}": tensor for name, tensor in self.average.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        check_outlines(outlines_of(self.state()), outlines_of(state))
        self.average.load_state_dict({name.removeprefix("average/"): tensor for name, tensor in state.items()})

    def _averaged(self) -> Decoder:
        """Return the decoder with the moving average of the weights."""
        averaged = self.average.module
        assert isinstance(averaged, Decoder)
        return averaged

    def _vectors(self, images: Tensor) -> Tensor:
        """Return the codebook's vectors [B,D,H,W] of the codes of images [B,C,H',W'] on the device, in float32."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.quantizer.lookup(self.tokenizer.encode(images))


class _Sharpening(nn.Module):
    """The losses of decoder and discriminator as a module, of which processes share the gradients."""

    def __init__(
        self, decoder: Decoder, discriminator: Discriminator, data_variance: float, group: ProcessGroup
    ) -> None:
        super().__init__()
        self.decoder, self.discriminator = decoder, discriminator
        self.data_variance, self.group = data_variance, group

    def forward(self, vectors: Tensor, images: Tensor, augment: Augmentation) -> SharpeningLosses:
        def mean_of_all(tensor: Tensor) -> Tensor:
            weighted = torch.cat([tensor.flatten() * len(images), tensor.new_tensor([len(images)])])
            *values, count = self.group.sums(weighted).to(tensor.dtype).split([tensor.numel(), 1])
            return (values[0] / count).reshape(tensor.shape)

        return sharpening_losses(
            self.decoder,
            self.discriminator,
            vectors,
            images,
            self.data_variance,
            augment=augment,
            mean_of_all=mean_of_all if self.group.count > 1 else None,
        )


def _moving_average(average: Tensor, latest: Tensor, updates: Tensor | int) -> Tensor:
    """Return the average after one more update; it forgets the slower the longer the run, whatever its length is."""
    return average.lerp(latest, WINDOWS / (updates + WINDOWS + 1))  # no float: a CPU-GPU sync for each weight
