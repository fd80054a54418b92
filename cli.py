"""The command line: one thin command per verb. Everything heavy is imported when a command runs, not before."""

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import shell_complete

from pipeline import __version__
from pipeline.errors import InputError, printable
from pipeline.generation.guidance import DEFAULT_GUIDANCE
from pipeline.runtime.console import (
    check_output,
    end_status,
    exit_with,
    is_silent,
    note,
    prepare_console,
    record_closed,
    report,
    say,
)
from pipeline.runtime.interrupts import ending_by_signal
from pipeline.training.recipes import (
    ATTENTION_EVERY,
    LABEL_DROPOUT,
    MOST_ATTENDED,
    MOST_CODES,
    SHARPENING_SHARE,
    DecoderSettings,
    PriorSettings,
    TokenizerSettings,
)
from pipeline.training.settings import LARGEST_BATCH

if TYPE_CHECKING:
    from pipeline.evaluation.evaluate import Evaluation
    from pipeline.models.checkpoint import CheckpointInfo
    from pipeline.models.decoders import DecoderChoice

Settings = TokenizerSettings | PriorSettings | DecoderSettings
Command = TypeVar("Command", bound=Callable[..., Any])

TOKENIZER = Path("checkpoints/tokenizer")
PRIOR = Path("checkpoints/prior")
# The defaults, for the help texts.
STAGE_ONE, STAGE_TWO, DECODER = TokenizerSettings(), PriorSettings(), DecoderSettings()
# Beyond these a number is a slip; before, memory is the limit.
MOST_IMAGES, LARGEST_WIDTH, MOST_LAYERS = 10**6, 2**16, 1000
DATA_HELP = "glyphs, a torchvision name (mnist, cifar10, ...), or a folder of images."


class FiniteRange(click.FloatRange):
    """The type of a finite number in a range; click takes NaN and infinity as well."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value}", param, ctx)
        return number


class ImageSize(click.ParamType):
    """The type of an image size: N or HxW, in pixels."""

    name = "N|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        sides = value.lower().split("x")
        if len(sides) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,4}", side) for side in sides):
            self.fail(f"expected N or HxW in pixels, such as 64 or 48x64, got {value!r}", param, ctx)
        return int(sides[0]), int(sides[-1])


class YesNoAuto(click.ParamType):
    """The type of a choice that may be left to a measurement: True, False, or None for auto."""

    name = "auto|yes|no"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool | None:
        if value not in ("auto", "yes", "no"):
            self.fail(f"expected auto, yes or no, got {value!r}", param, ctx)
        return {"auto": None, "yes": True, "no": False}[value]


class PathType(click.Path):
    """The type of a path: a pathlib.Path; whether it exists is checked where it is used."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)


def default_of(name: str, *recipes: Settings) -> str:
    """Return the default of a setting as a help text shows it: of one training, or of both stages where they differ."""
    values = [getattr(recipe, name) for recipe in recipes]
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else f"{shown[0]} in stage one, {shown[1]} in two"


def setting(name: str, value_type: click.ParamType, text: str, *recipes: Settings) -> Callable[[Command], Command]:
    """Return the option of a training setting: None if it is not given, its default shown from the recipes."""
    text = f"{text}  [default: {default_of(name, *recipes)}]".lstrip()
    return click.option(f"--{name.replace('_', '-')}", type=value_type, help=text)


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return several options as one decorator, shown in the order given."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


