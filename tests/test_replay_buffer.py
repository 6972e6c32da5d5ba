"The replay buffer beyond the page: kill -9 while it grows, other processes, mixtures and other controls"
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_nb.data.episode import ArraySource, Episode, Subset
from vla_nb.data.loader import Loader
from vla_nb.data.replay_buffer import Draws, ReplayBuffer, ReplayWindows
from vla_nb.data.returns import ValueWindows
from vla_nb.data.windows import Windows


def ran(e, l=6, success=True, subtask=None):
    a = 10.*e + np.arange(l)[:, None]
    return Episode({'top': np.broadcast_to(a[:, :, None, None], (l, 8, 8, 3)).astype(np.uint8)}, a, a, f'task {e}', subtask and [subtask]*l, success=success)


killed = """
import os, sys
sys.path.insert(0, {tests!r})
import vla_nb.data.hdf5 as h
from test_replay_buffer import ran, ReplayBuffer
b = ReplayBuffer({folder!r}, capacity=18)
for e in range(5): b.add(ran(e))
real = os.replace
def die(a, c): os.kill(os.getpid(), 9)
if {when!r} == 'writing': os.replace = die
else: type(b.folder).unlink = lambda self, **k: os.kill(os.getpid(), 9)
b.add(ran(5))
"""


@pytest.mark.parametrize('when, numbers', [('writing', [2, 3, 4]), ('forgetting', [2, 3, 4, 5])])
def test_killed(tmp_path, when, numbers):
    "Killed while it writes: the episode is not there. Killed while it forgets: one too many, which the next addition removes"
    r = subprocess.run([sys.executable, '-c', killed.format(tests=str(Path(__file__).parent), folder=str(tmp_path), when=when)], capture_output=True, text=True)
    assert r.returncode == -9, r.stderr
    b = ReplayBuffer(tmp_path, capacity=18)
    assert [int(p.stem[-8:]) for p in b.paths] == numbers and b.added == numbers[-1]+1
    b.add(ran(b.added))
    assert [int(p.stem[-8:]) for p in b.paths] == [numbers[-1]-1, numbers[-1], numbers[-1]+1] and b.lengths().sum() == 18


def test_a_long_episode_stays(tmp_path):
    b = ReplayBuffer(tmp_path, capacity=10)
    for e in range(3): b.add(ran(e, 30))
    assert len(b) == 1 and b.episode(0).instruction == 'task 2'
    with pytest.raises(ValueError, match='cameras: expected'): b.add(Episode({'wrist': np.zeros((2, 8, 8, 3), np.uint8)}, np.zeros((2, 1)), np.zeros((2, 1)), 'x', success=True))


@pytest.mark.parametrize('share', [0, .25, .5, 1.])
def test_draws(share):
    "The share is exact in every batch; draws are fair within it; two processes make one batch"
    d = Draws(50, 7, share, 16, seed=3)
    idx = np.stack([d(k)[0] for k in range(400)])
    assert ((idx < 50).sum(1) == round(16*share)).all() and idx.max() < 57
    for lo, hi in ((0, 50), (50, 57)):
        n = np.bincount(idx[(idx >= lo) & (idx < hi)]-lo, minlength=hi-lo)
        if n.sum(): assert ((n - n.mean())**2 / n.mean()).sum() < 2*(hi-lo) + 20
    parts = [Draws(50, 7, share, 8, seed=3, rank=r, world=2)(9)[0] for r in range(2)]
    assert sorted(np.concatenate(parts)) == sorted(d(9)[0])
    assert (Draws(50, 7, share, 16, seed=4)(0)[0] != idx[0]).any()


def test_windows_say_what_the_episodes_are(tmp_path):
    "Numbers, words, frames and padding of both kinds, for a subset of demonstrations with and without subtasks"
    b = ReplayBuffer(tmp_path, compress=None)
    for e in (4, 5): b.add(ran(e, success=False, subtask='try'))
    offline = Windows(Subset(ArraySource([ran(e) for e in range(4)]), [3, 1]), 3, stride=2)
    w = ReplayWindows(offline, b, .5)
    both = Windows(ArraySource([ran(3, subtask=' '), ran(1, subtask=' '), ran(4, subtask='try'), ran(5, subtask='try')]), 3, stride=2)
    i = np.arange(len(w))
    assert len(w) == len(both) == 12
    a, c = w.samples(i), both.samples(i)
    for k in ('images', 'state', 'action', 'action_is_pad', 'episode', 'step'): assert torch.equal(getattr(a, k), getattr(c, k)), k
    assert a.instruction == c.instruction and [s.strip() for s in a.subtask] == [s.strip() for s in c.subtask]
    assert ValueWindows(w).success.tolist() == [True, True, False, False]


def test_growing_changes_nothing_that_was_drawn(tmp_path):
    "Batches of a step depend on the seed, the step and what is in the buffer, not on when the loader was made"
    offline, b = Windows(ArraySource([ran(e) for e in range(3)]), 2), ReplayBuffer(tmp_path)
    def batch(k): return Loader(ReplayWindows(offline, b), 4, lambda s: s, size=(8, 8), start_step=k, steps=k+1).batch(k)
    before = []
    for k in range(4):
        before.append(batch(k))
        b.add(ran(10+k))
    assert (before[0].episode < 3).all() and ((before[3].episode >= 3).sum() == 2)
    again = ReplayBuffer(tmp_path)
    later = Loader(ReplayWindows(offline, again), 4, lambda s: s, size=(8, 8), start_step=4, steps=5).batch(4)
    assert torch.equal(later.state, batch(4).state)
