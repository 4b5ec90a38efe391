"""Wrong messages between streams: orders that make ranks wait for each other, and deadlines that nobody holds."""

from __future__ import annotations

from mutant import PLAN, Mutant

STREAMS = "adapters/ringcore_torch/stream_messages.py"
WATCH = "adapters/ringcore_torch/watch.py"
STRICT = f"{PLAN}/test_stream_messages.py"
WATCHED = "tests/torch_adapter/world/test_gloo_watch.py"

MUTANTS = (
    Mutant(
        "accumulators that hop on sent as they come",
        STREAMS,
        "            if hops[1]:\n",
        "            if any(hops):\n",
        STRICT,
        "no_layout",
    ),
    Mutant(
        "accumulators sent home as they come",
        STREAMS,
        "            if home[1]:\n",
        "            self._end(self._home)\n            if home[1]:\n",
        STRICT,
        "no_layout",
    ),
    Mutant(
        "accumulators that no others follow kept back",
        STREAMS,
        "(self._hop.number < exchange.number or exchange.has(self._hop))",
        "exchange.has(self._hop)",
        STRICT,
        "no_others_follow",
    ),
    Mutant(
        "all blocks on one channel",
        STREAMS,
        "self._visiting, self._carried = visiting, carried",
        "self._visiting, self._carried = carried, carried",
        STRICT,
        "no_others_follow",
    ),
    Mutant(
        "what went home may be overwritten at once",
        STREAMS,
        "            self._carried.order(self._home.done)\n",
        "",
        STRICT,
        "overwritten_after_the_call",
    ),
    Mutant(
        "what arrives is used before it came",
        STREAMS,
        "            channel.order(group.done)\n",
        "            pass\n",
        STRICT,
        "behind_the_mark",
    ),
    Mutant(
        "gaps of tensors sent as they lie: streams",
        STREAMS,
        "tuple(x.detach().contiguous() for x in blocks)",
        "tuple(x.detach() for x in blocks)",
        STRICT,
        "gaps",
    ),
    Mutant(
        "a deadline for all exchanges together",
        WATCH,
        "                since, passed = time.monotonic(), now\n",
        "                passed = now\n",
        WATCHED,
        "moves_on",
        error="RingTimeout",
    ),
    Mutant(
        "streams that wait for a rank that failed",
        WATCH,
        "self._circle.heard()",
        "None",
        WATCHED,
        "frees_the_stream",
        ranks=2,
        launcher="torchrun",
    ),
    Mutant(
        "connections closed under what is under way",
        WATCH,
        "            time.sleep(_INTERVAL)\n",
        "            if self._closing.wait(_INTERVAL):\n                return True\n",
        WATCHED,
        "closes_once_all_has_ended",
    ),
)
