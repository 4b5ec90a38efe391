"""What kernels want of widths: all equal, a multiple of something, and one column more for a gradient of lse."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

Tensor = torch.Tensor


def even(*tensors: Tensor, multiple: int = 1) -> list[Tensor]:
    """The tensors with columns of 0 up to one width, a multiple of ``multiple``; their last axis without gaps."""
    width = max(x.shape[3] for x in tensors)
    width += -width % multiple
    evened = (x if x.shape[3] == width else pad(x, (0, width - x.shape[3])) for x in tensors)
    return [x if x.stride(3) == 1 or width == 1 else x.contiguous() for x in evened]


def with_lse_gradient(dout: Tensor, v: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dout, v and out with one column more, by which a kernel that knows no dlse takes it into account.

    Scores get weights * (dout v - dout out): with v 1, out 0 and dout dlse in the new column that gains weights * dlse.
    """
    column = dlse[..., None].to(dout.dtype)
    return torch.cat([dout, column], -1), pad(v, (0, 1), value=1.0), pad(out, (0, 1))
