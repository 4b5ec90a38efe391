"""What is known to go wrong in attention over a ring, each as arithmetic that makes the same mistake.

An implementation is told what it has by what it gives: if that is not right, but just what one of these gives, it has
that disease. So every one of them is also a mutant, on which the telling is tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringcore.testing import wrong_answers as answers
from ringcore.testing import wrong_weights as weights
from ringcore.testing.dense import Answer, backward
from ringcore.testing.problem import Dealt, Problem
from ringcore.testing.wrong_answers import Answers
from ringcore.testing.wrong_weights import Weights


@dataclass(frozen=True)
class Disease:
    """A mistake.

    name: what it is, in words. evidence: by what it shows. weights: the weights that it gives [B, H, S, N]; answer: all
    that it gives, where weights alone do not say it. rare: named where no other explains as much.
    """

    name: str
    evidence: str
    weights: Weights | None = None
    answer: Answers | None = None
    rare: bool = False


DISEASES = (
    Disease(
        "softmax per chunk, summed over chunks",
        "the weights of a row sum to the number of chunks that it sees",
        weights.summed,
    ),
    Disease(
        "softmax per chunk, averaged over chunks",
        "weights sum to 1, but each chunk has the same share",
        weights.averaged,
    ),
    Disease(
        "chunks weighed equally, as by an lse of zeros",
        "each chunk that a row sees has the same share",
        weights.mixed(weights.if_seen),
    ),
    Disease(
        "chunks weighed by their largest score alone",
        "a chunk's share does not grow with the number of its keys",
        weights.mixed(weights.largest_score),
    ),
    Disease(
        "sums that are not rescaled when the maximum grows",
        "early chunks weigh too much",
        weights.carried(np.ones_like),
    ),
    Disease(
        "sums scaled by exp(-maximum) alone when the maximum grows",
        "what came before weighs by its own maximum, as if the new one were 0",
        weights.carried(lambda top: np.exp(-top)),
    ),
    Disease("sums that are not divided at the end", "weights sum to the row's own total", weights.undivided),
    Disease(
        "lse in base 2 taken for a natural one",
        "large chunks weigh too much",
        weights.mixed(weights.lse_times(1 / np.log(2))),
    ),
    Disease(
        "natural lse taken for one in base 2",
        "large chunks weigh too little",
        weights.mixed(weights.lse_times(np.log(2))),
    ),
    Disease(
        "lse rounded to bfloat16",
        "shares of chunks are off by steps of up to 0.06 in their logarithm",
        weights.mixed(weights.lse_in_bfloat16),
    ),
    Disease(
        "a causal triangle in each hop",
        "every chunk is seen from the upper left corner on",
        weights.diagonal(weights.triangle_in_each_hop),
    ),
    Disease(
        "causal offset of a hop with the wrong sign",
        "later chunks are seen, earlier ones are not",
        weights.diagonal(weights.other_way),
    ),
    Disease(
        "a diagonal one key too far", "each query sees the key after its own", weights.diagonal(weights.shifted(1))
    ),
    Disease("a diagonal one key too short", "no query sees its own key", weights.diagonal(weights.shifted(-1))),
    Disease(
        "causal stripes off by one",
        "keys of later ranks are seen on the diagonal of stripes",
        weights.diagonal(weights.stripes_off_by_one),
    ),
    Disease(
        "a causal diagonal one shard too short",
        "no query sees keys of its own rank, nor all of those before",
        weights.diagonal(weights.short_by_a_shard),
    ),
    Disease(
        "where a chunk begins is added, not subtracted",
        "later chunks are seen by queries before them",
        weights.diagonal(weights.offset_added),
    ),
    Disease(
        "the window passed unchanged to each hop",
        "places within shards are compared, not positions",
        weights.window_of_each_hop,
    ),
    *(
        Disease(f"{name} ignored", "weights are those without it", weights.without(name))
        for name in ("causal", "window", "mask", "documents", "key_lengths", "bias", "alibi", "dilated")
    ),
    Disease("all that hides keys ignored", "hidden keys have weights", weights.everything, rare=True),
    Disease("softcap ignored", "large scores are as large as without it", answer=answers.uncapped),
    Disease("sinks ignored", "weights sum to 1 beside a sink", weights.sinkless),
    Disease("no ring at all", "a query sees the keys of its own rank alone", weights.own_keys),
    Disease(
        "a block overwritten by the next before it left",
        "the keys of one rank are met twice, those of another never",
        weights.overwritten,
        rare=True,
    ),
    Disease("length floored to a multiple of the ring", "the last keys have no weights", weights.floored),
    Disease(
        "no scale at all",
        "weights are those of scores that were never multiplied",
        weights.scaled_by(lambda width: 1.0),
    ),
    Disease(
        "scale ignored, and its default taken",
        "weights are the default's",
        weights.scaled_by(lambda width: width**-0.5),
    ),
    Disease("a finite sentinel for hidden keys", "rows that see nothing get the average of v", weights.averages),
    Disease(
        "NaN in rows that see nothing",
        "a softmax over no key divides 0 by 0",
        answer=answers.rows_with(np.nan, answers.unseeing),
    ),
    Disease(
        "NaN where one hop shows a row nothing",
        "a chunk of which nothing is seen brings NaN to the merge",
        answer=answers.rows_with(np.nan, lambda problem, dealt: answers.unseeing_hops(problem, dealt) > 0),
    ),
    Disease(
        "+inf as the lse of a chunk of which nothing is seen",
        "its row of zeros replaces what other chunks gave",
        answer=answers.infinite_lse,
    ),
    Disease(
        "exp of the gap between two chunks overflows",
        "rows are 0 in which a chunk's scores are 89 or more above those before",
        answer=answers.rows_with(0.0, answers.overflows),
    ),
    *(
        Disease(
            f"an epsilon of {epsilon:g} in the denominator",
            f"the weights of a row sum to less than 1, by up to {epsilon:g}",
            weights.divided_by_more(epsilon),
        )
        for epsilon in (1e-3, 1e-5, 1e-6, 1e-8)
    ),
    Disease("sinks counted once for each hop", "weights sum to less than with one sink", weights.sink_of_each_hop),
    Disease(
        "sinks counted once for each hop that shows a row something",
        "weights sum to less than with one sink, the later the row the more so",
        weights.sink_of_each_hop_seen,
    ),
    Disease("prefix ignored", "weights are those without it", weights.prefixless),
    Disease("a prefix counted once for each rank", "keys of a prefix weigh too much", weights.prefix_of_each_rank),
    Disease("all heads taken for one", "all heads have the same weights", weights.heads_as_one),
    Disease("heads taken for positions", "each position attends to its own heads alone", answer=answers.heads_attended),
    Disease(
        "offsets of dilated attention by blocks of heads",
        "head h has the offset h // ceil(H / r), not h mod r",
        weights.blocks_of_heads,
    ),
    Disease("branches of dilated attention averaged", "each branch has the same share", weights.branches_averaged),
    Disease(
        "no gradient through the mixture of branches",
        "dq and dk are those of branches with constant shares",
        answer=answers.mixture_kept_constant,
    ),
    Disease("grouped heads in the wrong order", "query head h reads key head h % Hk", answer=answers.heads_turned),
    Disease(
        "stale k and v in backward: a rank's own",
        "gradients of each hop are made with the rank's own k and v",
        answer=answers.stale(lambda size: 0),
    ),
    Disease(
        "stale k and v in backward: the last that visited",
        "gradients of each hop are made with one other's k and v",
        answer=answers.stale(lambda size: size - 1),
    ),
    Disease(
        "lse of a hop in backward",
        "gradients are those of chunks softmaxed by themselves",
        answer=answers.of_hops(True, False),
    ),
    Disease("out of a hop in backward", "delta is made of each hop's own out", answer=answers.of_hops(False, True)),
    Disease("no delta in backward", "gradients of scores do not sum to 0 over a row", answer=answers.no_delta),
    Disease(
        "lse and out of a hop in backward",
        "gradients are those of each chunk alone, added up",
        answer=answers.of_hops(True, True),
    ),
    Disease(
        "dk and dv one rank off: of the next",
        "each rank has the gradients of the next one's keys",
        answer=answers.one_rank_off(1),
    ),
    Disease(
        "dk and dv one rank off: of the one before",
        "each rank has the gradients of the keys before",
        answer=answers.one_rank_off(-1),
    ),
    Disease(
        "dk and dv added up, and those of two ranks taken for a pair",
        "dk is dk + dv, and dv is dk + dv of the next rank",
        answer=answers.added_up,
    ),
    Disease(
        "dk and dv that are not carried home",
        "gradients of keys come from a rank's own queries alone",
        answer=answers.own_share,
    ),
)


def given_by(disease: Disease, problem: Problem, dealt: Dealt) -> Answer:
    """What an implementation with this disease gives; gradients that it says nothing about are those of its weights."""
    if disease.answer is not None:
        return disease.answer(problem, dealt)
    if disease.weights is None:
        raise ValueError(f"{disease.name!r} has neither weights nor an answer")
    return backward(problem, disease.weights(problem, dealt)).answer


def foretold(disease: Disease, problem: Problem, dealt: Dealt) -> Answer:
    """What is known of what an implementation with this disease gives.

    Of one whose weights are wrong that is out: its gradients are the derivative of what it computes where somebody
    derives it, and anything where they are written by hand.
    """
    given = given_by(disease, problem, dealt)
    return given if disease.answer is not None else Answer(given.out, None, None, None)
