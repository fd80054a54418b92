"""The state of the optimizers in a saved training, which may be damaged, or a stranger's."""

from collections.abc import Mapping

from torch import Tensor

from ..runtime.optimizer import Optimizers
from ..runtime.schema import short
from .tensor_file import Outline, check_outlines, outlines_of

OPTIMIZER_TENSORS = {"muon": {"momentum"}, "adam": {"step", "exp_avg", "exp_avg_sq"}}  # of each parameter


def check_optimizer(tensors: Mapping[str, Tensor], optimizers: Optimizers) -> None:
    """Raise ValueError unless each tensor is a scalar, or of the shape and type of the parameter that it is for.

    A parameter has all the tensors of its optimizer, or none because it had no gradient yet.
    """
    found: dict[str, set[str]] = {}
    for path, tensor in tensors.items():
        owner, _, key = path.rpartition("/")
        name, _, index = owner.partition("/")
        parameters = optimizers.members[name].param_groups[0]["params"] if name in optimizers.members else []
        if key not in OPTIMIZER_TENSORS.get(name, ()) or not index.isdecimal() or int(index) >= len(parameters):
            raise ValueError(f"the unknown optimizer/{short(path)}")
        parameter = parameters[int(index)]
        shape = () if key == "step" else tuple(parameter.shape)
        check_outlines({path: Outline(shape, parameter.dtype)}, outlines_of({path: tensor}))
        found.setdefault(owner, set()).add(key)
    for owner, keys in found.items():
        missing = sorted(OPTIMIZER_TENSORS[owner.partition("/")[0]] - keys)
        if missing:
            raise ValueError(f"no optimizer/{owner}/{missing[0]}")