device_option = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|mps", help="Where to compute."
)
force_option = click.option("--force", is_flag=True, help="Replace the file --out, or what an earlier run wrote there.")
data_root_option = click.option("--data-root", metavar="DIR", help="Where a torchvision set is, or is downloaded to.")
data_options = options(
    click.option("--data", metavar="SOURCE", help=f"{DATA_HELP}  [default: what the tokenizer was trained on]"),
    data_root_option,
)
split_option = click.option(
    "--split", type=click.Choice(["train", "test"]), default="test", show_default=True, help="Part of the images."
)
tokenizer_option = click.option(
    "--tokenizer", type=PathType(), default=TOKENIZER, show_default=True, help="Folder that train-tokenizer wrote."
)
DECODERS = click.Choice(["auto", "plain", "sharp"])
decoder_option = click.option(
    "--decoder",
    type=DECODERS,
    default="auto",
    show_default=True,
    help="Which one draws: plain, or sharp, what train-decoder wrote; auto is sharp if there is one.",
)
measured_decoder_option = click.option(
    "--decoder",
    type=DECODERS,
    default="auto",
    show_default=True,
    help="Whose error is measured: plain, or sharp, what train-decoder wrote; auto is plain, and says so if there is "
    "a sharp one.",
)
json_option = click.option("--json", "json_file", type=PathType(), help="Also write the numbers to this file.")
replace_evaluation_option = click.option(
    "--force", is_flag=True, help="Replace the files that --json, --picture and --nearest name."
)
picture_option = click.option(
    "--picture",
    type=PathType(),
    metavar="FILE.png",
    help="Also write this PNG: images, reconstructions and, with --prior, the bits of each code.",
)
replace_json_option = click.option("--force", is_flag=True, help="Replace the file that --json names.")
measured_prior_option = click.option("--prior", type=PathType(), help="Also measure this prior.")


def loop_options(*recipes: Settings) -> Callable[[Command], Command]:
    """Return the options of a training loop, with the defaults of these recipes."""
    precisions = click.Choice(["auto", "fp32", "bf16"])
    return options(
        setting("batch_size", click.IntRange(1, LARGEST_BATCH), "Items a step, of all processes.", *recipes),
        setting("accumulate", click.IntRange(1, LARGEST_BATCH), "Parts of a batch, where it is too large.", *recipes),
        setting("lr", FiniteRange(min=0, min_open=True), "Learning rate.", *recipes),
        setting("seed", click.IntRange(min=0), "Seed of everything random.", *recipes),
        setting("precision", precisions, "Of the networks; auto is bf16 where that is faster.", *recipes),
        setting("optimizer", click.Choice(["muon", "adam"]), "", *recipes),
    )


