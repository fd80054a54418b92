"""Which stage is to blame: the measurement of test images, their reconstructions and samples (picture_metrics.py).

Several processes share the images, the columns and the classifiers of the classification accuracy score; the judge is
trained, or read, by the main process alone, which sends it to the others.

Legend: N pictures of each kind, C channels, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from prior import SamplingParameters
from prior.choosing import AS_TRAINED

from ..errors import InputError
from ..generation.image_pipeline import ImagePipeline
from ..generation.keep_best import check_kept_by_label
from ..generation.sample_folder import SampleOptions, sample_in_batches
from ..images.image_set import ImageSet
from ..models.inference import reconstruct_images
from ..models.labels import match_labels
from ..models.loading import TrainedPrior
from ..models.shares import map_on_all
from ..runtime.device import choose_device
from ..runtime.process_group import ALONE, ProcessGroup
from ..runtime.progress import Progress, with_progress
from .classification_score import accuracy_of_training_on
from .comparison import Comparison, JudgeKind, Pictures
from .inception import inception_features, load_inception
from .judge import Seen, TrainedJudge
from .judge_cache import open_judge
from .nearest_picture import NearestTraining, nearest_picture
from .picture_metrics import COLUMNS, WORDS, PictureMetrics
from .picture_numbers import PictureNumbers, distances, picture_numbers
from .reconstruction import ReconstructionNumbers, numbers_of

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """What to measure about samples."""

    samples: int  # N
    labels: tuple[str, ...] = ()  # of the samples, in turn; if empty, the classes of the chosen test images
    seed: int = 0  # of the samples, and of which images are compared
    parameters: SamplingParameters = field(default=AS_TRAINED)
    default_guidance: bool = False  # take the guidance that suits the prior in place of that of `parameters`
    keep_best: float = 1.0  # share of the candidates that the prior keeps, by their labels
    judge: JudgeKind = "auto"
    cas: bool = False  # whether to measure the classification accuracy score
    nearest: bool = False  # whether to find the nearest training images, and make a picture of them
    inception: Path | None = None  # file of Inception-v3's weights, to measure in its features as well

    @classmethod
    def of(
        cls,
        samples: int,
        *,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        guidance: float | None,
        keep_best: float,
        **others: Any,
    ) -> "QualityOptions":
        """Return the options of a command line, whose sampling options are those of `SampleOptions.of`."""
        sampling = SampleOptions.of(
            n=samples, temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, keep_best=keep_best
        )
        return cls(
            samples=samples,
            parameters=sampling.parameters,
            default_guidance=sampling.default_guidance,
            keep_best=keep_best,
            **others,
        )

    def sampling(self, prior: TrainedPrior) -> SampleOptions:
        """Return how this prior is sampled; the labels are chosen elsewhere."""
        options = SampleOptions(
            n=self.samples,
            seed=self.seed,
            parameters=self.parameters,
            default_guidance=self.default_guidance,
            keep_best=self.keep_best,
        )
        return options.for_prior(prior)


class SampleQuality:
    """The measurement of the samples of one pipeline: prepared first, which refuses what is wrong, and then made.

    Args:
        pipeline: to sample from.
        images: of the size that the tokenizer takes.
        options: what to measure.
        device: auto, cpu, cuda, cuda:1 or mps; of the judge.
        group: processes that share the measurement; each must make it, and gets the same numbers.

    Raises:
        InputError: the images do not suffice, an option does not fit them, or a file cannot be used.
    """

    def __init__(
        self,
        pipeline: ImagePipeline,
        images: ImageSet,
        options: QualityOptions,
        device: str,
        *,
        group: ProcessGroup = ALONE,
    ) -> None:
        self.pipeline, self.options, self.device, self.group = pipeline, options, device, group
        self.comparison = Comparison.of(images, options.samples, options.seed, options.judge)
        self.sampling = options.sampling(pipeline.trained_prior)
        self.labels = self._labels()
        check_kept_by_label(options.keep_best, self.labels, "samples without them")
        self.intended = self._intended()
        if options.cas:
            self._check_cas()
        weights = options.inception  # last, as they take seconds to read
        self.inception = None if weights is None else load_inception(weights).to(choose_device(device))

    def measure(self) -> PictureMetrics:
        """Train the judge, if it is not in the cache, sample, and measure all three columns.

        The picture of the nearest training images is made in the main process alone.
        """
        judge, columns, reference = self._judge(), self.columns(), self.comparison.training_images()
        seen = {name: judge.look(pictures.images, WORDS[name], self.group) for name, pictures in columns.items()}
        known = judge.look(reference.images, "training images", self.group)
        numbers = self._compared(known, seen, columns)
        error = self.error_of(columns["reconstructions"])
        numbers["reconstructions"] = replace(numbers["reconstructions"], nmse=error.nmse, psnr=error.psnr)
        if self.inception is not None:
            numbers = self._with_inception(numbers, reference, columns)
        picture = None
        if self.options.nearest:
            nearest = self._nearest(judge, columns, seen)
            numbers = {name: replace(numbers[name], nearest_train=nearest[name].median) for name in COLUMNS}
            if self.group.is_main:
                picture = nearest_picture(nearest["samples"], nearest["test"], self.comparison.images.train)
        cas, cas_real = self._cas(columns["samples"], reference) if self.options.cas else (None, None)
        return PictureMetrics(
            n=self.options.samples,
            seed=self.options.seed,
            judge=judge.name,
            judge_accuracy=judge.accuracy,
            test=numbers["test"],
            reconstructions=numbers["reconstructions"],
            samples=numbers["samples"],
            decoder=self.pipeline.trained_tokenizer.decoder,
            cas=cas,
            cas_real=cas_real,
            guidance=self.sampling.parameters.guidance,
            keep_best=self.sampling.keep_best,
            nearest=picture,
        )

    def columns(self) -> dict[str, Pictures]:
        """Return the pictures of each column."""
        test, reconstructions = self.comparison.test_images(), self.reconstructions()
        return {"test": test, "reconstructions": reconstructions, "samples": self.samples()}

    def reconstructions(self) -> Pictures:
        """Return the pictures of the second column alone: what the tokenizer makes of the test images."""
        test, tokenizer = self.comparison.test_images(), self.pipeline.trained_tokenizer
        images = reconstruct_images(
            tokenizer.model, test.images, folder=tokenizer.decoder_folder, progress=True, group=self.group
        )
        return Pictures(images=images, labels=test.labels)

    def error_of(self, reconstructions: Pictures) -> ReconstructionNumbers:
        """Return the error of the pictures of the second column: of the 8 bits that are compared."""
        difference = self.comparison.test_images().images.double() - reconstructions.images.double()
        return numbers_of(float((difference / 255).square().mean()), self.pipeline.tokenizer.config.data_variance)

    def _compared(
        self, reference: Seen, seen: dict[str, Seen], columns: dict[str, Pictures]
    ) -> dict[str, PictureNumbers]:
        """Return the numbers of each column in the judge's features."""
        return self._of_columns(
            lambda name: picture_numbers(reference, seen[name], columns[name].labels), "comparing with training images"
        )

    def _of_columns(self, measure: Callable[[str], Found], description: str) -> dict[str, Found]:
        """Return what `measure` returns for the name of each column; the processes take turns."""
        names = with_progress(COLUMNS, len(COLUMNS), description, "set")
        return dict(zip(COLUMNS, map_on_all(measure, names, self.group), strict=True))

    def _judge(self) -> TrainedJudge:
        """Return the judge, of the same weights in every process."""
        images, names = self.comparison.images, self.comparison.class_names
        judge = self.group.run_on_main(lambda: open_judge(images, names, self.device).on(torch.device("cpu")))
        return judge.on(choose_device(self.device))

    def samples(self) -> Pictures:
        """Return the pictures of the last column alone: new images."""
        with Progress(self.sampling.n, "sampling") as bar:
            batches = sample_in_batches(self.pipeline, self.sampling, self.labels, bar, self.group)
            images = [batch.images for batch in batches]
        return Pictures(images=torch.cat(images), labels=self.intended)

    def _labels(self) -> Tensor | None:
        """Return the labels of the samples in the prior's numbering, int64 [N]; None if they are drawn without."""
        images, rows = self.comparison.images, self.comparison.test_rows
        found = self.pipeline.labels_for(
            self.options.samples, self.options.labels or None, self.sampling.parameters.guidance
        )
        if self.options.labels or found is None:
            return found
        labels = match_labels(images.test.labels[rows], images.class_names, self.pipeline.trained_prior)
        return torch.from_numpy(labels)

    def _intended(self) -> np.ndarray | None:
        """Return the class that each sample should show in the judge's numbering; None if it, or the prior, has none.

        Raises:
            InputError: a class that the judge does not know.
        """
        names = self.comparison.class_names
        if self.labels is None or not names:
            return None
        wanted = [self.pipeline.class_names[label] for label in self.labels.tolist()]
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise InputError(
                expected=f"samples of classes that are in {self.comparison.images.source}",
                got=f"--label {unknown[0]}",
                do="choose other labels, or use --judge autoencoder",
            )
        index = {name: i for i, name in enumerate(names)}
        return np.array([index[name] for name in wanted], dtype=np.int64)

    def _check_cas(self) -> None:
        """Raise InputError unless the samples are of two classes or more, so that a classifier can learn from them."""
        classes = 0 if self.intended is None else len(np.unique(self.intended))
        if classes < 2:
            raise InputError(
                expected="--cas with samples of two classes or more that a classifier can learn from",
                got="samples of one class" if classes == 1 else "images, a prior, samples or a judge without classes",
                do="omit --cas, or sample more classes",
            )

    def _cas(self, samples: Pictures, reference: Pictures) -> tuple[float, float]:
        """Return the accuracy on real test images after training on samples, and on as many real ones."""
        num_classes, test = len(self.comparison.class_names), self.comparison.images.test
        device, teaching = choose_device(self.device), {"samples": samples, "as many real images": reference}
        on_samples, on_real = map_on_all(
            lambda what: accuracy_of_training_on(teaching[what], num_classes, test, device, what=what),
            teaching,
            self.group,
        )
        return on_samples, on_real

    def _with_inception(
        self, numbers: dict[str, PictureNumbers], reference: Pictures, columns: dict[str, Pictures]
    ) -> dict[str, PictureNumbers]:
        """Return the numbers with the distances in Inception-v3's features."""
        real = self._inception_features(reference, "training images")
        features = {name: self._inception_features(columns[name], WORDS[name]) for name in COLUMNS}
        found = self._of_columns(lambda name: distances(real, features[name]), "comparing Inception features")
        return {name: replace(numbers[name], inception=found[name]) for name in COLUMNS}

    def _inception_features(self, pictures: Pictures, what: str) -> np.ndarray:
        assert self.inception is not None
        images = pictures.images
        return inception_features(self.inception, lambda start, stop: images[start:stop], len(images), what, self.group)

    def _nearest(
        self, judge: TrainedJudge, columns: dict[str, Pictures], seen: dict[str, Seen]
    ) -> dict[str, NearestTraining]:
        """Return the pictures of each column with the training images nearest to them, of all there are."""
        training = judge.look(self.comparison.images.train.images, "all training images", self.group).directions
        return self._of_columns(
            lambda name: NearestTraining.of(columns[name].images, seen[name].directions, training),
            "finding the nearest training images",
        )
