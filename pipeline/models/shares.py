"""Work on many items that the processes of a group share: each does some, and every one gets all results, in order.

What is divided are the batches or blocks in which one process alone works. So each result is the same to the last bit,
however many processes there are, and sums are added up in the same order. Results travel as pickles: on the CPU, and
tensors of their own memory, as one that shows a part of another takes all of that along.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TypeVar

from ..errors import InputError
from ..runtime.process_group import ProcessGroup

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_all(action: Callable[[Item], Result], items: Iterable[Item], group: ProcessGroup) -> list[Result]:
    """Return what `action` returns for each of `items`, in order, in every process; each item is given to one process.

    The processes take turns, the main process first. Each must call this, with as many items.

    Raises:
        InputError: as `ProcessGroup.run_on_all` does, if `action` or `items` raise one.
    """
    own = group.run_on_all(lambda: [action(item) for item in islice(items, group.rank, None, group.count)])
    parts = group.gather(own)
    return [parts[i % group.count][i // group.count] for i in range(sum(map(len, parts)))]


def check_same(
    group: ProcessGroup, values: Mapping[str, object], do: str = "give all machines the same models and images"
) -> None:
    """Compare what each process of the group has, by name; each must call this.

    Args:
        group: the processes.
        values: what this one has.
        do: what to do if they differ, for the message.

    Raises:
        InputError: as `ProcessGroup.run_on_all` does, if one has another value than the main process.
    """
    everywhere = group.gather(values)

    def compare() -> None:
        for name, of_main in everywhere[0].items():
            for rank, other in enumerate(everywhere):
                if other[name] != of_main:
                    raise InputError(
                        expected=f"the same {name.replace('_', ' ')} in every process",
                        got=f"{other[name]} in process {rank}, {of_main} in process 0",
                        do=do,
                    )

    group.run_on_all(compare)


def of_process(description: str, group: ProcessGroup) -> str:
    """Return what the line of progress says is done, and of several processes whose share it counts."""
    return description if group.count == 1 else f"{description} (process {group.rank + 1} of {group.count})"
