"""The training of a sharp decoder: what it changes and what not, that it keeps the best, and that it resumes.

Legend: N images, C channels, H' W' image, D code dimension, H W grid of codes.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import InputError
from pipeline.evaluation.decoder_distance import DecoderDistance
from pipeline.evaluation.distances import frechet_distance
from pipeline.images.holdout import held_out
from pipeline.images.image_set import open_images
from pipeline.models.checkpoint import add_metrics, copy_checkpoint, has_checkpoint, load_training, read_info
from pipeline.models.decoders import has_sharp_decoder
from pipeline.models.loading import load_tokenizer, load_trained_tokenizer
from pipeline.runtime.folder_lock import only_writer
from pipeline.training import decoder_stage
from pipeline.training.decoder_stage import DecoderStage
from pipeline.training.recipes import SHARPENING_SHARE
from pipeline.training.run_folder import RunFolder, remove_decoder
from pipeline.training.train_decoder import train_decoder
from pipeline.training.train_tokenizer import train_tokenizer
from tokenizer import adversarial
from tokenizer.adversarial import SharpeningLosses, balance_weight, sharpening_losses
from tokenizer.networks import Decoder

from ..conftest import Codegrid, Trained
from ..support import digest_of
from .training_runs import Killed, evaluations_of, lines_of, losses_of, same_run

QUICK = ("--precision", "fp32", "--device", "cpu", "--batch-size", 4)


@pytest.fixture
def tokenizer(trained: Trained, tmp_path: Path) -> Path:
    """A tokenizer's folder that a test may change."""
    return Path(shutil.copytree(trained.tokenizer, tmp_path / "tokenizer"))


@pytest.fixture
def stage(trained: Trained) -> DecoderStage:
    torch.manual_seed(0)
    images = open_images(str(trained.images)).train
    return DecoderStage(load_trained_tokenizer(trained.tokenizer, "cpu").model, images)


def run(tokenizer: Path, steps: int = 3, out: Path | None = None, lr: float = 1e-3, **changes: bool) -> None:
    folder = RunFolder(out=tokenizer if out is None else out, device="cpu", **changes)
    train_decoder(folder, {"steps": steps, "precision": "fp32", "batch_size": 4, "lr": lr}, tokenizer)


