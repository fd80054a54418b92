"""What a prior with classes says about the label of a grid: the likelihood of its codes under each of them.

With equally likely labels, p(label | codes) is the softmax of these log-likelihoods over the labels: the prior is a
classifier of what it draws [1, section 2], which never saw an image.

Legend: n grids, C classes, H W grid, K codes; a pair is one grid under one label.

[1] Ng and Jordan 2001, On Discriminative vs. Generative Classifiers, NeurIPS 14
"""

import torch
from torch import Tensor

from .attention import NUM_HEADS
from .model import GatedPixelCNN
from .objective import code_nats
from .sampling import evaluating

MOST_VALUES = 2**26  # of a forward pass, held at a time: 256 MB in float32


def label_log_likelihoods(prior: GatedPixelCNN, codes: Tensor) -> Tensor:
    """Return ln p(codes | label) for each label, [n,C] float64 on the CPU, of complete grids of codes [n,H,W].

    The cost is that of C forward passes over all grids. They run over blocks of pairs (`pairs_at_once`), whose size
    does not depend on n or C, and which change nothing but rounding.

    Args:
        prior: with classes; used in `eval()` mode, whatever mode it is in.
        codes: in [0,K), on any device.

    Raises:
        ValueError: the prior has no classes, or codes that are not [n,H,W].
    """
    num_classes, device = prior.config.num_classes, next(prior.parameters()).device
    if num_classes == 0:
        raise ValueError("expected a prior with classes, got one without")
    if codes.ndim != 3:
        raise ValueError(f"expected codes [n,H,W], got the shape {list(codes.shape)}")
    pairs = torch.arange(len(codes) * num_classes)  # (grid, label), the labels of one grid after another
    found = torch.empty(len(pairs), dtype=torch.float64)
    with evaluating(prior), torch.no_grad():
        for block in pairs.split(pairs_at_once(prior, codes[0].numel() if len(codes) else 1)):
            grids = codes[(block // num_classes).to(codes.device)].to(device)
            found[block] = -code_nats(prior(grids, (block % num_classes).to(device)), grids).sum(dim=(1, 2))
    return found.view(len(codes), num_classes)


def pairs_at_once(prior: GatedPixelCNN, num_positions: int) -> int:
    """Return how many pairs a forward pass may run over, so that about MOST_VALUES are held, and at least 1.

    At a position these are the logits, their logarithms and copies, 3 K; and the stacks of a layer, 12 of its width.
    With attention its scores and their softmax as well, which torch holds where it cannot fuse them.
    """
    config = prior.config
    for_each = 3 * config.num_codes + config.output_channels + 12 * config.channels
    if config.num_attending:
        for_each += 2 * NUM_HEADS * (num_positions + 1)
    return max(1, MOST_VALUES // (num_positions * for_each))
