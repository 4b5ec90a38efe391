"""The ring that benchmarks compare with, ring-flash-attn over our stand-in for flash_attn, computes attention."""

import inspect
import sys
from itertools import pairwise
from pathlib import Path

import flash2_on_cpu
import pytest
import torch
import torch.distributed as dist
from across import dense, draw, gathered

import ringcore

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import flash_attn_stand_in
import packed_peers
import peers

SHAPE = {"rows": 48, "heads": 2, "key_heads": 2, "width": 8, "values": 8}


@pytest.fixture
def operators():
    """The kernels beneath the stand-in, in double precision on the CPU."""
    return flash2_on_cpu.install()


def test_ring_flash_attn_on_the_stand_in_is_dense_attention_with_gradients(world, operators):
    attend = peer()
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        pytest.skip("it sends to itself where there is one rank")
    arrays = draw(**SHAPE, dtype=torch.float16)  # in float32 its sums and the kernels' gradients would share memory
    dout = torch.randn(arrays[0].shape, generator=torch.Generator().manual_seed(1)).half()
    out, _ = dense(*arrays)
    due = out, *torch.autograd.grad(out, arrays, dout.double())
    sequence_first = (x.detach().transpose(1, 2) for x in (*arrays, dout))
    shards = [ringcore.shard(x, "zigzag", rank, size, axis=1).contiguous() for x in sequence_first]
    leaves = [x.requires_grad_() for x in shards[:3]]
    out = attend(*leaves)
    came = out, *torch.autograd.grad(out, leaves, shards[3])
    for x, y in zip(came, due, strict=True):
        torch.testing.assert_close(gathered(x, "zigzag", 1).transpose(1, 2), y.half(), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("name", [name for name in packed_peers.RINGS if name.startswith("ring-flash-attn")])
def test_its_rings_of_packed_documents_are_dense_attention_with_gradients(world, operators, monkeypatch, name):
    peer()
    size = dist.get_world_size()
    if size == 1:
        pytest.skip("it sends to itself where there is one rank")
    monkeypatch.setattr(packed_peers, "DEVICE", "cpu")
    ends = [4 * size * end for end in (0, 1, 4, 5, 12)]
    shape = {**SHAPE, "rows": ends[-1], "heads": 16, "key_heads": 16}
    arrays = draw(**shape, dtype=torch.float16)
    dout = torch.randn(arrays[0].shape, generator=torch.Generator().manual_seed(1)).half()
    parts = [dense(*(x[:, :, a:b] for x in arrays))[0] for a, b in pairwise(ends)]
    out = torch.cat(parts, 2)
    due = out, *torch.autograd.grad(out, arrays, dout.double())
    attend, rows = packed_peers.RINGS[name](ends)
    *leaves, mine = (rows(x.detach().transpose(1, 2)).contiguous() for x in (*arrays, dout))
    leaves = [x.requires_grad_() for x in leaves]
    out = attend(*leaves)
    for x, y in zip((out, *torch.autograd.grad(out, leaves, mine)), due, strict=True):
        torch.testing.assert_close(x.detach(), rows(y.detach().transpose(1, 2)).half(), atol=4e-3, rtol=4e-3)


def peer():
    try:
        return peers.ring_flash_attn()
    except ImportError as exc:
        pytest.skip(str(exc))


@pytest.mark.parametrize("asked", [{"dropout_p": 0.1}, {"softcap": 3.0}, {"alibi_slopes": torch.ones(2)}])
def test_what_the_stand_in_lacks_is_refused(asked):
    q = torch.zeros(1, 4, 2, 8)
    plain = dict.fromkeys(inspect.signature(flash_attn_stand_in._flash_attn_forward).parameters, 0.0)
    given = {**plain, "q": q, "k": q, "v": q, "alibi_slopes": None, "return_softmax": False, **asked}
    with pytest.raises(NotImplementedError, match=next(iter(asked))):
        flash_attn_stand_in._flash_attn_forward(**given)


def test_installing_it_leaves_other_modules_of_flash_attn_importable(tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("number = 4\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    flash_attn_stand_in.install()
    from flash_attn.cute import number
    from flash_attn.flash_attn_interface import _flash_attn_forward

    assert number == 4
    assert _flash_attn_forward is flash_attn_stand_in._flash_attn_forward
