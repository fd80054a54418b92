"""How the items of a run are divided: how many it is evaluated on, and all of it in one line that adds up."""

from collections.abc import Mapping
from typing import Any

from ..images.holdout import MOST_HELD_OUT
from ..runtime.schema import checked, short
from .settings import no_settings

RECORDED = "measured"  # the name under which `config.json` keeps how many items are measured
SHARE = 1 / 128  # of the items a run trains on, that each of its 8 evaluations measures: about 3 % of its time
FEWEST = 128


def split_summary(
    item: str, *, to_learn: int, held_out: int, measured: int, test: int | None = None, broken: int = 0
) -> str:
    """Return the line, such as `1,000 images = 861 to learn from + 37 held out + 102 test`.

    Args:
        item: what is divided, one of it.
        to_learn: how many the run learns from.
        held_out: how many it does not learn from, to check what it has learned; if none, it is checked on the others.
        measured: how many of those held out the checks use.
        test: how many are in the test part; None where there is none.
        broken: how many could not be read.
    """
    parts = [f"{to_learn:,} to learn from", f"{held_out:,} held out"]
    if held_out == 0:
        parts[0] += " and to check on"
    elif measured < held_out:
        parts[1] += f" ({measured:,} of them to check on)"
    if test is not None:
        parts.append(f"{test:,} test")
    if broken:
        parts.append(f"{broken:,} broken, skipped")
    total = to_learn + held_out + (test or 0) + broken
    return f"{total:,} {item}{'' if total == 1 else 's'} = {' + '.join(parts)}"


def measured_items(steps: int, batch_size: int, started_with: Mapping[str, Any] | None) -> int:
    """Return on how many held-out items a run is evaluated, at most: so many that it takes a few per cent of the run.

    A resumed run keeps the number, or its scores could not be compared: it is recorded beside the settings.

    Args:
        steps: of the run.
        batch_size: of a step.
        started_with: the recorded settings of the run to resume; None for a new run.

    Raises:
        InputError: what is recorded is no such number.
    """
    if started_with is None:
        return min(MOST_HELD_OUT, max(FEWEST, round(SHARE * steps * batch_size)))
    try:
        recorded_number = checked(int, started_with.get(RECORDED, MOST_HELD_OUT), f"training.{RECORDED}")
        if not 1 <= recorded_number <= MOST_HELD_OUT:
            raise ValueError(f"{short(recorded_number)} as training.{RECORDED}")
    except ValueError as error:
        raise no_settings(error) from None
    return recorded_number
