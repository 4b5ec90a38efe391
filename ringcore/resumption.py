"""Attention over one chunk of keys after the other: what a call must be to begin with the partial of an earlier one."""

from __future__ import annotations

from typing import Any

import array_api_compat

from ringcore.arguments import Arguments
from ringcore.errors import DeviceError, DtypeError, KeywordError, ShapeError
from ringcore.inputs import check_array, check_detached, library_name
from ringcore.keywords import check_flag
from ringcore.merge import common_score
from ringcore.partial import Partial, dtype_name

_NO_GRADIENTS = (
    "a call that begins with a partial, or gives one, has no gradients. Give detached tensors, or call it under "
    "torch.no_grad()"
)


def check_partial(partial: Any, return_partial: Any, return_lse: Any, arguments: Arguments) -> None:
    """Raise unless the call can begin with ``partial``, or None, and give one if ``return_partial`` says so.

    Raises KeywordError, ShapeError, DtypeError, DeviceError or UnsupportedError.
    """
    check_flag("return_partial", return_partial)
    if return_partial and return_lse:
        raise KeywordError("return_partial and return_lse came together, but a partial has its lse: part.lse.")
    if partial is None and not return_partial:
        return
    check_detached(
        _NO_GRADIENTS, q=arguments.q, k=arguments.k, v=arguments.v, bias=arguments.bias, sinks=arguments.sinks,
        prefix_k=arguments.prefix_k, prefix_v=arguments.prefix_v,
    )  # fmt: skip
    if partial is None:
        return
    if not isinstance(partial, Partial):
        raise KeywordError(f"partial is a {type(partial).__name__}; it must be a ringcore.Partial.")
    q, rows = arguments.q, tuple(arguments.q.shape[:3])
    due = {"weighted": (*rows, arguments.v.shape[3]), "maximum": rows, "total": rows}
    wide = "float64" if arguments.dtype == "float64" else "float32"
    for name, shape in due.items():
        x = getattr(partial, name)
        check_array(f"{name} of partial", x)
        if library_name(x) != library_name(q):
            raise DeviceError(f"{name} of partial is an array of {library_name(x)}, but q one of {library_name(q)}.")
        if (came := str(array_api_compat.device(x))) != (where := str(array_api_compat.device(q))):
            raise DeviceError(f"{name} of partial is on the device {came}, but q on {where}. Move it there first.")
        if tuple(x.shape) != shape:
            raise ShapeError(
                f"{name} of partial has shape {tuple(x.shape)}, but these queries need {shape}, [B, H, S] whatever "
                "axes= says: a partial is resumed with the queries that it is of."
            )
        dtypes = (wide, arguments.dtype) if name == "weighted" else (wide,)
        if dtype_name(x) not in dtypes:
            raise DtypeError(
                f"{name} of partial holds {dtype_name(x)}; for {arguments.dtype} it must be "
                f"{' or '.join(dict.fromkeys(dtypes))}."
            )
    check_detached(_NO_GRADIENTS, weighted=partial.weighted, maximum=partial.maximum, total=partial.total)
    common_score(partial, arguments.score)