run_options = options(
    device_option,
    click.option("--resume", is_flag=True, help="Continue the run in --out, if there is one."),
    force_option,
)
training_options = options(
    setting("steps", click.IntRange(min=1), "In all.", STAGE_ONE, STAGE_TWO),
    loop_options(STAGE_ONE, STAGE_TWO),
    click.option(
        "--compile",
        type=YesNoAuto(),
        is_flag=False,
        flag_value="yes",
        help="Compile the networks: a slow start, faster steps; alone it is yes.  [default: auto, if measured to pay]",
    ),
    run_options,
)
choice_options = options(
    click.option(
        "--label", "labels", multiple=True, metavar="NAME|INDEX", help="Class to sample; repeatable, in turn."
    ),
    click.option("--temperature", type=FiniteRange(min=0), default=1.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=click.IntRange(min=1), help="Keep the k most likely codes."),
    click.option("--top-p", type=FiniteRange(0, 1, min_open=True), help="Keep codes up to this probability."),
    click.option(
        "--guidance",
        type=FiniteRange(min=0),
        help="How far to follow the label: 1 is the plain prior, 0 no label; more is truer to the label and less "
        f"varied.  [default: what train-prior found to suit the prior, {DEFAULT_GUIDANCE:g} or more; 1 for a prior "
        "without --label-dropout]",
    ),
    click.option(
        "--keep-best",
        type=FiniteRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Share of the candidates that is kept: those most surely of their label to the prior.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the samples."),
)
sampling_options = options(
    choice_options,
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        default="fp32",
        show_default=True,
        help="Of the prior; bf16 is faster for many images where the processor has it.",
    ),
    tokenizer_option,
    click.option("--prior", type=PathType(), default=PRIOR, show_default=True, help="Folder that train-prior wrote."),
    decoder_option,
    device_option,
    force_option,
)
quality_options = options(
    click.option(
        "--samples",
        type=click.IntRange(1, MOST_IMAGES),
        metavar="N",
        help="Also measure N samples of the prior, beside N test images and their reconstructions.",
    ),
    click.option(
        "--cas", is_flag=True, help="With --samples: also train a classifier on them, and on as many real images."
    ),
    click.option(
        "--nearest",
        type=PathType(),
        metavar="FILE.png",
        help="With --samples: also write the samples nearest to a training image, above it.",
    ),
    click.option(
        "--judge",
        type=click.Choice(["auto", "classifier", "autoencoder"]),
        default="auto",
        show_default=True,
        help="With --samples: whose features; auto is a classifier where there are classes.",
    ),
    click.option(
        "--inception",
        type=PathType(),
        metavar="FILE.pth",
        help="With --samples: also measure in features of Inception-v3, with these weights.",
    ),
)
# Of several processes that torchrun starts, the first alone does the work of the other commands.
SHARED_BY_PROCESSES = ("train-tokenizer", "train-decoder", "train-prior", "export-codes", "sample", "evaluate")
OF_SAMPLES = (
    *("labels", "temperature", "top_k", "top_p", "guidance", "keep_best", "seed"),
    *("cas", "nearest", "judge", "inception"),
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, invoke_without_command=True
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Learn to make new images: a VQ-VAE turns images into grids of codes, a gated PixelCNN samples new grids.

    \b
    The whole job on the built-in images:
      codegrid train-tokenizer
      codegrid train-prior
      codegrid sample --n 64
    """
    if ctx.invoked_subcommand is None:
        say(*ctx.get_help().split("\n"))
    elif is_silent() and ctx.invoked_subcommand not in SHARED_BY_PROCESSES:
        ctx.exit()


@cli.command("train-tokenizer")
@click.option("--data", metavar="SOURCE", help=f"{DATA_HELP}  [default: {STAGE_ONE.data}]")
@data_root_option
@click.option("--out", type=PathType(), default=TOKENIZER, show_default=True, help="Folder to write.")
@click.option("--image-size", type=ImageSize(), help="Resize and centre-crop.  [default: the images' own]")
@click.option("--channels", type=click.Choice(["1", "3"]), help="Grey or colour.  [default: the images' own]")
@setting("num_codes", click.IntRange(2, MOST_CODES), "K, size of the codebook.", STAGE_ONE)
@setting("code_dim", click.IntRange(1, LARGEST_WIDTH), "D, dimension of its vectors.", STAGE_ONE)
@setting("downsample", click.Choice(["2", "4", "8", "16"]), "Pixels a code covers.", STAGE_ONE)
@setting("hidden_channels", click.IntRange(2, LARGEST_WIDTH), "Width of the network.", STAGE_ONE)
@setting("num_residual_layers", click.IntRange(0, MOST_LAYERS), "Blocks on either side.", STAGE_ONE)
@setting("residual_channels", click.IntRange(1, LARGEST_WIDTH), "Width inside a block.", STAGE_ONE)
@setting("codebook_update", click.Choice(["ema", "gradient"]), "", STAGE_ONE)
@setting("commitment_weight", FiniteRange(min=0), "beta, on the encoder.", STAGE_ONE)
@setting(
    "bottleneck", click.Choice(["vq", "vae", "ae"]), "Codes; or, to compare with, a Gaussian or nothing.", STAGE_ONE
)
@setting(
    "likelihood",
    click.Choice(["gaussian", "bernoulli"]),
    "Of a pixel, with --bottleneck vae: squared error, or cross-entropy.",
    STAGE_ONE,
)
@click.option(
    "--kl-weight",
    type=FiniteRange(min=0),
    help="Of --bottleneck vae; 1 with bernoulli is the evidence lower bound.  [default: "
    f"{default_of('kl_weight', STAGE_ONE)}, with --likelihood bernoulli "
    f"{default_of('kl_weight', TokenizerSettings(likelihood='bernoulli'))}]",
)
@click.option(
    "--sharp", is_flag=True, default=None, help="At the end also train a sharp decoder, as train-decoder does."
)
@training_options
def train_tokenizer(out: Path, device: str, resume: bool, force: bool, **overrides: Any) -> None:
    """Stage one: images to grids of codes, and back."""
    from pipeline.runtime.process_group import process_group
    from pipeline.training.run_folder import RunFolder
    from pipeline.training.train_decoder import sharpen
    from pipeline.training.train_tokenizer import train_tokenizer as run

    overrides |= {name: int(overrides[name]) for name in ("channels", "downsample") if overrides[name] is not None}
    folder = RunFolder(out=out, resume=resume, force=force, device=device)
    with process_group():  # which can be opened once
        info = run(folder, overrides)
        say(done_line(info), written_line(out))
        if overrides["sharp"] or info.training.get("sharp"):  # a run that was done before does not record it
            say(*decoder_lines(sharpen(folder, info, overrides), out))
    if info.config.get("bottleneck", "vq") == "vq":
        say(f"next: {command_line('train-prior', tokenizer=out)}")


@cli.command("train-decoder")
@tokenizer_option
@data_options
@click.option("--out", type=PathType(), help="Folder to write.  [default: that of --tokenizer]")
@click.option(
    "--steps", type=click.IntRange(min=1), help=f"In all.  [default: {SHARPENING_SHARE:g} times those of the tokenizer]"
)
@loop_options(DECODER)
@run_options
def train_decoder(tokenizer: Path, out: Path | None, device: str, resume: bool, force: bool, **overrides: Any) -> None:
    """A sharper decoder for the same codes: squared error, and a discriminator that tells drawn from real.

    Encoder and codebook do not change: exported codes and priors stay valid. The plain decoder stays, too: --decoder of
    other commands chooses. The sharp one invents detail that is likely and not true, so its error is a little higher.
    """
    from pipeline.training.run_folder import RunFolder
    from pipeline.training.train_decoder import train_decoder as run

    out = tokenizer if out is None else out
    info = run(RunFolder(out=out, resume=resume, force=force, device=device), overrides, tokenizer)
    say(*decoder_lines(info, out))


@cli.command("export-codes")
@tokenizer_option
@data_options
@click.option("--out", type=PathType(), default=Path("checkpoints/codes"), show_default=True, help="Folder to write.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True)
@click.option("--flips", is_flag=True, help="Also encode every image mirrored left to right, as further rows.")
@click.option("--shard-size", type=click.IntRange(min=1), default=65_536, show_default=True, help="Grids a file.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Images read at a time; the codes are the same for any.",
)
@click.option("--to", type=click.Choice(["npz", "parquet"]), help="Also write all of it in this format.")
@device_option
@force_option
def export_codes(tokenizer: Path, out: Path, **chosen: Any) -> None:
    """Write the code grids of images as a data set.

    An interrupted export resumes when the same command is run again. `torchrun --nproc-per-node N cli.py export-codes
    ...`, on one machine or several that share --out, divides the work.
    """
    from pipeline.codes.export import export_codes as run

    run(tokenizer, out, **chosen)


codes_argument = click.argument("codes", metavar="DIR", type=PathType())


@cli.command("verify-codes")
@codes_argument
@click.option("--tokenizer", type=PathType(), help="The tokenizer that should have made them.")
@click.option("--data", metavar="SOURCE", help=f"The images that they should be of: {DATA_HELP}")
@data_root_option
def verify_codes(codes: Path, tokenizer: Path | None, data: str | None, data_root: str | None) -> None:
    """Check every hash, range, count and statistic of exported codes.

    With --data, also check that they are of those images: names, labels and pixels.
    """
    from pipeline.codes.verify import verify_codes as run

    manifest = run(codes, tokenizer, data=data, data_root=data_root)
    say(f"as its manifest says: {manifest.count:,} grids by the tokenizer {manifest.tokenizer_fingerprint}")


@cli.command("decode-codes")
@codes_argument
@tokenizer_option
@click.option("--out", type=PathType(), default=Path("decoded"), show_default=True, help="Folder, or FILE.png|.npy.")
@click.option("--start", type=click.IntRange(min=0), default=0, show_default=True, help="First row.")
@click.option("--n", type=click.IntRange(min=1), help="How many.  [default: all; in one picture 64]")
@decoder_option
@device_option
@force_option
def decode_codes(codes: Path, tokenizer: Path, out: Path, **chosen: Any) -> None:
    """Turn exported codes back into images.

    Writes a folder of PNGs named by row, with decode.json, which names the rows; or one picture of them, FILE.png; or
    one array, FILE.npy.
    """
    from pipeline.codes.decode import decode_codes as run

    say(f"{run(codes, tokenizer, out, **chosen):,} images: {out}")


@cli.command("train-prior")
@click.option(
    "--codes", metavar="DIR", multiple=True, help="Codes to learn; repeatable.  [default: of the tokenizer's images]"
)
@click.option("--tokenizer", metavar="DIR", help=f"For codes and pictures.  [default: {TOKENIZER}]")
@click.option("--out", type=PathType(), default=PRIOR, show_default=True, help="Folder to write.")
@setting("channels", click.IntRange(1, LARGEST_WIDTH), "Width of the two stacks.", STAGE_TWO)
@setting("num_layers", click.IntRange(1, MOST_LAYERS), "Gated layers.", STAGE_TWO)
@click.option(
    "--attention-every",
    type=click.IntRange(0, MOST_LAYERS),
    help=f"Attend to all codes before, after every this many layers; 0 never.  [default: {ATTENTION_EVERY}, 0 for "
    f"grids of more than {MOST_ATTENDED:,} codes and for {ATTENTION_EVERY} layers or fewer]",
)
@setting("dropout", FiniteRange(0, 1, max_open=True), "In training.", STAGE_TWO)
@click.option(
    "--label-dropout",
    type=FiniteRange(0, 1, max_open=True),
    help=f"Share of the labels hidden in training, so that sample --guidance can act.  [default: {LABEL_DROPOUT:g} "
    "with classes]",
)
@training_options
def train_prior(out: Path, device: str, resume: bool, force: bool, **overrides: Any) -> None:
    """Stage two: the probability of the code grids."""
    from pipeline.training.run_folder import RunFolder
    from pipeline.training.train_prior import train_prior as run

    overrides["codes"] = list(overrides["codes"]) or None
    info = run(RunFolder(out=out, resume=resume, force=force, device=device), overrides, TOKENIZER)
    say(done_line(info), written_line(out))
    tokenizer = Path(info.training.get("tokenizer") or TOKENIZER)
    say(f"next: {command_line('sample', '--n', '64', tokenizer=tokenizer, prior=out)}")


@cli.command()
@click.option("--n", type=click.IntRange(1, MOST_IMAGES), default=64, show_default=True, help="How many images.")
@click.option("--out", type=PathType(), default=Path("samples"), show_default=True, help="Folder to write.")
@sampling_options
def sample(
    out: Path, tokenizer: Path, prior: Path, decoder: "DecoderChoice", device: str, force: bool, **chosen: Any
) -> None:
    """Sample new images.

    Writes grid.png, images/, codes.npy and sample.json. Ctrl-C keeps the images that are finished. Processes that
    torchrun starts share the sampling; the files are those of one.
    """
    from pipeline.generation.image_pipeline import ImagePipeline
    from pipeline.generation.sample_folder import SampleOptions, sample_to_folder
    from pipeline.generation.sample_record import SAMPLE, check_run_in
    from pipeline.runtime.process_group import process_group

    with process_group() as group:
        group.run_on_main(lambda: check_run_in(out, SAMPLE, chosen["n"], force=force))  # before models are loaded
        images = group.run_on_all(
            lambda: ImagePipeline.from_pretrained(tokenizer, prior, group.device(device), decoder=decoder)
        )
        picture = sample_to_folder(images, SampleOptions.of(**chosen), out, force=force, group=group)
        say(f"{chosen['n']} new images: {picture}")


@cli.command()
@click.option("--image", type=PathType(), required=True, help="The picture.")
@click.option("--keep", required=True, metavar="top|bottom|left|right|MASK.png", help="What is kept: white in a mask.")
@click.option("--n", type=click.IntRange(1, MOST_IMAGES), default=8, show_default=True, help="How many completions.")
@click.option(
    "--candidates", type=click.IntRange(1, MOST_IMAGES), default=32, show_default=True, help="Sampled for each."
)
@click.option("--out", type=PathType(), default=Path("completions"), show_default=True, help="Folder to write.")
@sampling_options
def complete(
    image: Path,
    keep: str,
    candidates: int,
    out: Path,
    tokenizer: Path,
    prior: Path,
    decoder: "DecoderChoice",
    device: str,
    force: bool,
    **chosen: Any,
) -> None:
    """Keep part of a picture and sample the rest.

    The rest is conditioned exactly on what is kept above it. It is conditioned on what is kept beside or below it by
    sampling many candidates and preferring those that fit. Without --label, what is kept also chooses the class.

    Writes grid.png (the picture, what is kept, the completions), images/, codes.npy and complete.json.
    """
    from pipeline.generation.image_pipeline import ImagePipeline
    from pipeline.generation.sample_folder import SampleOptions, complete_to_folder
    from pipeline.generation.sample_record import COMPLETION, check_run_in

    check_run_in(out, COMPLETION, chosen["n"], force=force)  # before models are loaded
    pipeline = ImagePipeline.from_pretrained(tokenizer, prior, device, decoder=decoder)
    options = SampleOptions.of(**chosen)
    picture = complete_to_folder(pipeline, image, keep, options, out, candidates=candidates, force=force)
    say(f"the picture, what is kept, and {chosen['n']} completions: {picture}")


@cli.command()
@tokenizer_option
@data_options
@split_option
@click.option("--n", type=click.IntRange(min=1), default=16, show_default=True, help="How many images.")
@click.option("--out", type=PathType(), default=Path("reconstructions.png"), show_default=True, help="PNG to write.")
@decoder_option
@device_option
@force_option
def reconstruct(tokenizer: Path, out: Path, **chosen: Any) -> None:
    """Show originals above their reconstructions, in one PNG.

    A sharp decoder, which auto takes if there is one, invents likely detail: its error is a little larger than that of
    the plain one.
    """
    from pipeline.evaluation.reconstruction_picture import reconstruct_to_file

    say(f"originals above reconstructions: {reconstruct_to_file(tokenizer, out, **chosen)}")


@cli.command()
@tokenizer_option
@measured_prior_option
@data_options
@split_option
@quality_options
@choice_options
@json_option
@picture_option
@measured_decoder_option
@device_option
@replace_evaluation_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    tokenizer: Path,
    prior: Path | None,
    samples: int | None,
    json_file: Path | None,
    picture: Path | None,
    force: bool,
    **chosen: Any,
) -> None:
    """Measure reconstruction, codes in use, bits and, with --samples, the pictures that a prior makes.

    The bits of a prior are shown beside what simple predictors reach on the same codes. Samples are shown beside test
    images and their reconstructions, each compared with as many training images, by a judge that is trained once on the
    training part: so one sees which stage to blame. docs/metrics.md says what the numbers mean.

    With a sharp decoder in the folder, mse, psnr and nmse are of the plain one and those of the sharp one stand beside
    them; the reconstructions and samples of --samples are by the sharp one. --decoder takes one for all.
    """
    check_given_with_samples(ctx, samples, prior)
    check_two_files(ctx, picture, chosen["nearest"])
    from pipeline.evaluation.evaluate import evaluate as run
    from pipeline.evaluation.sample_quality import QualityOptions
    from pipeline.runtime.process_group import process_group

    pictures = {"picture": picture, "nearest": chosen["nearest"]}
    of_samples = {name: chosen.pop(name) for name in OF_SAMPLES} | {"nearest": pictures["nearest"] is not None}
    quality = None if samples is None else QualityOptions.of(samples, **of_samples)
    with process_group() as group:
        group.run_on_main(lambda: check_evaluation_files(json_file, pictures, force=force))
        evaluation = run(tokenizer, prior, with_picture=picture is not None, quality=quality, group=group, **chosen)
        if group.is_main:
            write_evaluation(evaluation, json_file, pictures)


@cli.command("measure-rate")
@tokenizer_option
@measured_prior_option
@data_options
@click.option(
    "--split",
    "splits",
    type=click.Choice(["train", "test"]),
    multiple=True,
    default=("train", "test"),
    help="Part of the images; repeatable.  [default: both]",
)
@click.option("--n", type=click.IntRange(min=1), help="Measure this many of each, chosen at random.  [default: all]")
@json_option
@measured_decoder_option
@device_option
@replace_json_option
def measure_rate(tokenizer: Path, prior: Path | None, json_file: Path | None, force: bool, **chosen: Any) -> None:
    """Measure the bytes an image costs as codes, next to PNG, and to JPEG of the same PSNR.

    The PSNR is that of the plain decoder: a sharp one invents likely detail, and has a little less.
    """
    from pipeline.compression.rate import measure_rate as run
    from pipeline.compression.rate import rate_table
    from pipeline.runtime.atomic_files import to_json, write_atomic
    from pipeline.runtime.output_paths import check_output_file

    if json_file is not None:
        check_output_file(json_file, force=force, option="--json", suffix=".json")
    rate = run(tokenizer, prior, **chosen)
    for split, numbers in rate.splits.items():
        say(*f"{split}: {rate_table(numbers)}\n".split("\n"))
    say(*(f"note: {warning}" for warning in rate.warnings))
    if json_file is not None:
        write_atomic(json_file, to_json(rate.to_json()))


def check_given_with_samples(ctx: click.Context, samples: int | None, prior: Path | None) -> None:
    """Raise UsageError for an option that would do nothing without --samples, and for --samples without --prior."""
    for option in ctx.command.params:
        given = option.name is not None and ctx.get_parameter_source(option.name) == ParameterSource.COMMANDLINE
        if samples is None and given and option.name in OF_SAMPLES:
            raise click.UsageError(f"expected --samples N with {option.opts[0]}, got none; add it", ctx)
    if samples is not None and prior is None:
        raise click.UsageError("expected --prior DIR with --samples, got none; name the prior to sample from", ctx)


def check_evaluation_files(json_file: Path | None, pictures: dict[str, Path | None], *, force: bool) -> None:
    """Raise InputError if a file that `evaluate` is to write, pictures by the names of their options, cannot be."""
    from pipeline.images.png import check_png
    from pipeline.runtime.output_paths import check_output_file

    if json_file is not None:
        check_output_file(json_file, force=force, option="--json", suffix=".json")
    for name, path in pictures.items():
        if path is not None:
            check_png(path, force=force, option=f"--{name}")


def write_evaluation(evaluation: "Evaluation", json_file: Path | None, pictures: dict[str, Path | None]) -> None:
    """Print the numbers, and write the files that were asked for."""
    from pipeline.images.png import png_bytes
    from pipeline.runtime.atomic_files import to_json, write_atomic

    say(*evaluation.lines())
    if json_file is not None:
        write_atomic(json_file, to_json(evaluation.to_json()))
    for name, path in pictures.items():
        made = evaluation.pictures.get(name)
        if path is not None and made is not None:
            write_atomic(path, png_bytes(made))
            say(f"{name:>14}  {path}")


def check_two_files(ctx: click.Context, picture: Path | None, nearest: Path | None) -> None:
    """Raise UsageError if --picture and --nearest name one file, in which one picture would replace the other."""
    if picture is not None and nearest is not None and os.path.realpath(picture) == os.path.realpath(nearest):
        raise click.UsageError(f"expected two files as --picture and --nearest, got {picture} as both", ctx)


def done_line(info: "CheckpointInfo") -> str:
    """Return what a training run reached, in one line: its steps, which of them is saved, and the numbers of that."""
    steps = info.training.get("steps", info.step)
    saved = "" if info.step == steps else f", the best of them {info.step:,}"
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in info.metrics.items() if name != "step")
    return f"done: {steps:,} steps{saved}; {numbers}"


def decoder_lines(info: "CheckpointInfo", out: Path) -> list[str]:
    """Return what the training of a sharp decoder reached, in lines."""
    from pipeline.models.decoders import decoder_folder

    lines = [done_line(info), written_line(decoder_folder(out))]
    if info.step > 0:
        return [*lines, f"{info.kind} {info.fingerprint} for the codes of the tokenizer {info.tokenizer_fingerprint}"]
    return [*lines, "note: none was better than the plain decoder, which is therefore the one that was written"]


def written_line(out: Path) -> str:
    """Return where the results of a training run are, in one line."""
    names = [name for name in ("model.safetensors", "metrics.jsonl", "pictures", "codes") if (out / name).exists()]
    return f"in {out}: {', '.join(names)}"


def command_line(command: str, *words: str, tokenizer: Path, prior: Path = PRIOR) -> str:
    """Return a command on these folders as a shell takes it; default folders are omitted."""
    chosen = {"--tokenizer": (tokenizer, TOKENIZER), "--prior": (prior, PRIOR)}
    folders = [word for option, (path, default) in chosen.items() if path != default for word in (option, str(path))]
    arguments = ["codegrid", command, *words, *folders]
    return subprocess.list2cmdline(arguments) if os.name == "nt" else " ".join(map(shell_quoted, arguments))


def shell_quoted(word: str) -> str:
    """Return a word as a shell takes it, with escapes that bash and zsh read for what cannot be printed."""
    escaped = printable(word)
    if escaped == word:
        return shlex.quote(word)
    escaped = printable(word.replace("\\", "\\\\").replace("'", "\\'"))
    return f"$'{escaped}'"


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit.

    The status is 0 when it is done, 1 if it failed, 2 if the command line is wrong, 130 on Ctrl-C, 143 after SIGTERM,
    129 after SIGHUP, 141 if nobody reads standard output any more. Of several processes only the first prints, except
    what went wrong.
    """
    prepare_console()
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments  # at any position
    try:
        with ending_by_signal():
            run_command([argument for argument in arguments if argument != "--debug"])
        check_output()
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        if is_silent():  # every process has the same command line
            sys.exit(2)
        fail(in_one_line(error.format_message()) + hint, 2)
    except KeyboardInterrupt:
        note("")  # after the ^C on a terminal
        sys.exit(130)
    except Exception as error:  # the boundary to the user: every error becomes one line
        if debug:
            raise
        if isinstance(error, InputError):
            fail(str(error), 1)
        fail(in_words(error), 1)
    exit_with(0)


def run_command(arguments: list[str]) -> None:
    """Parse the command line and do what it says; or complete it, where a shell asks for that."""
    if instruction := os.environ.get("_CODEGRID_COMPLETE"):
        sys.exit(shell_complete(cli, {}, "codegrid", "_CODEGRID_COMPLETE", instruction))
    try:
        with ExitStack() as stack:
            if is_silent():  # click prints help texts itself
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
            context = stack.enter_context(cli.make_context("codegrid", arguments))
            cli.invoke(context)
    except click.exceptions.Exit as exit_:  # of --help and --version
        if exit_.exit_code:
            sys.exit(exit_.exit_code)
    except BrokenPipeError as error:  # click prints help texts itself
        record_closed(error)
        check_output()
    finally:
        end_status()  # before what is printed about an error


def in_words(error: Exception) -> str:
    """Return what an error that is no InputError says, in one line."""
    message = in_one_line(str(error))
    if isinstance(error, MemoryError) or "can't allocate memory" in message or "out of memory" in message:
        size = re.search(r"allocate ([\d.,]+ ?\w+)", message)
        got = f"too little for a further {size[1]}" if size else "too little"
        return f"expected memory for this, got {got}; choose smaller sizes or end other programs"
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def in_one_line(message: str) -> str:
    """Return a message of a library, which may have several lines, in one."""
    return " ".join(message.split())


def fail(message: str, status: int) -> NoReturn:
    """Print an error in one line, in whichever process it is, and exit with this status."""
    say()  # writes what is left, so that nothing fails as the program ends
    report(f"Error: {message}")
    sys.exit(status)


if __name__ == "__main__":
    main()
