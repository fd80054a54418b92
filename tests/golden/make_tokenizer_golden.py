"""Write the golden files of the tokenizer: small states, and what they answered on the day they were written.

    python -m tests.golden.make_tokenizer_golden

They are written again only when the network or the quantizer is meant to change; the commit says why.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenizer import VQVAE, TokenizerConfig, VectorQuantizer

from ..tokenizer.oracles import UPDATES, squared_distances, tiles

FOLDER = Path(__file__).parent
CONFIG = TokenizerConfig(
    hidden_channels=8, num_residual_layers=1, residual_channels=4, num_codes=16, code_dim=3, data_variance=0.07
)
QUANTIZER: dict[str, Any] = {"num_codes": 8, "code_dim": 3, "ema_decay": 0.8, "revival_threshold": 0.0}
MARGIN = 5e-5  # between the squared distances to the two nearest codes: no rounding of another machine swaps them


def trained_vqvae() -> VQVAE:
    torch.manual_seed(3)
    model, images = VQVAE(CONFIG), tiles(3) * torch.rand(8, 3, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        model(images).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def answers(model: VQVAE, images: Tensor) -> dict[str, Tensor]:
    result = model.eval()(images)
    return {
        "codes": model.encode(images),
        "decoded": model.decode(model.encode(images)),
        **{f"forward.{name}": value for name, value in vars(result).items()},
    }


def steps(quantizer: VectorQuantizer, batches: Tensor) -> Iterator[dict[str, Tensor]]:
    """What each step of training on `batches` [steps,B,D,H,W] gives, and the codebook it leaves."""
    optimizer = torch.optim.SGD([*quantizer.parameters(), torch.zeros(1, requires_grad=True)], lr=0.5)
    for batch in batches:
        optimizer.zero_grad()
        z = batch.clone().requires_grad_()
        result = quantizer.train()(z)
        (result.loss + (result.vectors**2).mean()).backward()
        optimizer.step()
        assert z.grad is not None
        state = {name: getattr(quantizer, name) for name in ("codebook", "counts")}
        told = {**vars(result), "gradient": z.grad, **state}
        yield {name: tensor.detach().clone() for name, tensor in told.items()}


def check_margin(vectors: Tensor, codebook: Tensor) -> None:
    """vectors [B,D,H,W]"""
    first, second = squared_distances(vectors.movedim(1, -1).flatten(0, -2), codebook).sort(dim=1).values.T[:2]
    assert (second - first).min() > MARGIN, "two codes are about equally near: take another seed"


def write_vqvae() -> None:
    model = trained_vqvae()
    images = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(9))
    told = answers(model, images)
    assert len(told["codes"].unique()) >= 6
    check_margin(model.encoder(images).detach(), model.quantizer.codebook)
    save_file(model.state_dict(), FOLDER / "tokenizer_state.safetensors")
    save_file({"images": images, **separate(told)}, FOLDER / "tokenizer_answers.safetensors")
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(asdict(CONFIG), indent=2) + "\n")


def write_quantizer() -> None:
    generator = torch.Generator().manual_seed(2)
    codebook = torch.randn(QUANTIZER["num_codes"], QUANTIZER["code_dim"], generator=generator)
    batches = torch.randn(4, 2, QUANTIZER["code_dim"], 2, 5, generator=generator)
    tensors = {"codebook": codebook, "batches": batches}
    for update in UPDATES:
        quantizer = VectorQuantizer(**QUANTIZER, codebook_update=update)
        quantizer.set_codebook(codebook)
        before = codebook
        for number, told in enumerate(steps(quantizer, batches)):
            check_margin(batches[number], before)
            before = told["codebook"]
            tensors |= {f"{update}.{number}.{name}": tensor for name, tensor in separate(told).items()}
    save_file(tensors, FOLDER / "tokenizer_steps.safetensors")


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: no two share memory."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def main() -> None:
    torch.set_num_threads(1)  # the same bits on every run, and about the same on every machine
    write_vqvae()
    write_quantizer()


if __name__ == "__main__":
    main()
