"""Notes through shared memory: each arrives whole and in its turn, and nobody waits for who is gone."""

import os
import random
import subprocess
import sys
import threading
import time

import pytest

from ringcore_torch import mailbox
from ringcore_torch.mailbox import open_mailbox

ROOM = 100


class Meeting:
    """A gather among threads, as ranks have it by other means."""

    def __init__(self, size):
        self.notes, self.barrier = [b""] * size, threading.Barrier(size, timeout=20)

    def gather_of(self, rank):
        def gather(note):
            self.notes[rank] = note
            self.barrier.wait()
            found = tuple(self.notes)
            self.barrier.wait()
            return found

        return gather


def run(size, work):
    """``work(rank, mailbox)`` of each rank in a thread of its own; their results."""
    meeting, results = Meeting(size), [None] * size

    def rank(number):
        results[number] = work(number, open_mailbox(meeting.gather_of(number), number, size, ROOM))

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def never(peer, late):
    if late:
        raise TimeoutError(peer)


def note(rank, turn):
    return f"{rank} {turn} ".encode().ljust(ROOM, bytes([turn % 251]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_notes_arrive_whole_and_in_their_turn(size):
    def work(rank, box):
        wait = random.Random(rank)
        for turn in range(300):
            if wait.random() < 0.1:
                time.sleep(wait.random() * 2e-3)
            due = [note(peer, turn) for peer in range(size)]
            if box.gathered(due[rank], time.monotonic() + 20, never) != due:
                return turn
        return "all"

    assert run(size, work) == ["all"] * size


def test_a_note_is_not_read_before_all_of_it_is_there():
    (box,) = run(1, lambda rank, box: box)
    box._count = 7
    start = box._start(0)
    mailbox._HEADER.pack_into(box._memory, start, 7, box._sum(note(0, 7)))
    assert box._read(0) is None  # its header came first
    box._memory[start + mailbox._HEADER.size : start + mailbox._HEADER.size + ROOM] = note(0, 7)
    assert box._read(0) == note(0, 7)


def test_who_waits_asks_whether_it_is_too_late():
    def work(rank, box):
        asked = []

        def check(peer, late):
            asked.append((peer, late))
            if late:
                raise TimeoutError

        if rank == 0:
            with pytest.raises(TimeoutError):
                box.gathered(note(0, 0), time.monotonic() + 0.3, check)
        return asked

    asked, _ = run(2, work)
    assert asked[-1] == (1, True)
    assert 1 <= asked.count((1, False)) <= 8


def test_a_note_of_a_rank_that_stopped_is_none():
    def work(rank, box):
        asked = []
        if rank == 1:
            box.gathered(note(1, 0), time.monotonic() + 20, never)
            box.stop()
            box.gathered(note(1, 1), time.monotonic() + 20, never)
        else:
            box.gathered(note(0, 0), time.monotonic() + 20, never)
            deadline = time.monotonic() + 20
            while not box._memory[-1] and time.monotonic() < deadline:
                time.sleep(0.01)
            box.gathered(note(0, 1), time.monotonic() + 20, lambda *about: asked.append(about))
        return asked

    assert run(2, work)[0] == [(1, False)]


def test_a_process_that_ended_does_not_live():
    def alive_until(process):
        deadline = time.monotonic() + 20
        while mailbox._lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        return mailbox._lives(process.pid)

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert mailbox._lives(process.pid)
    process.stdin.close()
    assert not alive_until(process)  # nobody has waited for it yet
    process.wait()
    assert not alive_until(process)
    assert mailbox._lives(os.getpid())


@pytest.mark.parametrize("lack", ["memory", "sight", "numbers"])
def test_all_do_without_if_one_cannot(lack, monkeypatch):
    if lack == "memory":
        monkeypatch.setattr(mailbox, "_opened", lambda path, length, token: None)
    elif lack == "sight":
        monkeypatch.setattr(mailbox, "_lives", lambda process: False)
    else:
        spaces = iter(["one container", "another", "another"])
        monkeypatch.setattr(mailbox, "_space", lambda: next(spaces))
    assert run(3, lambda rank, box: box) == [None] * 3


def test_other_memory_of_the_same_name_is_not_taken(tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(b"\0" * 64 + b"other")
    assert mailbox._opened(str(path), 64, b"token") is None
    assert mailbox._opened(str(path), 64, b"other") is not None


@pytest.fixture
def made(monkeypatch):
    """The paths of the files that were made, whoever else makes some on this machine."""
    paths, make = [], mailbox.tempfile.mkstemp
    monkeypatch.setattr(mailbox.tempfile, "mkstemp", lambda **how: (paths.append((found := make(**how))[1]), found)[1])
    return paths


def test_nothing_is_left_behind(made):
    assert None not in run(2, lambda rank, box: box)
    assert [os.path.exists(path) for path in made] == [False]


@pytest.mark.parametrize("full", ["short", "error"])
def test_too_little_room_is_no_mailbox_and_leaves_nothing(made, full, monkeypatch):
    def write(file, data):
        if full == "error":
            raise OSError("no space left on device")
        return len(data) // 2

    monkeypatch.setattr(mailbox.os, "write", write)
    assert run(2, lambda rank, box: box) == [None] * 2
    assert [os.path.exists(path) for path in made] == [False]


def test_a_peer_that_fails_meanwhile_leaves_nothing(made):
    def gather(note):
        raise TimeoutError("the other rank never came")

    with pytest.raises(TimeoutError):
        open_mailbox(gather, 0, 2, ROOM)
    assert [os.path.exists(path) for path in made] == [False]
