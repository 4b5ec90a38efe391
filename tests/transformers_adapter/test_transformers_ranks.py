"""Models whose sequence is split over two processes, against one process with transformers' own attention."""

from itertools import product

import pytest
import torch
from models import CONFIGS, EAGER, PACKED, build, draw_ids, packed_batch, run, run_apart
from ranks import on_ranks
from torch.nn.functional import cross_entropy
from training import STEPS, batches, start
from world import LAYOUTS, PADDED

import ringcore

pytestmark = pytest.mark.timeout(200)

ORACLE = {name: "eager" if name in EAGER else "sdpa" for name in CONFIGS}


def distance(came, due):
    return float(torch.linalg.vector_norm(came - due) / torch.linalg.vector_norm(due))


def test_logits_and_summed_gradients_of_every_model_and_layout(tmp_path):
    ranks = on_ranks("models", tmp_path)
    for name in CONFIGS:
        out, due = run(build(name), ORACLE[name], input_ids=draw_ids())
        allowed = 2e-5 if ORACLE[name] == "eager" else 1e-11
        largest = max(float(x.norm()) for x in due.values())
        for layout in LAYOUTS:
            parts = [found[layout, name][0] for found in ranks]
            assert distance(ringcore.unshard(parts, layout, axis=1), out) < allowed, (name, layout)
            for found in ranks:
                for parameter, x in due.items():
                    came = found[layout, name][1][parameter]
                    assert torch.linalg.vector_norm(came - x) <= allowed * largest, (name, layout, parameter)


def test_packed_documents(tmp_path):
    ranks = on_ranks("packed", tmp_path)
    for name in PACKED:
        batch, _ = packed_batch()
        out, due = run_apart(build(name), ORACLE[name], batch["input_ids"])
        allowed = 2e-5 if ORACLE[name] == "eager" else 1e-11
        largest = max(float(x.norm()) for x in due.values())
        for layout in LAYOUTS:
            parts = [found[layout, name][0] for found in ranks]
            assert distance(ringcore.unshard(parts, layout, axis=1), out) < allowed, (name, layout)
            for found, (parameter, x) in product(ranks, due.items()):
                assert torch.linalg.vector_norm(found[layout, name][1][parameter] - x) <= allowed * largest, parameter
    for found in ranks:
        kind, said = found["other ends"]
        assert kind == "AgreementError"
        assert "cu_seq_lens_q is [0, 4, 5, 13] on rank 0, [0, 13] on rank 1" in said


def test_padding_on_the_right(tmp_path):
    ranks = on_ranks("padding", tmp_path)
    for name, lengths in product(("llama", "bert"), PADDED):
        mask = (torch.arange(13) < torch.tensor(lengths)[:, None]).long()
        due = run(build(name), "sdpa", input_ids=draw_ids(3), attention_mask=mask)[0]
        for layout in LAYOUTS:
            came = ringcore.unshard([found[layout, lengths, name] for found in ranks], layout, axis=1)
            assert distance(came[mask.bool()], due[mask.bool()]) < 1e-11, (name, layout, lengths)


def reference():
    """The training run by transformers alone: its attention, its loss, its moving of labels."""
    model, optimizer = start("sdpa")
    for batch in batches():
        optimizer.zero_grad()
        value = model(**batch).loss
        value.backward()
        yield value.item(), {name: x.grad.clone() for name, x in model.named_parameters()}
        optimizer.step()


def test_ten_steps_of_training_are_those_of_one_process(tmp_path):
    ranks = on_ranks("training", tmp_path)
    due = list(reference())
    assert len(due) == STEPS
    assert due[-1][0] < due[0][0] - 0.5, "nothing was learnt"
    for layout in ("contiguous", "zigzag"):
        for found in ranks:
            for (value, gradients), (due_value, due_gradients) in zip(found[layout], due, strict=True):
                assert abs(value - due_value) < 1e-5
                for name, x in due_gradients.items():
                    torch.testing.assert_close(gradients[name], x, atol=1e-5, rtol=0)
        print(f"\n{layout}: {largest(ranks[0][layout], due)}", end="")


def largest(found, due):
    losses = max(abs(value - other) for (value, _), (other, _) in zip(found, due, strict=True))
    gradients = max(
        float((x[name] - y[name]).abs().max()) for (_, x), (_, y) in zip(found, due, strict=True) for name in y
    )
    return f"losses differ by {losses:.1e}, gradients by {gradients:.1e}"


def test_the_loss_counts_every_token_once(tmp_path):
    ranks = on_ranks("averages", tmp_path)
    ids = draw_ids()
    logits = torch.randn(2, 13, 61, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    labels = torch.where(torch.arange(13) < 9, ids, -100)
    due = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    due.backward()
    for found in ranks:
        torch.testing.assert_close(found["value"], due.detach())
        assert torch.equal(found["idle"], torch.full((3,), 2.0))
        assert found["frozen"] is None
    torch.testing.assert_close(torch.cat([found["gradient"] for found in ranks], 1), logits.grad)


def test_what_is_wrong_on_one_rank_is_refused_on_both_and_the_ring_lives_on(tmp_path):
    first, second = on_ranks("refusals", tmp_path)
    assert first["position ids left out"][0] == "PeerError"
    assert second["position ids left out"][0] == "KeywordError"
    for found in (first, second):
        assert "position_ids[0, 0] is 0 on rank 1 of 2" in found["position ids left out"][1]
        assert "gives that token position 7" in found["position ids left out"][1]
        assert "split_batch" in found["position ids left out"][1]
    assert {first["position ids of another layout"][0], second["position ids of another layout"][0]} == {"KeywordError"}
    assert {first["padding on the left"][0], second["padding on the left"][0]} == {"UnsupportedError"}
    assert first["another batch"] == second["another batch"]
    assert first["another batch"][0] == "AgreementError"
    assert "batches of [2, 1] entries" in first["another batch"][1]
    assert {first["a whole mask"][0], second["a whole mask"][0]} == {"ShapeError"}
    assert (first["a keyword on one rank"][0], second["a keyword on one rank"][0]) == ("PeerError", "UnsupportedError")
    assert "a head mask" in first["a keyword on one rank"][1]
    due = run(build("llama"), "sdpa", input_ids=draw_ids())[0]
    for name in ("again", "mask on one rank alone"):
        assert distance(torch.cat([first[name], second[name]], 1), due) < 1e-11


def test_a_device_mesh_is_a_ring(tmp_path):
    due = next(reference())
    for value, gradients in on_ranks("mesh", tmp_path):
        assert abs(value - due[0]) < 1e-5
        for name, x in due[1].items():
            torch.testing.assert_close(gradients[name], x, atol=1e-5, rtol=0)
