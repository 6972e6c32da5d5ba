"Loader and cache: the order's guarantees over many shapes, threads that end, slabs that are never overwritten, caches that refuse"
import gc, json, subprocess, sys, threading, time
from itertools import islice

import numpy as np, pytest, torch

from vla_nb.core import Batch, fold_seed
from vla_nb.data.cache import CacheSource, build_cache
from vla_nb.data.episode import ArraySource, Episode, JpegFrames, Subset, encode_frame
from vla_nb.data.hdf5 import Hdf5Source, write_episode
from vla_nb.data.loader import Loader, Order, in_order, once
from vla_nb.data.windows import Windows


def episode(i, l=11, h=24, w=32):
    frames = np.broadcast_to((20*i + np.arange(l))[:, None, None, None], (l, h, w, 3)).astype(np.uint8)
    ramp = np.linspace(i, i+1, l)[:, None]
    return Episode({'top': frames, 'wrist': JpegFrames([encode_frame(f[:, ::2]) for f in frames])}, np.repeat(ramp, 3, 1), np.repeat(ramp, 2, 1),
        f'go {i}', subtask=None if i % 2 else [f'part {t//4}' for t in range(l)], reward=np.arange(l) if i == 1 else None, success=bool(i), fps=10.)


@pytest.fixture(scope='module')
def source(): return ArraySource([episode(i, 11+i) for i in range(5)])
@pytest.fixture(scope='module')
def windows(source): return Windows(source, 4)


def prepare(s): return Batch(images=s.images, state=s.state, action=s.action, pad=s.action_is_pad, seed=s.seed, number=20*s.episode+s.step)
def same(x, y): return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
def workers(): return [t for t in threading.enumerate() if t.name.startswith('loader')]


@pytest.mark.parametrize('n,batch,world', [(64, 8, 1), (65, 8, 1), (65, 4, 2), (7, 7, 1), (100, 3, 4)])
def test_every_epoch_is_a_permutation(n, batch, world):
    ranks = [Order(n, batch, seed=3, rank=r, world=world) for r in range(world)]
    epochs = []
    for e in range(3):
        ids = np.concatenate([o(k)[0] for k in range(e*ranks[0].steps, (e+1)*ranks[0].steps) for o in ranks])
        assert len(set(ids.tolist())) == len(ids) == n//(batch*world)*batch*world
        epochs.append(ids.tolist())
    assert n < 8 or epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize('drop_last,shuffle', [(True, True), (False, True), (False, False)])
def test_ranks_make_up_the_global_batch(drop_last, shuffle):
    whole, parts = Order(50, 12, 1, shuffle=shuffle, drop_last=drop_last), [Order(50, 4, 1, r, 3, shuffle, drop_last) for r in range(3)]
    for k in (0, 3, 4, 9, 31):
        ids, seeds = whole(k)
        for r, o in enumerate(parts):
            assert np.array_equal(o(k)[0], ids[r::3]) and torch.equal(o(k)[1], seeds[r::3])