def decoder_weights(tokenizer: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(tokenizer / "decoder" / "model.safetensors")


def within_losses(patch: pytest.MonkeyPatch, act: Callable[[int, SharpeningLosses], SharpeningLosses]) -> None:
    """Make `act` see the number of each step, from 1, and its losses, and return those to take."""
    calls: list[int] = []

    def losses(*arguments: Any, **options: Any) -> SharpeningLosses:
        calls.append(len(calls) + 1)
        return act(calls[-1], sharpening_losses(*arguments, **options))

    patch.setattr(decoder_stage, "sharpening_losses", losses)


def with_loss(found: SharpeningLosses, loss: Tensor) -> SharpeningLosses:
    return SharpeningLosses(loss=loss, error=found.error, discriminator=found.discriminator, weight=found.weight)


# What changes, and what does not


def test_in_the_tokenizers_own_folder_nothing_changes_but_the_decoder(tokenizer: Path, codegrid: Codegrid) -> None:
    before = digest_of(tokenizer)
    outcome = codegrid("train-decoder", "--tokenizer", tokenizer, "--steps", 3, *QUICK)
    assert (outcome.status, outcome.error_lines) == (0, [])
    own = {name: digest for name, digest in digest_of(tokenizer).items() if not str(name).startswith("decoder")}
    assert own == {name: digest for name, digest in before.items() if not str(name).startswith("decoder")}
    tokenizer_info, info = read_info(tokenizer, "tokenizer"), read_info(tokenizer / "decoder", "decoder")
    assert info.tokenizer_fingerprint == tokenizer_info.fingerprint != info.fingerprint
    assert f"decoder {info.fingerprint} for the codes of the tokenizer {info.tokenizer_fingerprint}" in outcome.out
    assert info.class_names == tokenizer_info.class_names
    assert info.training["data"] == tokenizer_info.training["data"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("downsample", [2, 4, 8, 16])
def test_a_copy_with_a_sharp_decoder_gives_the_same_codes_for_any_image(
    tmp_path: Path, image_folder: Path, channels: int, downsample: int
) -> None:
    small = {"hidden_channels": 6, "residual_channels": 4, "num_residual_layers": 1, "num_codes": 16, "code_dim": 4}
    image = {"data": str(image_folder), "image_size": (16, 32), "channels": channels, "downsample": downsample}
    source, out = tmp_path / "source", tmp_path / "copy"
    train_tokenizer(RunFolder(out=source, device="cpu"), {"steps": 2, "precision": "fp32", **small, **image})
    run(source, steps=8, out=out, lr=0.03)
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert read_info(out, "tokenizer").fingerprint == read_info(source, "tokenizer").fingerprint
    assert not (source / "decoder").exists()
    plain, sharp = load_tokenizer(source), load_tokenizer(out)
    images = torch.rand(200, channels, 16, 32, generator=torch.Generator().manual_seed(0))
    codes = plain.encode(images)
    assert torch.equal(codes, sharp.encode(images))
    assert not torch.equal(plain.decode(codes), sharp.decode(codes))
    assert torch.equal(plain.decode(codes), load_tokenizer(out, decoder="plain").decode(codes))


def test_a_prior_from_before_samples_with_the_sharp_decoder(
    tokenizer: Path, trained: Trained, tmp_path: Path, codegrid: Codegrid
) -> None:
    command = ("sample", "--n", 3, "--tokenizer", tokenizer, "--prior", trained.prior, "--device", "cpu")
    assert codegrid(*command, "--out", tmp_path / "before").status == 0
    run(tokenizer, steps=8, lr=0.03)
    outcome = codegrid(*command, "--out", tmp_path / "after")
    assert (outcome.status, outcome.error_lines) == (0, [])
    codes = [np.load(tmp_path / name / "codes.npy") for name in ("before", "after")]
    assert np.array_equal(*codes)
    pictures = [np.asarray(Image.open(tmp_path / name / "images" / "00000.png")) for name in ("before", "after")]
    assert not np.array_equal(*pictures)
    record = json.loads((tmp_path / "after" / "sample.json").read_text("utf-8"))
    assert record["fingerprints"]["decoder"] == read_info(tokenizer / "decoder", "decoder").fingerprint


def test_the_default_is_a_share_of_the_tokenizers_steps(tokenizer: Path, codegrid: Codegrid) -> None:
    outcome = codegrid("train-decoder", "--tokenizer", tokenizer, *QUICK)
    steps = max(1, round(SHARPENING_SHARE * read_info(tokenizer, "tokenizer").step))
    assert (outcome.status, read_info(tokenizer / "decoder", "decoder").training["steps"]) == (0, steps)


def test_the_preview_shows_images_the_plain_and_the_sharp_decoder(stage: DecoderStage, tmp_path: Path) -> None:
    with torch.no_grad():
        stage.average.module.layers[-1].bias += 1
        stage.preview(tmp_path / "p.png", stage.evaluate())
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    height, width = stage.images.images.shape[2:]
    count, times = min(16, len(stage.held_out_rows)), max(1, round(64 / width))
    assert count < 8
    assert picture.shape[:2] == (times * (3 * (height + 2) + 2), times * (count * (width + 2) + 2))
    rows = [picture[times * (row * (height + 2) + 2) :][: times * height, 2 * times :] for row in range(3)]
    original = stage.images.images[stage.held_out_rows[0]].transpose(1, 2, 0)
    assert np.array_equal(rows[0][::times, : times * width : times], original)
    assert int(rows[2].astype(int).sum()) > int(rows[1].astype(int).sum())  # the brighter one is last


# The distance, and the average


def test_the_distance_is_that_of_all_positions_of_the_encoders_hidden_layer(stage: DecoderStage) -> None:
    model, rows = stage.tokenizer, stage.held_out_rows
    other = Decoder(model.config)
    with torch.no_grad():
        other.layers[-1].get_parameter("bias").add_(torch.tensor([-0.6, 0.0, 0.6]))  # some pixels are beyond [0,1]
    images = stage.images.batch(rows)

    def positions(pictures: Tensor) -> np.ndarray:
        x = pictures - 0.5
        for layer in list(model.encoder.layers)[:-1]:
            x = layer(x)
        return np.stack(
            [x[n, :, i, j].numpy() for n in range(len(x)) for i in range(x.shape[2]) for j in range(x.shape[3])]
        )

    with torch.no_grad():
        found = stage.distance.measure(other)
        decoded = other(model.quantizer.lookup(model.encode(images))).clamp(0, 1)
        real, drawn = positions(images), positions(decoded)
    deviation = np.maximum(real.std(axis=0), 0.01 * real.std(axis=0).mean())
    assert found.distance == pytest.approx(frechet_distance(real / deviation, drawn / deviation), rel=1e-3)
    assert found.error.mse == pytest.approx(float((decoded - images).square().mean()), rel=1e-5)
    assert found.error.nmse == pytest.approx(found.error.mse / model.config.data_variance)


def test_of_many_images_evenly_spaced_ones_are_measured(stage: DecoderStage, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, positions = stage.train_rows, math.prod(stage.tokenizer.grid(*stage.images.images.shape[2:]))

    def measured(most: int) -> list[int]:
        monkeypatch.setattr("pipeline.evaluation.decoder_distance.MOST_POSITIONS", most)
        return list(DecoderDistance(stage.tokenizer, stage.images, rows).rows.tolist())

    assert len(rows) > 3
    assert measured(3 * positions + 1) == [rows[int(place)] for place in np.linspace(0, len(rows) - 1, 3)]
    assert len(measured(positions - 1)) == 1  # of an image that has more positions


def test_one_image_of_one_code_can_be_measured(stage: DecoderStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.tokenizer.encoder, "features", lambda images: images[:, :2, :1, :1])
    distance = DecoderDistance(stage.tokenizer, stage.images, stage.train_rows[:1])
    assert math.isfinite(distance.measure(stage.tokenizer.decoder).distance)


def test_a_decoder_of_nan_is_noticed(stage: DecoderStage) -> None:
    """As what a training step gives that is not finite, so that the loop can go back."""
    with torch.no_grad():
        stage.average.module.layers[-1].bias.fill_(math.nan)
        with pytest.raises(FloatingPointError, match="pixels that are NaN from the decoder"):
            stage.evaluate()


def test_what_is_measured_and_written_is_the_moving_average(stage: DecoderStage) -> None:
    expected = {name: tensor.clone() for name, tensor in stage.decoder.state_dict().items()}
    for name, tensor in stage.weights_to_use().items():
        assert torch.equal(tensor, expected[name])  # before the first step it is the plain decoder
    for step in range(4):
        losses_of(stage, np.arange(4))
        for name, tensor in stage.decoder.state_dict().items():
            share = 1 if step == 0 else 9 / (10 + step)
            expected[name] = (1 - share) * expected[name] + share * tensor
        with torch.no_grad():
            for parameter in stage.decoder.parameters():
                parameter += 0.1
    for name, tensor in stage.weights_to_use().items():
        torch.testing.assert_close(tensor, expected[name])
    averaged = Decoder(stage.tokenizer.config)
    averaged.load_state_dict(stage.weights_to_use())
    with torch.no_grad():
        assert stage.evaluate().numbers["distance"] == stage.distance.measure(averaged).distance


def test_only_the_decoder_and_its_discriminator_learn(stage: DecoderStage) -> None:
    before = {name: tensor.clone() for name, tensor in stage.tokenizer.state_dict().items()}
    losses_of(stage, np.arange(5))["loss"].backward()
    assert all(parameter.grad is None for parameter in stage.tokenizer.parameters())
    assert all(parameter.grad is not None for parameter in stage.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.tokenizer.state_dict().items())


def test_it_learns_from_the_codes_of_images_that_are_not_held_out(
    stage: DecoderStage, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(str(trained.images)).train
    aside = held_out(images.names)
    assert stage.train_rows.tolist() == np.flatnonzero(~aside).tolist()
    assert stage.distance.rows.tolist() == np.flatnonzero(aside).tolist()
    seen: list[tuple[Tensor, Tensor]] = []

    def losses(*arguments: Any, **options: Any) -> SharpeningLosses:
        seen.append((arguments[2], arguments[3]))
        return sharpening_losses(*arguments, **options)

    monkeypatch.setattr(decoder_stage, "sharpening_losses", losses)
    model, indices = load_tokenizer(trained.tokenizer), np.array([4, 0, 7])
    types: list[torch.dtype] = []
    stage.tokenizer.encoder.register_forward_hook(lambda module, images, latents: types.append(latents.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # in which a code may be another
        losses_of(stage, indices)
    batch = images.batch(stage.train_rows[indices])
    assert torch.equal(seen[0][1], batch)
    assert torch.equal(seen[0][0], model.quantizer.lookup(model.encode(batch)))
    assert types == [torch.float32]


# The best is kept


def test_a_discriminator_that_diverges_leaves_the_best_decoder(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 20 on its term is given any weight, and the pictures are ruined."""
    calls: list[int] = []

    def diverge(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return balance_weight(*arguments) if len(calls) < 20 else torch.tensor(1e6)

    monkeypatch.setattr(adversarial, "balance_weight", diverge)
    run(tokenizer, steps=60, lr=0.3)
    scores = {line["step"]: line["distance"] for line in lines_of(tokenizer / "decoder", "held_out")}
    best = min(scores, key=lambda step: scores[step])
    assert 0 < best < 40
    assert max(score for step, score in scores.items() if step > best) > 1.5 * scores[best]
    info = read_info(tokenizer / "decoder", "decoder")
    assert (info.step, info.metrics["distance"]) == (best, scores[best])
    left = load_trained_tokenizer(tokenizer, "cpu")
    images = open_images(info.training["data"]).train
    distance = DecoderDistance(left.model, images, np.flatnonzero(held_out(images.names)))
    with torch.no_grad():
        assert distance.measure(left.model.decoder).distance == pytest.approx(scores[best], rel=1e-6)


def test_if_nothing_is_better_the_plain_decoder_stays(
    tokenizer: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    within_losses(monkeypatch, lambda step, found: with_loss(found, -found.loss))
    outcome = codegrid("train-decoder", "--tokenizer", tokenizer, "--steps", 20, *QUICK)
    assert outcome.status == 0
    assert "note: none was better than the plain decoder" in outcome.out
    info = read_info(tokenizer / "decoder", "decoder")
    assert info.step == 0
    plain = load_tokenizer(tokenizer, decoder="plain").decoder.state_dict()
    written = decoder_weights(tokenizer)
    assert written.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in written.items())
    assert load_trained_tokenizer(tokenizer, "cpu").decoder == "plain"
    assert not has_sharp_decoder(tokenizer)
    with pytest.raises(InputError, match=r"expected a sharp decoder in .*, got the plain one, .* more --steps"):
        load_tokenizer(tokenizer, decoder="sharp")


def test_losses_that_are_not_finite_end_it_with_the_best_decoder(
    tokenizer: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    within_losses(monkeypatch, lambda step, found: with_loss(found, found.loss * math.nan) if step > 8 else found)
    monkeypatch.setattr("pipeline.training.loop.SAVE_EVERY_SECONDS", 0)
    outcome = codegrid("train-decoder", "--tokenizer", tokenizer, "--steps", 16, *QUICK)
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert re.match(r"Error: expected finite losses, got loss = nan at step 9, in the batch of .*\.png", outcome.err)
    assert read_info(tokenizer / "decoder", "decoder").step > 0
    assert load_trained_tokenizer(tokenizer, "cpu").decoder == "sharp"


def test_the_learning_rate_does_not_decay(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.schedule.WARMUP_STEPS", 1)
    run(tokenizer, steps=4, lr=0.001)
    assert [line["learning_rate"] for line in lines_of(tokenizer / "decoder", "train")] == [0.001] * 4


# It resumes


@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_killed_run_resumes_to_the_same_bytes(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr("pipeline.training.loop.SAVE_EVERY_SECONDS", 0)
    once, again = tmp_path / "once", tmp_path / "again"
    run(tokenizer, steps=8, out=once)

    def kill(now: int, found: SharpeningLosses) -> SharpeningLosses:
        if now == step:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        within_losses(patch, kill)
        with pytest.raises(Killed):
            run(tokenizer, steps=8, out=again)
    assert (again / "decoder" / "model.safetensors").exists() == (step > 1)
    load_tokenizer(again)  # at any moment
    run(tokenizer, steps=8, out=again, resume=True)
    same_run(once / "decoder", again / "decoder")
    assert [line["step"] for line in evaluations_of(again / "decoder")] == list(range(9))


def test_a_finished_run_goes_on_with_more_steps(tokenizer: Path, codegrid: Codegrid) -> None:
    command = ("train-decoder", "--tokenizer", tokenizer, *QUICK)
    assert codegrid(*command, "--steps", 2).status == 0
    again = codegrid(*command, "--steps", 2)
    assert again.status == 1
    assert "--resume to continue or --force" in again.error_lines[0]
    assert codegrid(*command, "--steps", 4, "--resume").status == 0
    assert lines_of(tokenizer / "decoder", "held_out")[-1]["step"] == 4
    changed = codegrid(*command, "--steps", 6, "--resume", "--lr", 0.5)
    assert changed.status == 1
    assert "expected --resume with lr" in changed.error_lines[0]


def test_the_state_of_another_decoder_is_refused(stage: DecoderStage) -> None:
    state = stage.state()
    stage.load_state(state)
    name = next(iter(state))
    with pytest.raises(ValueError, match=re.escape(name)):
        stage.load_state({key: tensor for key, tensor in state.items() if key != name})


# What is refused


def test_another_tokenizer_in_out_is_not_replaced(tokenizer: Path, trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train_tokenizer(
        RunFolder(out=other, device="cpu"),
        {"data": str(trained.images), "steps": 1, "hidden_channels": 4, "num_codes": 8, "precision": "fp32"},
    )
    before = digest_of(other)
    for force in (False, True):
        with pytest.raises(InputError, match=r"a copy of it in --out .*fingerprint .*name another --out"):
            run(tokenizer, out=other, force=force)
    assert digest_of(other) == before


def test_a_folder_with_files_of_the_user_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="an empty or new folder as --out"):
        run(tokenizer, out=out)
    assert [path.name for path in out.iterdir()] == ["diary.txt"]


def test_a_decoder_of_other_codes_does_not_resume(tokenizer: Path, trained: Trained, tmp_path: Path) -> None:
    run(tokenizer)
    other = tmp_path / "other"
    train_tokenizer(
        RunFolder(out=other, device="cpu"),
        {"data": str(trained.images), "steps": 1, "hidden_channels": 8, "num_codes": 16, "precision": "fp32"},
    )
    shutil.copytree(tokenizer / "decoder", other / "decoder")
    before = digest_of(other)
    with pytest.raises(InputError, match=r"a decoder in .* made with this tokenizer .*train another with --force"):
        run(other, steps=9, resume=True)
    assert digest_of(other) == before


def test_a_copy_is_of_the_weights_that_were_loaded_and_written_once(tokenizer: Path, tmp_path: Path) -> None:
    """Not of those that a training of the tokenizer has saved meanwhile."""
    fingerprint, out = read_info(tokenizer, "tokenizer").fingerprint, tmp_path / "copy"
    with pytest.raises(InputError, match=r"expected the tokenizer another in .*, got another by now, .*; wait until"):
        copy_checkpoint(tokenizer, out, "tokenizer", "another")
    assert not out.exists()
    copy_checkpoint(tokenizer, out, "tokenizer", fingerprint)
    info = read_info(out, "tokenizer")
    assert info == replace(read_info(tokenizer, "tokenizer"), training_sha256="")  # there is no such file
    add_metrics(out, info, {"added": 1.0})
    assert read_info(out, "tokenizer").metrics == {**info.metrics, "added": 1.0}
    copy_checkpoint(tokenizer, out, "tokenizer", fingerprint)
    assert "added" in read_info(out, "tokenizer").metrics


def test_nobody_else_may_write_into_the_folder_of_the_tokenizer(tokenizer: Path) -> None:
    with only_writer(tokenizer, "training run"), pytest.raises(InputError, match="training run"):
        run(tokenizer)
    assert not (tokenizer / "decoder").exists()


def test_a_model_without_codes_is_refused(trained: Trained, tmp_path: Path, codegrid: Codegrid) -> None:
    small = ("--hidden-channels", 4, "--steps", 1, "--precision", "fp32", "--device", "cpu")
    out = tmp_path / "vae"
    assert (
        codegrid("train-tokenizer", "--data", trained.images, "--bottleneck", "vae", "--out", out, *small).status == 0
    )
    outcome = codegrid("train-decoder", "--tokenizer", out, "--steps", 1)
    assert outcome.status == 1
    assert "expected a tokenizer with codes" in outcome.error_lines[0]
    assert not (out / "decoder").exists()
    sharp = codegrid("train-tokenizer", "--data", trained.images, "--bottleneck", "ae", "--sharp", "--out", out, *small)
    assert "expected --sharp with --bottleneck vq only" in sharp.error_lines[0]


# The last phase of train-tokenizer --sharp


SMALL = ("--hidden-channels", 8, "--residual-channels", 4, "--num-residual-layers", 1, "--num-codes", 16)


def test_sharp_trains_a_decoder_at_the_end(trained: Trained, tmp_path: Path, codegrid: Codegrid) -> None:
    out, plain = tmp_path / "sharp", tmp_path / "plain"
    command = ("train-tokenizer", "--data", trained.images, "--steps", 8, "--seed", 3, *SMALL, *QUICK)
    command = (*command, "--optimizer", "adam")
    assert codegrid(*command, "--out", plain).status == 0
    outcome = codegrid(*command, "--out", out, "--sharp")
    assert (outcome.status, outcome.error_lines) == (0, [])
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    info = read_info(out / "decoder", "decoder")
    assert info.tokenizer_fingerprint == read_info(out, "tokenizer").fingerprint
    settings = {name: info.training[name] for name in ("steps", "batch_size", "seed", "precision", "optimizer")}
    assert settings == {"steps": 2, "batch_size": 4, "seed": 3, "precision": "fp32", "optimizer": "adam"}
    assert "next: codegrid train-prior" in outcome.out


def test_sharp_resumes_in_whichever_phase_it_was_killed(
    trained: Trained, tmp_path: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.loop.SAVE_EVERY_SECONDS", 0)
    once, again = tmp_path / "once", tmp_path / "again"
    command = ("train-tokenizer", "--data", trained.images, "--steps", 12, "--sharp", *SMALL, *QUICK)
    assert codegrid(*command, "--out", once).status == 0

    def stop(step: int, found: SharpeningLosses) -> SharpeningLosses:
        if step == 3:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        within_losses(patch, stop)
        assert codegrid(*command, "--out", again).status == 130
    assert codegrid("train-tokenizer", "--out", again, "--resume").status == 0  # `--sharp` is remembered
    same_run(once / "decoder", again / "decoder")
    assert codegrid("train-tokenizer", "--out", again, "--resume", "--steps", 16).status == 0  # other weights
    info, state = read_info(again / "decoder", "decoder"), load_training(again / "decoder")
    assert info.tokenizer_fingerprint == read_info(again, "tokenizer").fingerprint
    assert (info.training["steps"], state.values["step"]) == (4, 4)
    assert load_trained_tokenizer(again, "cpu", decoder="sharp").decoder == "sharp"


def test_sharp_replaces_a_damaged_decoder(tokenizer: Path, codegrid: Codegrid) -> None:
    run(tokenizer, steps=1)
    (tokenizer / "decoder" / "config.json").write_text("{")
    shutil.rmtree(tokenizer / "decoder" / "previous", ignore_errors=True)
    steps = read_info(tokenizer, "tokenizer").step
    command = ("train-tokenizer", "--out", tokenizer, "--resume", "--steps", steps, "--sharp", "--device", "cpu")
    assert codegrid(*command).status == 0
    assert read_info(tokenizer / "decoder", "decoder").training["steps"] == max(1, round(SHARPENING_SHARE * steps))


def test_sharp_acts_on_a_run_that_is_done(tokenizer: Path, codegrid: Codegrid) -> None:
    """Also on one of an earlier version, whose config does not have the setting."""
    info = read_info(tokenizer, "tokenizer")
    del info.training["sharp"]
    add_metrics(tokenizer, info, {})
    resume = ("train-tokenizer", "--out", tokenizer, "--resume", "--steps", info.step, "--device", "cpu")
    assert codegrid(*resume).status == 0
    assert not (tokenizer / "decoder").exists()
    assert codegrid(*resume, "--sharp", "--precision", "bf16").status == 0
    decoder = read_info(tokenizer / "decoder", "decoder")
    assert decoder.tokenizer_fingerprint == info.fingerprint
    assert (info.training["precision"], decoder.training["precision"]) == ("fp32", "bf16")


@pytest.mark.parametrize("place", ["file", "link", "foreign"])
def test_sharp_refuses_what_is_in_the_place_of_the_decoder_before_it_trains(
    trained: Trained, tmp_path: Path, codegrid: Codegrid, place: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if place == "file":
        (out / "decoder").write_text("mine")
    elif place == "link":
        (out / "decoder").symlink_to(tmp_path)
    else:
        (out / "decoder").mkdir()
        (out / "decoder" / "model.safetensors").write_text("mine")
    command = ("train-tokenizer", "--data", trained.images, "--steps", 1, "--out", out, "--force", *SMALL, *QUICK)
    outcome = codegrid(*command, "--sharp")
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert str(out / "decoder") in outcome.error_lines[0]
    assert [path.name for path in out.iterdir()] == ["decoder"]


def test_a_decoder_that_a_link_leads_to_is_not_removed(tokenizer: Path, trained: Trained, codegrid: Codegrid) -> None:
    run(tokenizer, steps=1)
    elsewhere = (tokenizer / "decoder").rename(tokenizer.parent / "elsewhere")
    (tokenizer / "decoder").symlink_to(elsewhere)
    before = digest_of(elsewhere)
    command = ("train-tokenizer", "--data", trained.images, "--steps", 1, "--out", tokenizer, "--force", *SMALL, *QUICK)
    assert codegrid(*command).status == 0
    assert digest_of(elsewhere) == before


def test_a_decoder_whose_last_save_was_killed_is_removed_with_its_commit(tokenizer: Path) -> None:
    run(tokenizer, steps=1)
    folder = tokenizer / "decoder"
    for name in ("model.safetensors", "config.json"):
        (folder / name).rename(folder / f"{name}.new")
    (folder / "commit.json").write_text('["config.json", "model.safetensors"]')
    assert has_checkpoint(folder)
    remove_decoder(tokenizer)
    assert not folder.exists()


def test_a_new_tokenizer_in_the_folder_removes_the_decoder_of_the_old_one_alone(
    tokenizer: Path, trained: Trained, codegrid: Codegrid
) -> None:
    run(tokenizer, steps=2)
    (tokenizer / "decoder" / "pictures" / "step-1.png").write_text("mine")
    (tokenizer / "decoder" / "notes.txt").write_text("mine")
    command = ("train-tokenizer", "--data", trained.images, "--steps", 1, "--out", tokenizer, "--force", *SMALL, *QUICK)
    assert codegrid(*command).status == 0
    left = {path.relative_to(tokenizer / "decoder") for path in (tokenizer / "decoder").rglob("*") if path.is_file()}
    assert left == {Path("pictures/step-1.png"), Path("notes.txt")}
    assert load_trained_tokenizer(tokenizer, "cpu").decoder == "plain"
    assert codegrid("train-decoder", "--tokenizer", tokenizer, "--steps", 1, "--force", *QUICK).status == 0
    shutil.rmtree(tokenizer / "decoder")
    (tokenizer / "decoder").mkdir()
    (tokenizer / "decoder" / "model.safetensors").write_text("mine, and of no checkpoint")
    assert codegrid(*command).status == 0
    assert (tokenizer / "decoder" / "model.safetensors").read_text() == "mine, and of no checkpoint"


# A prior needs no decoder


@pytest.mark.parametrize("named", [True, False])
def test_a_decoder_that_cannot_be_used_stops_no_training_of_a_prior(
    tokenizer: Path, trained: Trained, tmp_path: Path, codegrid: Codegrid, named: bool
) -> None:
    run(tokenizer, steps=8, lr=0.03)
    (tokenizer / "decoder" / "model.safetensors").write_bytes(b"damaged")
    shutil.rmtree(tokenizer / "decoder" / "previous", ignore_errors=True)
    command = ("train-prior", "--codes", trained.codes, "--steps", 1, "--channels", 4, "--num-layers", 1)
    source = ("--tokenizer", tokenizer) if named else ()
    outcome = codegrid(*command, *source, "--out", tmp_path / "prior", "--device", "cpu")
    assert outcome.status == 0
    assert ("note: the pictures are those of the plain decoder" in outcome.out) == named
