"""The vector quantizer: each vector becomes the index of its nearest codebook vector [1, section 3].

Two ways to learn the codebook: moving averages of the vectors that chose each code ("ema", [1, appendix A.1]) or the
gradient of the codebook loss ("gradient", [1, eq. 3]).

Departures from the paper:
- The codebook starts on vectors of the first training batch, with counts as if each code had been used equally often.
- The averages of a codebook that started on data are short at first, min(gamma, (1 + t) / (10 + t)) after t updates:
  the encoder moves fastest in its first steps, and a codebook that lags behind collapses onto a few codes.
- A moving average is counts and sums alone: no Laplace smoothing. A code that nobody chooses keeps its place, because
  its count and its sum decay together; before the count can vanish the code is revived.
- A code used less than `revival_threshold` of the mean use is dead: it moves onto a vector of the current batch, and
  its count and sum start anew, so that the next update does not undo the move [2].
- Where several processes train together, each update is over the vectors of all of them (`processes.py`).

Legend: B batch, D code dimension, S one to three positions (time, H W, or T H W), N = B * prod(S) vectors, K codes.

[1] van den Oord et al. 2017, Neural Discrete Representation Learning, arXiv:1711.00937
[2] Dhariwal et al. 2020, Jukebox, arXiv:2005.00341, section 3.2 (revival from the batch)
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .config import CodebookUpdate
from .processes import Spread, draw_distinct, of_first_process, sum_of_all, widened

DISTANCES_AT_ONCE = 2**22  # entries of the N x K distance table held at a time: 16 MB in float32
SMALLEST_COUNT = 1e-6  # below this a moving average holds no information, and the code stays where it is


@dataclass(frozen=True)
class QuantizerOutput:
    vectors: Tensor  # [B,D,*S] the chosen codebook vectors; their gradient goes to z unchanged (straight-through)
    codes: Tensor  # [B,*S] int64 in [0,K)
    loss: Tensor  # scalar, to add to the reconstruction loss
    commitment_loss: Tensor  # scalar, mean over elements of (z - sg[e])^2: pulls the encoder to the codes
    codebook_loss: Tensor  # scalar, mean over elements of (sg[z] - e)^2: pulls the codes to the encoder


class NotFiniteError(ValueError, FloatingPointError):
    """Says that a vector to quantize is NaN or infinite."""


class VectorQuantizer(nn.Module):
    """Maps z [B,D,*S] to the nearest codebook vectors, their codes and the losses that train both sides.

    Computes in float32 (float64 after `.double()`), whatever autocast says. In `eval()` no buffer changes, ever.

    In training mode each `forward` moves the codebook. Where a step of the optimizer takes several of them, set
    `deferred`, and call `start` before the first and `update` after the last: the codebook then moves once, over all
    their vectors. Where processes train together, all of them call these functions at the same time.

    Args:
        num_codes: K.
        code_dim: D.
        codebook_update: "ema" or "gradient".
        commitment_weight: beta, on the encoder's term only.
        ema_decay: gamma, the share of the old average kept at each step (a gradient codebook averages counts alone).
        revival_threshold: a code used less than this share of the mean use is dead and revived; 0 never revives.

    Raises:
        ValueError: an unknown `codebook_update`.
    """

    codebook: Tensor  # [K,D]
    counts: Tensor  # [K] moving average of how many vectors of a batch chose each code
    sums: Tensor  # [K,D] moving average of their sum; codebook = sums / counts (ema only)
    started: Tensor  # [] bool, whether the codebook has been set
    revived: Tensor  # [] int64, codes revived so far
    updates: Tensor  # [] updates since it started on data; infinite if it was set by hand

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        codebook_update: CodebookUpdate = "ema",
        commitment_weight: float = 0.25,
        ema_decay: float = 0.99,
        revival_threshold: float = 0.02,
    ) -> None:
        super().__init__()
        if codebook_update not in ("ema", "gradient"):
            raise ValueError(f"codebook_update: expected 'ema' or 'gradient', got {codebook_update!r}")
        self.num_codes, self.code_dim = num_codes, code_dim
        self.codebook_update = codebook_update
        self.commitment_weight = commitment_weight
        self.ema_decay = ema_decay
        self.revival_threshold = revival_threshold
        self.deferred = False  # whether `forward` leaves it to `update` to move the codebook
        self._waiting: list[tuple[Tensor, Tensor]] = []  # vectors [N,D] and codes [N] of each `forward` since
        codebook = torch.randn(num_codes, code_dim)
        if codebook_update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("sums", codebook.clone())
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("revived", torch.tensor(0))
        self.register_buffer("updates", torch.tensor(torch.inf))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B,D,*S]; in training mode also move the codebook, after its old state has given the result.

        A codebook that has not been set starts on the vectors of its first batch in training mode.

        Raises:
            ValueError: z is not [B,D,*S] with one to three dimensions in S, or holds a value that is not finite.
        """
        self._check_vectors(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.codebook.dtype)
            vectors = rearrange(z, "b d ... -> (b ...) d")
            if self.training and not self.started:
                self.start(z.detach())
            flat_codes = nearest_codes(vectors.detach(), self.codebook.detach())
            codes = flat_codes.reshape(z.shape[0], *z.shape[2:])
            chosen = self._look_up(codes)

            commitment_loss = F.mse_loss(z, chosen.detach())
            if self.codebook_update == "gradient":
                codebook_loss = F.mse_loss(chosen, z.detach())
                loss = codebook_loss + self.commitment_weight * commitment_loss
            else:
                codebook_loss = commitment_loss.detach()  # reported; the moving average minimises it
                loss = self.commitment_weight * commitment_loss
            if self.training:
                self._waiting.append((vectors.detach(), flat_codes))
                if not self.deferred:
                    self.update()
            return QuantizerOutput(
                vectors=chosen.detach() + (z - z.detach()),  # adds exactly 0, with the gradient of z
                codes=codes,
                loss=loss,
                commitment_loss=commitment_loss,
                codebook_loss=codebook_loss,
            )

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the codes [B,*S] of z [B,D,*S]. Changes nothing, in any mode. Raises ValueError as `forward` does."""
        self._check_vectors(z)
        with torch.autocast(z.device.type, enabled=False):
            vectors = rearrange(z.to(self.codebook.dtype), "b d ... -> (b ...) d")
            return nearest_codes(vectors, self.codebook).reshape(z.shape[0], *z.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the codebook vectors [B,D,*S] of integer codes [B,*S].

        Raises:
            ValueError: a code outside [0,K).
        """
        codes = codes.long()  # K itself may not fit into the type of the codes
        if codes.numel() and bool(((codes < 0) | (codes >= self.num_codes)).any()):  # CPU-GPU sync
            found = f"{int(codes.min())} to {int(codes.max())}"
            raise ValueError(f"expected codes from 0 to {self.num_codes - 1}, got codes from {found}")
        return self._look_up(codes)

    @torch.no_grad()
    def set_codebook(self, vectors: Tensor) -> None:
        """Put `vectors` [K,D] into the codebook, in place, and start its counts and sums from them.

        Each counts as much as one vector of a batch would: training moves it by the batches it meets from then on.

        Raises:
            ValueError: the shape is not [K,D], or a value is not finite.
        """
        if vectors.shape != self.codebook.shape:
            raise ValueError(f"expected a codebook {list(self.codebook.shape)}, got {list(vectors.shape)}")
        if not bool(torch.isfinite(vectors).all()):
            raise ValueError("expected a codebook of finite numbers, got nan or inf")
        self.codebook.copy_(vectors)
        self._restart_counts(torch.arange(self.num_codes, device=self.codebook.device), 1.0)
        self.started.fill_(True)
        self.updates.fill_(torch.inf)

    def _look_up(self, codes: Tensor) -> Tensor:
        return rearrange(F.embedding(codes, self.codebook), "b ... d -> b d ...")

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Set the codebook to K different vectors of z [B,D,*S]; with fewer than K, the rest are close to them.

        Raises:
            ValueError: as `forward`; where processes train together, in all of them.
        """
        self._check_shape(z)
        vectors = rearrange(z.to(self.codebook.dtype), "b d ... -> (b ...) d")
        spread = Spread.of(vectors)
        self._check_finite(torch.tensor(spread.largest))
        found = draw_distinct(vectors, self.num_codes)
        copies = found[torch.arange(self.num_codes - len(found), device=found.device) % len(found)]
        nearness = 0.01 * spread.deviation + 1e-3 * max(spread.largest, 0.1)
        self.set_codebook(torch.cat([found, copies + nearness * of_first_process(torch.randn_like(copies))]))
        every = torch.arange(self.num_codes, device=vectors.device)
        self._restart_counts(every, spread.count / self.num_codes)
        self.updates.zero_()

    @torch.no_grad()
    def update(self) -> None:
        """Take one step of the moving averages over what `forward` left since the last one, then revive dead codes.

        Does nothing if it left nothing, as in `eval()`.
        """
        if not self._waiting:
            return
        vectors, codes = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self.discard()
        counts, sums = code_statistics(vectors, codes, self.num_codes)
        decay = (1 - 9 / (10 + self.updates)).clamp_max(self.ema_decay).to(self.counts.dtype)
        self.updates += 1
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - decay)
        if self.codebook_update == "ema":
            self.sums.lerp_(sums.to(self.sums.dtype), 1 - decay)
            known = (self.counts > SMALLEST_COUNT)[:, None]
            means = self.sums / self.counts.clamp_min(SMALLEST_COUNT)[:, None]
            self.codebook.copy_(torch.where(known, means, self.codebook))
        self._revive(vectors, codes)

    def discard(self) -> None:
        """Forget what `forward` left since the last `update`."""
        self._waiting = []

    def _revive(self, vectors: Tensor, codes: Tensor) -> None:
        """Move dead codes onto different vectors of the batch that no code is equal to yet."""
        mean_use = self.counts.mean()
        dead = torch.nonzero(self.counts < self.revival_threshold * mean_use).flatten()  # CPU-GPU sync
        if len(dead) == 0:
            return
        missed = (vectors != self.codebook[codes]).any(dim=1)
        found = draw_distinct(vectors, len(dead), missed)
        dead = dead[: len(found)]
        self.codebook[dead] = found
        self._restart_counts(dead, mean_use)
        self.revived += len(dead)

    def _restart_counts(self, rows: Tensor, count: float | Tensor) -> None:
        self.counts[rows] = count
        if self.codebook_update == "ema":
            self.sums[rows] = self.codebook[rows] * count

    def _check_vectors(self, z: Tensor) -> None:
        self._check_shape(z)
        self._check_finite(z)

    def _check_shape(self, z: Tensor) -> None:
        if not 3 <= z.ndim <= 5 or z.shape[1] != self.code_dim:
            expected = f"[B,{self.code_dim},*S] with one to three dimensions in S"
            raise ValueError(f"expected vectors {expected}, got the shape {list(z.shape)}")

    def _check_finite(self, values: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):  # CPU-GPU sync
            raise NotFiniteError("expected finite vectors to quantize, got nan or inf; lower the learning rate")


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor, *, at_once: int = DISTANCES_AT_ONCE) -> Tensor:
    """Return the index [N] of the nearest of `codebook` [K,D] for each of `vectors` [N,D]; of equals, the lowest.

    argmin_k |z - e_k|^2 = argmin_k |e_k|^2 - 2 z e_k, one matrix product for every `at_once` distances.
    """
    squared_norms = codebook.square().sum(dim=1)
    rows = min(len(vectors), max(1, at_once // len(codebook)))
    # One table is used again for each chunk: freeing and taking it would fragment the heap.
    table = vectors.new_empty(rows, len(codebook))
    codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), max(1, rows)):
        chunk = vectors[start : start + rows]
        distances = torch.addmm(squared_norms, chunk, codebook.T, alpha=-2, out=table[: len(chunk)])
        torch.argmin(distances, dim=1, out=codes[start : start + len(chunk)])
    return codes


def code_statistics(vectors: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Return how many vectors chose each code, [K], and their sum for each code, [K,D], over all processes.

    Both are in float64 where the device has it, so that they hardly depend on the order of the additions.

    Args:
        vectors: [N,D] of this process.
        codes: int64 [N], of each.
        num_codes: K.
    """
    wide = widened(vectors)
    counts = torch.bincount(codes, minlength=num_codes).to(wide.dtype)
    sums = wide.new_zeros(num_codes, vectors.shape[1]).index_add_(0, codes, wide)
    both = sum_of_all(torch.cat([counts[:, None], sums], dim=1))
    return both[:, 0], both[:, 1:]