def test_seeds_belong_to_sample_and_epoch():
    a = Order(20, 5, seed=7)
    for k in (0, 2, 5, 9):
        ids, seeds = a(k)
        assert torch.equal(seeds, fold_seed(torch.from_numpy(ids.copy()), 7, k//4))


def test_the_order_is_fair():
    "Each sample comes about equally often in each half of an epoch"
    o = Order(40, 20, seed=0)
    first = np.bincount(np.concatenate([o(2*e)[0] for e in range(400)]), minlength=40)
    assert abs(first-200).max() < 5*10


@pytest.mark.parametrize('threads', [0, 1, 4])
def test_bits_do_not_depend_on_threads_or_restarts(windows, threads):
    def load(**k): return Loader(windows, 6, prepare, seed=2, size=(16, 16), **k)
    want = [load().batch(k) for k in range(25)]    # more than two epochs
    got = list(load(threads=threads, steps=25))
    assert len(got) == 25 and all(map(same, want, got))
    assert all(map(same, want[17:], load(threads=threads, start_step=17, steps=25)))
    for b in want: assert (b['images'][:, :, 0, 8, 8].long()-b['number'][:, None]).abs().max() <= 1


def test_kept_batches_keep_their_content(windows):
    loader = Loader(windows, 6, prepare, size=(16, 16), threads=2)
    kept = list(islice(loader, 12))
    copy = [{k: v.clone() for k, v in b.items()} for b in kept]
    parts = [b['images'][1:, 0] for b in kept]    # views alone must hold on too
    first = [p.clone() for p in parts]
    del kept
    for _ in islice(loader, 30): pass
    assert all(torch.equal(a, b) for a, b in zip(parts, first)) and all(torch.equal(c['images'][1:, 0], p) for c, p in zip(copy, parts))


def test_slabs_are_reused(windows):
    loader = Loader(windows, 6, prepare, size=(16, 16), threads=1, steps=100)
    for b in loader: pass
    assert loader.slabs.made <= 5


def test_padding_is_black_after_other_content(windows):
    "The two cameras are letterboxed differently, into memory that held other frames"
    for b in Loader(windows, 6, prepare, size=(16, 16), steps=20):
        assert not b['images'][:, 0, :, :2].any() and not b['images'][:, 0, :, -2:].any() and b['images'][:, 0, :, 2:-2].float().mean() > 0
        assert not b['images'][:, 1, :, :, :2].any() and not b['images'][:, 1, :, :, -2:].any()


def test_once_shows_everything_once_on_all_ranks(windows):
    n = len(windows)
    got = [b for r in range(3) for b in once(windows, 5, prepare, size=(16, 16), rank=r, world=3)]
    assert sum(len(b['state']) for b in got) == n and len(torch.cat([b['number'] for b in got]).unique()) == n
    again = list(once(windows, 5, prepare, size=(16, 16)))
    assert all(map(same, again, once(windows, 5, prepare, size=(16, 16)))), 'validation is the same every time'


def test_threads_end(windows):
    for leave in ('close', 'drop', 'error'):
        it = iter(Loader(windows, 6, prepare, size=(16, 16), threads=3))
        next(it)
        assert len(workers()) == 3
        if leave == 'close': it.close()
        if leave == 'error':
            with pytest.raises(RuntimeError): it.throw(RuntimeError('mine'))
        del it
        gc.collect()
        assert not workers(), leave


@pytest.mark.parametrize('threads', [0, 1, 3])
def test_errors_come_out_at_their_step(source, windows, threads):
    bad = ArraySource([episode(0)])
    bad.episodes[0].cameras['wrist'].data[9] = b'\xff\xd8 garbage'
    seen = []
    with pytest.raises(ValueError, match='episode 0: camera wrist: frame 9: expected a readable frame'):
        for b in Loader(Windows(bad, 4), 2, prepare, size=(16, 16), shuffle=False, threads=threads): seen.append(b)
    assert len(seen) == 4 and not workers()

    def broken(s): raise KeyError('no such token')
    with pytest.raises(KeyError, match='no such token'): next(iter(Loader(windows, 2, broken, size=(16, 16), threads=threads)))
    assert not workers()


def test_in_order_is_lazy_and_ordered():
    begun = []
    def slow(k):
        begun.append(k)
        time.sleep(.02 if k == 0 else 0)
        return k
    it = in_order(slow, iter(range(10**9)), 3)
    assert [next(it) for _ in range(5)] == [0, 1, 2, 3, 4] and max(begun) < 12
    it.close()


def test_a_forgotten_iterator_does_not_keep_the_program_alive():
    code = 'from vla_nb.data.loader import in_order; from itertools import count; import time\nit = in_order(lambda k: time.sleep(.01), count(), 2); next(it); print("end")'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert r.returncode == 0 and r.stdout == 'end\n' and not r.stderr, r.stderr


@pytest.mark.parametrize('n,batch,world', [(9, 10, 1), (9, 5, 2)])
def test_a_batch_larger_than_the_data_is_refused(n, batch, world):
    with pytest.raises(ValueError, match='batch_size: expected at most'): Order(n, batch, world=world)


@pytest.mark.parametrize('kind', ['jpeg', 'u8'])
def test_cache_equals_its_source(source, tmp_path, kind):
    cache = build_cache(source, tmp_path/'c', kind, 16, 16, quality=100, progress=False)
    assert cache.cameras == source.cameras and np.array_equal(cache.lengths(), source.lengths()) and cache.sizes == {'top': (12, 16), 'wrist': (16, 10)}
    for i in range(5):
        a, b = cache.episode(i), source.episode(i)
        for k in ('instruction', 'subtask', 'success', 'fps', 'action_shift'): assert getattr(a, k) == getattr(b, k), k
        for k in ('state', 'action'): assert np.array_equal(getattr(a, k), getattr(b, k))
        assert (a.reward is None) == (b.reward is None) and (a.reward is None or np.array_equal(a.reward, b.reward))
        for c in cache.cameras: assert np.abs(a.cameras[c][3].astype(int)-b.cameras[c][3][0, 0].astype(int)).max() <= 2
    pick = Subset(source, [3, 1]), Subset(cache, [3, 1])
    x, y = (Loader(Windows(s, 4), 6, prepare, size=(16, 16)).batch(1) for s in pick)
    assert (x['images'].int()-y['images'].int()).abs().max() <= 3 and all(torch.equal(x[k], y[k]) for k in x if k != 'images')


def test_jpegs_of_the_right_size_are_stored_as_they_are(tmp_path):
    data = [encode_frame(np.full((16, 16, 3), 9*t, np.uint8), 50) for t in range(4)]
    s = ArraySource([Episode({'top': JpegFrames(data)}, np.zeros((4, 2)), np.zeros((4, 2)), 'x')])
    cache = build_cache(s, tmp_path/'c', 'jpeg', 16, 16, progress=False)
    assert [cache.episode(0).cameras['top'].jpeg(t) for t in range(4)] == data


@pytest.mark.parametrize('threads', [0, 1, 3])
def test_a_cache_does_not_depend_on_threads(source, tmp_path, threads):
    want = build_cache(source, tmp_path/'a', 'jpeg', 16, 16, threads=2, progress=False)
    got = build_cache(source, tmp_path/'b', 'jpeg', 16, 16, threads=threads, progress=False)
    for p in want.folder.iterdir(): assert p.read_bytes() == (got.folder/p.name).read_bytes(), p.name


def test_a_changed_source_is_refused(tmp_path):
    for i in range(2): write_episode(tmp_path/f'data/{i}.hdf5', episode(i))
    build_cache(Hdf5Source(tmp_path/'data'), tmp_path/'c', height=16, width=16, progress=False)
    CacheSource(tmp_path/'c', Hdf5Source(tmp_path/'data'))
    write_episode(tmp_path/'data/2.hdf5', episode(2))
    for f in (lambda: CacheSource(tmp_path/'c', Hdf5Source(tmp_path/'data')), lambda: build_cache(Hdf5Source(tmp_path/'data'), tmp_path/'c', height=16, width=16)):
        with pytest.raises(ValueError, match='the data changed since; delete the folder'): f()


def test_a_damaged_cache_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match='meta.json: expected a cache, found none'): CacheSource(tmp_path)
    c = build_cache(source, tmp_path/'c', 'u8', 16, 16, progress=False)
    blob = c.folder/'camera1.bin'
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(ValueError, match='camera1.bin: size: expected'): CacheSource(c.folder)
    meta = json.loads((c.folder/'meta.json').read_text())
    (c.folder/'meta.json').write_text(json.dumps(meta | dict(rule='another')))
    with pytest.raises(ValueError, match='rule: expected'): CacheSource(c.folder, source)


def test_frames_of_another_size_are_refused_and_leave_nothing(tmp_path):
    s = ArraySource([episode(0), episode(1, h=32)])
    with pytest.raises(ValueError, match='expected one size'): build_cache(s, tmp_path/'c', 'u8', 16, 16, progress=False)
    assert not list(tmp_path.iterdir())
