"""How the items of a run are divided, in one line that adds up."""


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
