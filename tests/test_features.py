"The cache of frozen features beyond the page: killed builds, several builders, and the exactness of its key"
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_nb.data.episode import ArraySource, Episode
from vla_nb.data.features import FeatureCache, build_features, features_key, weights_digest
from vla_nb.data.loader import Loader
from vla_nb.data.returns import ValueWindows
from vla_nb.data.windows import Windows


def source(es=3, l=10):
    def one(e):
        a = 10.*e + np.arange(l)[:, None]
        frames = np.broadcast_to((10*e + np.arange(l))[:, None, None, None], (l, 16, 16, 3)).astype(np.uint8)
        return Episode({'top': frames, 'wrist': 255-frames}, a, a, f'task {e}', success=e%2 == 0)
    return ArraySource([one(e) for e in range(es)])


def look(obs): return obs.images.float().mean((-3, -2, -1))[:, :, None, None].expand(-1, -1, 3, 4)
def build(folder, f=look, s=None, **kw): return build_features(s or source(), folder, f, dict(weights='w'), size=(16, 16), progress=False, **kw)


@pytest.mark.parametrize('dtype, tol', [('float32', 0), ('float16', 1e-3), ('bfloat16', 1/128)])
def test_kinds_of_numbers(tmp_path, dtype, tol):
    cache = build(tmp_path, dtype=dtype)
    want = torch.tensor([[v, 255-v] for v in range(30)]).float()
    assert cache.shape == (30, 2, 3, 4) and cache.dtype is getattr(torch, dtype)
    assert ((cache.rows(np.arange(30)).float()[:, :, 0, 0] - want).abs() <= tol*want).all()


def test_order_of_cameras_is_in_the_key(tmp_path):
    a, b = (build(tmp_path, cameras=c) for c in (('top', 'wrist'), ('wrist', 'top')))
    assert a.folder != b.folder and torch.equal(a.rows(np.arange(9)).flip(1), b.rows(np.arange(9)))


def test_every_part_of_the_key_counts():
    s, w = source(), {'a': torch.zeros(3), 'b': torch.zeros(2, 2)}
    base = features_key(s, s.cameras, (16, 16), dict(weights='w', prompt='p'), 'bfloat16')
    others = [features_key(s, *x) for x in ((('top',), (16, 16), dict(weights='w', prompt='p'), 'bfloat16'), (s.cameras, (16, 17), dict(weights='w', prompt='p'), 'bfloat16'),
        (s.cameras, (16, 16), dict(weights='v', prompt='p'), 'bfloat16'), (s.cameras, (16, 16), dict(weights='w', prompt='q'), 'bfloat16'), (s.cameras, (16, 16), dict(weights='w', prompt='p'), 'float32'))]
    assert all(o != base for o in others)
    same, last_bit = {k: v.clone() for k, v in w.items()}, {k: v.clone() for k, v in w.items()}
    last_bit['b'].view(torch.int32)[1, 1] ^= 1
    renamed, shaped = {'a': w['a'], 'c': w['b']}, {'a': w['a'], 'b': w['b'].reshape(4)}
    assert weights_digest(w) == weights_digest(same) == weights_digest(dict(reversed(w.items())))
    assert len({weights_digest(x) for x in (w, last_bit, renamed, shaped, {k: v.half() for k, v in w.items()})}) == 5


def test_words_reach_a_tower_that_reads_them(tmp_path):
    cache = build(tmp_path, lambda obs: torch.tensor([float(t[-1]) for t in obs.instruction])[:, None, None, None])
    assert cache.rows(np.arange(30)).flatten().tolist() == [e for e in range(3) for _ in range(10)]


def test_two_builders_look_once(tmp_path):
    seen = []
    def count(obs): seen.append(len(obs)); return look(obs)
    with ThreadPoolExecutor(2) as pool: a, b = pool.map(lambda _: build(tmp_path, count), range(2))
    assert sum(seen) == 30 and a.folder == b.folder


def test_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'expected features \[2, 3, 4\]'): build(tmp_path, lambda obs: look(obs) if obs.step[0] < 5 else look(obs)[:, :1], batch_size=5)
    with pytest.raises(ValueError, match='expected features'): build(tmp_path/'flat', lambda obs: look(obs).flatten(1))


killed = """
import os, sys
sys.path.insert(0, {tests!r})
from test_features import build, look, source
n = 0
def f(obs):
    global n
    n += len(obs)
    if n > 52: os.kill(os.getpid(), 9)
    return look(obs)
build({folder!r}, f, source(6), batch_size=2, threads=0)
"""


def test_killed_and_taken_up(tmp_path):
    "kill -9 in the middle: no reader opens it; the next run goes on and ends with the same bytes"
    r = subprocess.run([sys.executable, '-c', killed.format(tests=str(Path(__file__).parent), folder=str(tmp_path/'a'))], capture_output=True)
    assert r.returncode == -9
    with pytest.raises(ValueError, match='no finished cache|finished feature cache'): FeatureCache(next((tmp_path/'a').iterdir()))
    seen = []
    def count(obs): seen.append(len(obs)); return look(obs)
    a, b = build(tmp_path/'a', count, source(6), batch_size=4), build(tmp_path/'b', s=source(6))
    assert sum(seen) == 60-32 and torch.equal(a.rows(np.arange(60)), b.rows(np.arange(60)))


def test_batches_are_the_same_with_any_threads_and_processes(tmp_path):
    s = source()
    w = ValueWindows(Windows(s, 4), features=build(tmp_path).reader(s))
    one = [b for b in Loader(w, 8, lambda s: s, threads=0, steps=6)]
    two = [b for b in Loader(w, 8, lambda s: s, threads=3, steps=6)]
    half = [next(iter(Loader(w, 4, lambda s: s, rank=r, world=2))) for r in range(2)]
    assert all(torch.equal(getattr(a, k), getattr(b, k)) for a, b in zip(one, two) for k in ('features', 'next_features', 'mc_return', 'reward'))
    assert all(torch.equal(half[r].features, one[0].features[r::2]) for r in range(2))
