"""`VQVAE.with_decoder`: other pictures of the same codes, by one encoder and one codebook."""

import itertools

import pytest
import torch

from tokenizer import VQVAE, TokenizerConfig
from tokenizer.networks import Decoder

from ..support import bits_of

CONFIG = {"hidden_channels": 8, "residual_channels": 4, "num_residual_layers": 1, "num_codes": 16, "code_dim": 3}


@pytest.mark.parametrize(("channels", "downsample"), itertools.product([1, 3], [2, 4, 8, 16]))
def test_the_codes_are_the_same_to_the_bit_and_the_pictures_are_not(channels: int, downsample: int) -> None:
    """Images of 3 x 5 codes; the other decoder is wider and deeper."""
    torch.manual_seed(channels * downsample)
    config = TokenizerConfig(in_channels=channels, downsample=downsample, **CONFIG)
    wider = TokenizerConfig(in_channels=channels, downsample=downsample, **(CONFIG | {"hidden_channels": 12}))
    plain, decoder = VQVAE(config).eval(), Decoder(wider)
    images = torch.rand(6, channels, 3 * downsample, 5 * downsample)
    with torch.no_grad():  # as many codes in use as there are
        plain.quantizer.set_codebook(plain.encoder(images).movedim(1, -1).reshape(-1, 3)[::5][:16])
    before = bits_of(plain)
    sharp = plain.with_decoder(decoder)
    codes = plain.encode(images)
    assert codes.unique().numel() > 12
    assert torch.equal(sharp.encode(images), codes)
    vectors = plain.quantizer.codebook[codes].movedim(-1, 1)
    with torch.no_grad():
        assert torch.equal(sharp.decode(codes), decoder(vectors).clamp(0, 1))
        assert torch.equal(plain.decode(codes), plain.decoder(vectors).clamp(0, 1))
    assert not torch.equal(sharp.decode(codes), plain.decode(codes))
    assert sharp.decode(codes).shape == images.shape
    assert bits_of(plain) == before


def test_encoder_and_codebook_are_shared_and_not_copied() -> None:
    plain = VQVAE(TokenizerConfig(in_channels=1, downsample=2, **CONFIG)).eval()
    decoder, state = Decoder(plain.config), torch.get_rng_state()
    sharp = plain.with_decoder(decoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert sharp.encoder is plain.encoder
    assert sharp.quantizer is plain.quantizer
    assert sharp.decoder is decoder is not plain.decoder
    assert not decoder.training
    assert [name for name, _ in sharp.named_children()] == [name for name, _ in plain.named_children()]
    plain.quantizer.set_codebook(torch.zeros(16, 3))
    assert not sharp.quantizer.codebook.any()
