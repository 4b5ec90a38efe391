"""Wrong rings over torch.distributed: buffers, tags, ranks of groups, news of failure, gradients."""

from __future__ import annotations

from functools import partial

from mutant import Mutant

WORLD = "tests/torch_adapter/world"
CIRCLE = "adapters/ringcore_torch/circle.py"
MESSAGES = "adapters/ringcore_torch/messages.py"

GlooMutant = partial(Mutant, launcher="torchrun")

MUTANTS = (
    GlooMutant(
        "send buffer let go in flight: gloo",
        MESSAGES,
        "            for work, waiting_for in self._works:\n",
        "            for work, waiting_for in self._works[: sum(map(len, self._arrived.values()))]:\n",
        f"{WORLD}/test_gloo_in_flight.py",
        "overwritten",
        ranks=2,
        hangs=True,  # gloo takes back what nobody holds
    ),
    GlooMutant(
        "gaps of tensors sent as they lie: gloo",
        MESSAGES,
        "tuple(x.detach().contiguous() for x in blocks)",
        "tuple(x.detach().as_strided(x.shape, torch.empty(x.shape).stride()) for x in blocks)",
        f"{WORLD}/test_gloo_in_flight.py",
        "copy_that_is_sent",
        ranks=2,
    ),
    GlooMutant(
        "tags of blocks of several kinds meet",
        MESSAGES,
        "FIRST_BLOCK_TAG + KINDS.index(self._kind) * self._circle.size + move.block",
        "FIRST_BLOCK_TAG + KINDS.index(self._kind) + move.block",
        f"{WORLD}/test_gloo_in_flight.py",
        "told_apart",
        ranks=2,
    ),
    GlooMutant(
        "parts of a block in the order of listing",
        MESSAGES,
        "sorted(moves, key=lambda item: _order(item[0]))",
        "moves",
        f"{WORLD}/test_gloo_in_flight.py",
        "told_apart",
        ranks=2,
    ),
    GlooMutant(
        "global rank used for a group rank: gloo",
        CIRCLE,
        "self.rank, self.size = group.rank(), group.size()",
        "self.rank, self.size = torch.distributed.get_rank(), group.size()",
        f"{WORLD}/test_gloo_ring.py",
        "ranks_of_the_ring",
        ranks=3,
    ),
    GlooMutant(
        "an abort that leaves connections open",
        CIRCLE,
        "                self.gloo.recv([never], peer, _NEVER_SENT_TAG).wait(timedelta(milliseconds=1))\n",
        "                self.gloo.abort()\n",
        f"{WORLD}/test_gloo_transport.py",
        "abort_ends_what_is_under_way",
        ranks=2,
        hangs=True,
    ),
    GlooMutant(
        "a failure whose words are not left for others",
        CIRCLE,
        '            self.store.compare_set(_FAILED, "", f"{self.rank} {_describe(error)}")\n',
        "            pass\n",
        f"{WORLD}/test_gloo_transport.py",
        "abort_reaches_every_peer",
        ranks=2,
    ),
    GlooMutant(
        "long notes cut",
        CIRCLE,
        "rest = self._gathered(note[room:], [max(0, length - room) for length in lengths])",
        'rest = [b""] * self.size',
        f"{WORLD}/test_gloo_transport.py",
        "notes_of_any_length",
        ranks=2,
    ),
    Mutant(
        "a note read before all of it is there",
        "adapters/ringcore_torch/mailbox.py",
        "return note if check == self._sum(note) else None",
        "return note",
        "tests/torch_adapter/test_mailbox.py",
        "before_all_of_it",
    ),
    Mutant(
        "one place for notes, which the next one overwrites",
        "adapters/ringcore_torch/mailbox.py",
        "(2 * rank + self._count % 2)",
        "(2 * rank)",
        "tests/torch_adapter/test_mailbox.py",
        "in_their_turn",
    ),
    Mutant(
        "the note of a rank that stopped waiting taken",
        "adapters/ringcore_torch/mailbox.py",
        "if stopped := self.stopped():  # who",
        "if not (stopped := [0]):  # who",
        "tests/torch_adapter/test_mailbox.py",
        "stopped_is_none",
    ),
    GlooMutant(
        "a second thread let in",
        CIRCLE,
        "if entered and (self._open == 0 or self._owner == threading.get_ident()):",
        "if entered:",
        f"{WORLD}/test_gloo_transport.py",
        "between_two_steps",
        ranks=2,
        hangs=True,
    ),
    GlooMutant(
        "a ring kept when its group is gone",
        "adapters/ringcore_torch/transport.py",
        "_rings: WeakKeyDictionary[Any, TorchTransport] = WeakKeyDictionary()",
        "_rings: dict[Any, TorchTransport] = {}",
        f"{WORLD}/test_gloo_transport.py",
        "goes_with_its_group",
        ranks=2,
    ),
    GlooMutant(
        "ranks that want different gradients go on",
        "adapters/ringcore_torch/operator.py",
        "text_of(**keywords, wrt=wrt)",
        "text_of(**keywords)",
        f"{WORLD}/test_gloo_autograd.py",
        "want_different_gradients",
        ranks=2,
    ),
    GlooMutant(
        "a backward that may meet a forward",
        "adapters/ringcore_torch/operator.py",
        'call_of("the gradient of ring_attention", keywords, wrt=names)',
        'call_of("ring_attention", keywords, wrt=names)',
        f"{WORLD}/test_gloo_autograd.py",
        "backward_while_others",
        ranks=2,
        hangs=True,
    ),
    GlooMutant(
        "the store of a dead process ends the call with its own error",
        CIRCLE,
        "        with suppress(RuntimeError):\n            while True:\n",
        "        if True:\n            while True:\n",
        "tests/torch_adapter/test_launch_gloo.py",
        "dies_is_an_error and first",
    ),
    Mutant(
        "rendezvous by the numbers of each process",
        "adapters/ringcore_torch/rendezvous.py",
        "{known.setdefault(number, len(known))}",
        "{number}",
        "tests/torch_adapter/test_rendezvous.py",
        "whatever_numbers",
        error="DistStoreError",
    ),
)
