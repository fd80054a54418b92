"""The three columns as lines of text, with one that says what each stage costs."""

from .picture_metrics import COLUMNS, WORDS, PictureMetrics

MEANINGS = {
    "fd": "Frechet distance",
    "kid": "kernel distance",
    "mind": "sliced Wasserstein, 3 D SW^2",
    "precision": "of these, near a training image",
    "recall": "of the training images, near one of these",
    "density": "neighbourhoods each is in",
    "coverage": "of the training images, neighbourhoods met",
    "class_accuracy": "recognised as its class",
    "nearest_train": "distance to the nearest training image",
    "nmse": "squared error / variance of training pixels",
    "psnr": "dB, of that error",
}


def quality_table(metrics: PictureMetrics) -> list[str]:
    """Return the lines to print."""
    columns = [getattr(metrics, name).to_json() for name in COLUMNS]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(_shown(column.get(name)) for column in columns), _words(name)] for name in names]
    counted = f"{metrics.n:,} of each against {metrics.n:,} training images, seed {metrics.seed}"
    table = _aligned([["", *WORDS.values(), ""], *rows])
    told = [how_decoded(metrics), how_sampled(metrics), blame(metrics)]
    lines = [f"{counted}; features of {metrics.judge}", *table, *told]
    if metrics.cas is not None and metrics.cas_real is not None:
        taught = f"{metrics.cas:.1%} of real test images are recognised after training on the samples"
        lines.append(f"classification accuracy score: {taught}, {metrics.cas_real:.1%} after as many real images")
    return lines


def how_decoded(metrics: PictureMetrics) -> str:
    """Return in one line which decoder made the pictures."""
    line = f"the reconstructions and the samples are by the {metrics.decoder} decoder"
    return line if metrics.decoder == "plain" else f"{line}, which invents detail: their error is beside what that buys"


def how_sampled(metrics: PictureMetrics) -> str:
    """Return in one line what was done to the samples beside sampling from the prior."""
    meaning = {0.0: ", without labels", 1.0: ", the plain prior"}.get(metrics.guidance, "")
    line = f"the samples were drawn with guidance {metrics.guidance:g}{meaning}"
    if metrics.keep_best == 1:
        return line
    return (
        f"{line}; of the candidates {metrics.keep_best:.3g} were kept, those most surely of their class to the prior "
        "itself: the judge chose none"
    )


def blame(metrics: PictureMetrics) -> str:
    """Return in one line what each stage adds to the Frechet distance of the samples."""
    floor, reconstructed, sampled = (getattr(metrics, name).own.fd for name in COLUMNS)
    if sampled < floor:
        return "the samples are nearer to the training images than real test images are; --nearest shows copies"
    decoder, prior = reconstructed - floor, sampled - reconstructed
    worse = "prior" if prior > decoder else "tokenizer"
    last = f"the prior {prior:.3g}" if prior >= 0 else f"the prior takes {-prior:.3g} of that away"
    return (
        f"of the samples' Frechet distance of {sampled:.3g} the floor is {floor:.3g}, the tokenizer adds {decoder:.3g} "
        f"and {last}: the {worse} costs more"
    )


def _words(name: str) -> str:
    """Return what a number is."""
    base = name.removesuffix("_inception")
    words = MEANINGS[base.removesuffix("_own")]
    return words if base == name else f"{words} (Inception-v3)"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return rows of a table as lines: the first and the last column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *numbers, last in rows:
        cells = [first.rjust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:-1], strict=True)), last]
        lines.append("  ".join(cells).rstrip())
    return lines
