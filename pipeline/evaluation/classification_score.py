"""The classification accuracy score [1]: how well a classifier recognises real images that has seen only samples.

A model whose samples lack what the real images have, in kind or in variety, teaches less. Beside it stands the same
classifier trained on as many real images: a model of the data could at best be as good.

[1] Ravuri and Vinyals 2019, Classification Accuracy Score for Conditional Generative Models, arXiv:1905.10887
"""

import torch

from ..images.image_set import ImageSplit
from .comparison import Pictures
from .judge import accuracy_of, look_at
from .judge_training import TrainingImages, train_judge


def accuracy_of_training_on(
    pictures: Pictures, num_classes: int, test: ImageSplit, device: torch.device, *, what: str
) -> float:
    """Return the share of test images that a classifier recognises which is trained on pictures alone.

    Args:
        pictures: with labels.
        num_classes: 2 or more.
        test: real images, labelled in the same numbering.
        device: to train on; minutes on a CPU, whatever the number of pictures up to 10,000.
        what: the pictures are, for the lines of progress.
    """
    assert pictures.labels is not None
    data = TrainingImages(images=pictures.images.numpy(), labels=pictures.labels, num_classes=num_classes)
    judge = train_judge(data, seed=0, device=device, description=f"training on {what}")
    seen = look_at(judge, test.images, f"test images, after training on {what}")
    assert seen.predicted is not None
    return accuracy_of(seen.predicted, test.labels)
