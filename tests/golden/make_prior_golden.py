"""Write the golden files of the prior: a small seeded state, and what it answered on the day they were written.

    python -m tests.golden.make_prior_golden

They are written again only when the network or the draws are meant to change; the commit says why.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from prior import GatedPixelCNN, sample_codes
from prior.objective import grid_bits

from ..prior.oracles import generator, stream_of, tiny_prior

FOLDER = Path(__file__).parent
GRID = (4, 6)
SEED = 9


def questions(num_codes: int, num_classes: int) -> dict[str, Tensor]:
    """Codes [3,4,6], labels [3], and known codes [3,4,6] with -1 in the lower half."""
    codes = torch.randint(num_codes, (3, *GRID), generator=generator(SEED))
    known = codes.clone()
    known[:, GRID[0] // 2 :] = -1
    return {"codes": codes, "labels": torch.arange(3) % num_classes, "known": known}


@torch.no_grad()
def answers(prior: GatedPixelCNN, codes: Tensor, labels: Tensor, known: Tensor) -> dict[str, Tensor]:
    def draw(**choice: float) -> Tensor:
        return sample_codes(prior, 3, GRID, labels=labels, generator=generator(SEED), **choice)

    logits = prior(codes, labels)
    return {
        "logits": logits,
        "bits": grid_bits(logits, codes),
        "numbers": stream_of(SEED, 3, GRID),
        "drawn": draw(),
        "drawn_greedy": draw(temperature=0),
        "drawn_cut": draw(temperature=1.5, top_k=4, top_p=0.8),
        "drawn_completed": draw(known=known),
    }


def main() -> None:
    prior = tiny_prior(num_classes=3, seed=SEED).float()
    save_file(prior.state_dict(), FOLDER / "prior_state.safetensors")
    asked = questions(prior.config.num_codes, prior.config.num_classes)
    told = {name: value.contiguous() for name, value in answers(prior.double(), **asked).items()}
    save_file({**asked, **told}, FOLDER / "prior_answers.safetensors")
    (FOLDER / "prior_config.json").write_text(json.dumps(asdict(prior.config), indent=2) + "\n")


if __name__ == "__main__":
    main()
