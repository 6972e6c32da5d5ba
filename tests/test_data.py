"Episodes, HDF5 files, windows, statistics and normalisers: round trips, properties on random data, and numbers recorded from DexVLA's own reader"
import json, os, pickle, signal, time
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path

import h5py, numpy as np, pytest, torch

from vla_nb.data import episode, hdf5
from vla_nb.data.episode import ArrayFrames, ArraySource, Episode, EpisodeSource, Frames, JpegFrames, Subset, decode_frame, encode_frame, jpeg_size, split_episodes
from vla_nb.data.hdf5 import Hdf5Source, find_episodes, write_episode
from vla_nb.data.normalize import Normalizer, minmax, quantile, zscore
from vla_nb.data.stats import Moments, cached_stats, compute_stats
from vla_nb.data.windows import Windows, from_delta, from_relative, to_delta, to_relative

here = Path(__file__).parent


def wander(seed, l=12, a=4, p=4, size=(16, 24), cameras=('top', 'wrist'), **kw):
    g = np.random.default_rng(seed)
    y,x = np.mgrid[:size[0],:size[1]]
    ims = {c: ((np.stack([9*x, 11*y, 0*x+20*k], -1)[None] + 3*np.arange(l)[:,None,None,None]) % 256).astype(np.uint8) for k,c in enumerate(cameras)}
    s = np.cumsum(g.normal(0, .1, (l, max(a, p))), 0).astype(np.float32)
    return Episode(ims, s[:,:p], s[:,:a]+.01, f'go to {seed}', **kw)


def rows(w, i, horizon):
    "Sample `i` of windows the slow, obvious way"
    ep = next(e for e in range(len(w.source)) if w.bounds[e] <= i < w.bounds[e+1])
    t, a = i-w.bounds[ep], w.source.episode(ep).action
    first = max(0, t-w.source.episode(ep).action_shift)
    cut = [a[min(first+k, len(a)-1)] for k in range(horizon)]
    return np.stack(cut), [first+k > len(a)-1 for k in range(horizon)], ep, t


# episodes

def test_an_episode_checks_lengths_at_the_door():
    e = wander(0)
    for field,v in (('state', e.state[:-1]), ('subtask', ['x']*3), ('reward', np.zeros(5)), ('velocity', e.state[1:])):
        with pytest.raises(ValueError, match=f'{field}: expected 12 steps.*found'): Episode(**{**vars(e), field: v})
    with pytest.raises(ValueError, match='camera top: expected 12'): Episode({'top': np.zeros((11, 4, 4, 3), np.uint8)}, e.state, e.action, '')
    with pytest.raises(ValueError, match='expected uint8'): Episode({'top': np.zeros((12, 4, 4, 3), np.float32)}, e.state, e.action, '')
    with pytest.raises(ValueError, match='action: expected'): Episode({}, e.state, e.action[:,0], '')
    with pytest.raises(ValueError, match='at least one|expected 1 steps'): Episode({}, e.state[:0], e.action[:0], '')
    assert isinstance(e.cameras['top'], Frames) and e.state.dtype == np.float32


def test_pillow_reads_and_writes_what_simplejpeg_does(monkeypatch):
    frame = wander(0, size=(48, 64)).cameras['top'][3]
    fast = encode_frame(frame)
    decoded = decode_frame(fast)
    monkeypatch.setattr(episode, 'simplejpeg', None)
    slow = encode_frame(frame)
    assert jpeg_size(fast) == jpeg_size(slow) == (48, 64)
    assert np.abs(decode_frame(fast).astype(int)-decoded).max() <= 2
    assert np.abs(decode_frame(slow).astype(int)-decoded).max() <= 8
    for f in (decode_frame, jpeg_size):
        with pytest.raises(ValueError): f(b'garbage')


def test_splits_are_pure_sorted_disjoint_and_never_empty():
    for n in (2, 3, 10, 301):
        for seed in range(3):
            for share in (.01, .1, .5):
                tr,va = split_episodes(n, share, seed)
                assert sorted([*tr, *va]) == list(range(n)) and len(tr) and len(va)
                assert (np.diff(tr) > 0).all() and (np.diff(va) > 0).all()
                assert all(np.array_equal(a, b) for a,b in zip((tr, va), split_episodes(n, share, seed)))
    assert not np.array_equal(split_episodes(50, seed=0)[1], split_episodes(50, seed=1)[1])
    assert split_episodes(7, 0)[0].tolist() == list(range(7)) and not len(split_episodes(7, 0)[1])
    for n,share in ((0, .1), (1, .1), (0, 0), (2, .9), (5, 1.), (5, -.1)):
        with pytest.raises(ValueError): split_episodes(n, share)
    assert split_episodes(10)[1].tolist() == [6], 'the split of a seed must not change between versions'


def test_sources_and_subsets():
    src = ArraySource([wander(i) for i in range(4)])
    sub = Subset(src, [2, 0])
    assert isinstance(src, EpisodeSource) and isinstance(sub, EpisodeSource)
    assert sub.episode(0).instruction == 'go to 2' and sub.describe(1) == 'episode 0'
    assert len({src.fingerprint, sub.fingerprint, Subset(src, [0, 2]).fingerprint}) == 3
    changed = [wander(i) for i in range(4)]
    changed[3].cameras['top'].frames[5,0,0,0] += 1
    assert ArraySource(changed).fingerprint != src.fingerprint
    with pytest.raises(ValueError, match='expected 0 to 3'): Subset(src, [4])
    with pytest.raises(ValueError, match='at least one'): ArraySource([])
    with pytest.raises(ValueError, match='cameras'): ArraySource([wander(0), wander(1, cameras=('top',))])


# HDF5

@pytest.mark.parametrize('compress', ['jpeg', 'lzf', None])
def test_round_trip(tmp_path, compress):
    l = 12
    e = wander(3, l=l, subtask=['reach']*5+['grasp ü']*7, reward=np.arange(l), success=False, fps=12.5, velocity=np.random.default_rng(0).normal(size=(l, 6)), may_rest=('action 3',))
    got = Hdf5Source([write_episode(tmp_path/'e.hdf5', e, compress)]).episode(0)
    for k in ('state', 'action', 'reward', 'velocity'): assert np.array_equal(getattr(got, k), getattr(e, k)) and getattr(got, k).dtype == np.float32
    for k in ('instruction', 'subtask', 'success', 'fps', 'action_shift', 'may_rest'): assert getattr(got, k) == getattr(e, k)
    assert list(got.cameras) == ['top', 'wrist']
    for c,f in got.cameras.items():
        assert isinstance(f, Frames) and len(f) == l and f.shape == e.cameras[c].shape
        for i in range(l):
            if compress == 'jpeg':
                assert np.abs(f[i].astype(int)-e.cameras[c][i]).mean() < 6 and np.array_equal(decode_frame(f.jpeg(i)), f[i])
            else: assert np.array_equal(f[i], e.cameras[c][i]) and f.jpeg(i) is None and f[i].flags.writeable
        with pytest.raises(IndexError): f[l]


def test_what_is_optional_may_be_absent(tmp_path):
    got = Hdf5Source([write_episode(tmp_path/'e.hdf5', wander(0))]).episode(0)
    assert got.subtask is got.reward is got.success is got.fps is got.velocity is None and got.may_rest == ()
    with h5py.File(tmp_path/'e.hdf5') as f: assert 'observations/qvel' not in f and f.attrs['sim'] and f.attrs['compress']


def test_jpeg_frames_are_stored_untouched_and_camera_order_is_kept(tmp_path):
    e = wander(0, cameras=('wrist', 'aux', 'top'))
    e.cameras = {c: JpegFrames([encode_frame(f[i], 70) for i in range(len(f))]) for c,f in e.cameras.items()}
    src = Hdf5Source([write_episode(tmp_path/'e.hdf5', e)])
    assert src.cameras == ('wrist', 'aux', 'top')
    for c in src.cameras: assert [src.episode(0).cameras[c].jpeg(i) for i in range(12)] == e.cameras[c].data
    with h5py.File(tmp_path/'e.hdf5') as f: assert f['compress_len'][:].tolist() == [[len(b) for b in e.cameras[c].data] for c in src.cameras]
    assert Hdf5Source([tmp_path/'e.hdf5'], cameras=('top',)).cameras == ('top',)


def act_file(path, l=6, sim=None, bgr=False):
    "A file as ACT's recorder writes it: float64, alphabetical cameras, fixed-length text, no attributes of ours, contiguous frames"
    frames = wander(1, l=l).cameras['top'].frames
    with h5py.File(path, 'w') as f:
        f['action'], f['observations/qpos'], f['observations/qvel'] = np.random.default_rng(0).normal(size=(3, l, 4))
        if sim is not None: f.attrs['sim'] = sim
        f['language_raw'] = np.array([b'fold it'])
        f['reasoning'] = np.array([b'first the sleeve'])
        f['observations/images/b'] = frames
        if bgr:
            data = [encode_frame(x[...,::-1]) for x in frames]
            f['observations/images/a'] = np.stack([np.frombuffer(d.ljust(9000, b'\0'), np.uint8) for d in data])
        else: f['observations/images/a'] = frames
    return frames


def test_a_file_of_another_recorder(tmp_path):
    frames = act_file(tmp_path/'x.hdf5')
    src = Hdf5Source(tmp_path)
    e = src.episode(0)
    assert src.cameras == ('a', 'b') and e.action_shift == 1 and e.instruction == 'fold it' and e.subtask == ['first the sleeve']*6
    assert e.velocity.shape == (6, 4) and np.array_equal(e.cameras['b'][5], frames[5])
    for sim in (True, False):
        act_file(tmp_path/'y.hdf5', sim=sim)
        assert Hdf5Source([tmp_path/'y.hdf5']).episode(0).action_shift == int(not sim)


def test_bgr_jpegs_come_out_rgb_and_their_bytes_are_kept_back(tmp_path):
    frames = act_file(tmp_path/'x.hdf5', bgr=True)
    wrong, right = (Hdf5Source(tmp_path, color_order=c).episode(0).cameras['a'] for c in ('rgb', 'bgr'))
    assert np.abs(right[2].astype(int)-frames[2]).mean() < 6 < np.abs(wrong[2].astype(int)-frames[2]).mean()
    assert right.jpeg(2) is None and wrong.jpeg(2) is not None


def test_files_are_found_at_any_depth_in_natural_order_and_unfinished_ones_are_not(tmp_path):
    for n in ('b/episode_10', 'b/episode_9', 'a/episode_2', 'b/.episode_3', '.hidden/episode_1'): 
        (tmp_path/n).parent.mkdir(exist_ok=True); (tmp_path/f'{n}.hdf5').write_bytes(b'')
    (tmp_path/'b/.episode_4.hdf5.123.tmp').write_bytes(b'half')
    (tmp_path/'b/notes.txt').write_text('')
    assert [p.relative_to(tmp_path).as_posix() for p in find_episodes(tmp_path)] == ['a/episode_2.hdf5', 'b/episode_9.hdf5', 'b/episode_10.hdf5']


def test_a_killed_writer_leaves_nothing_that_is_listed(tmp_path):
    "Kill the writer at random moments: what is listed is whole"
    e, g = wander(0, l=30, size=(64, 64)), np.random.default_rng(0)
    write_episode(tmp_path/'episode_0.hdf5', e)
    began = time.perf_counter()
    write_episode(tmp_path/'episode_0.hdf5', e)
    took = time.perf_counter() - began    # the moments are those of this machine, busy as it is
    for k in range(12):
        begun, tell = os.pipe()
        pid = os.fork()
        if not pid:
            for i in range(k, 10_000):
                write_episode(tmp_path/f'episode_{i % 20}.hdf5', e)
                os.write(tell, b'.')
            os._exit(0)
        os.read(begun, 1)    # a file is written; the next is under way
        time.sleep(g.uniform(0, 2)*took)
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); os.close(begun); os.close(tell)
        for path in find_episodes(tmp_path):
            got = Hdf5Source([path]).episode(0)
            assert len(got) == 30 and np.array_equal(got.action, e.action) and got.cameras['wrist'][29].shape == (64, 64, 3)
    assert len(find_episodes(tmp_path)) > 1


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = write_episode(tmp_path/'e.hdf5', wander(0))
    old, broken = path.read_bytes(), wander(1)
    broken.cameras['wrist'] = JpegFrames([b'x']*5+[None]*7)
    with pytest.raises(Exception): write_episode(path, broken)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ['e.hdf5']
    with pytest.raises(ValueError, match='compress'): write_episode(path, wander(0), compress='png')


def test_handles_are_bounded_per_process_and_survive_fork_pickle_and_threads(tmp_path):
    for i in range(9): write_episode(tmp_path/f'e{i}.hdf5', wander(i))
    src = Hdf5Source(tmp_path, open_files=3)
    want = [src.episode(i).cameras['top'][i] for i in range(9)]
    assert len(src.handles.open) == 3
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda k: src.episode(k % 9).cameras['top'][k % 9], range(180)))
    assert all(np.array_equal(g, want[k % 9]) for k,g in enumerate(got)) and len(src.handles.open) == 3
    again = pickle.loads(pickle.dumps(src))
    assert again.handles.pid is None and np.array_equal(again.episode(4).cameras['top'][4], want[4])
    pid = os.fork()
    if not pid:
        try: ok = all(np.array_equal(src.episode(i).cameras['top'][i], want[i]) for i in range(9)) and src.handles.pid == os.getpid()
        except BaseException: ok = False
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_the_fingerprint_changes_with_any_file(tmp_path):
    for i in range(3): write_episode(tmp_path/f'e{i}.hdf5', wander(i))
    def fp(**kw): return Hdf5Source(tmp_path, **kw).fingerprint
    seen = [fp(), fp(cameras=('top',)), fp(color_order='bgr')]
    assert fp() == seen[0]
    s = (tmp_path/'e1.hdf5').stat()
    with h5py.File(tmp_path/'e1.hdf5', 'a') as f: f['action'][0,0] = 9
    os.utime(tmp_path/'e1.hdf5', ns=(s.st_atime_ns, s.st_mtime_ns+1)); seen.append(fp())
    (tmp_path/'e2.hdf5').rename(tmp_path/'e7.hdf5'); seen.append(fp())
    (tmp_path/'e7.hdf5').unlink(); seen.append(fp())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize('field,brk', [
    ('action', lambda f: f.__delitem__('action')), ('observations/qpos', lambda f: f.__delitem__('observations/qpos')),
    ('language_raw', lambda f: f.__delitem__('language_raw')), ('observations/images', lambda f: f.__delitem__('observations/images')),
    ('wrist', lambda f: f.__delitem__('observations/images/wrist')), ('state', lambda f: (f.__delitem__('observations/qpos'), f.__setitem__('observations/qpos', np.zeros((3, 4))))),
    ('frame 2', lambda f: f['observations/images/top'].__setitem__((2, slice(0, 9)), 0)),
    ('observations/images/top', lambda f: (f.__delitem__('observations/images/top'), f.__setitem__('observations/images/top', np.zeros((12, 4, 4))))),
])
def test_reading_a_bad_file_names_it_and_the_field(tmp_path, field, brk):
    for i in range(2): write_episode(tmp_path/f'episode_{i}.hdf5', wander(i))
    with h5py.File(tmp_path/'episode_1.hdf5', 'a') as f: brk(f)
    with pytest.raises(ValueError) as e: Hdf5Source(tmp_path, cameras=('top', 'wrist')).episode(1).cameras['top'][2]
    assert 'episode_1.hdf5' in str(e.value) and field in str(e.value) and 'expected' in str(e.value) and 'found' in str(e.value)


# windows

@pytest.mark.parametrize('seed', range(5))
def test_windows_equal_the_obvious_loop(seed):
    g = np.random.default_rng(seed)
    src = ArraySource([wander(i, l=int(g.integers(1, 15)), size=(4, 4), action_shift=int(g.integers(0, 2))) for i in range(6)])
    h = int(g.integers(1, 20))
    w = Windows(src, h)
    idx = g.permutation(len(w))
    low = w.lowdim(idx, torch.arange(len(w)))
    for row,i in enumerate(idx):
        acts, pad, ep, t = rows(w, i, h)
        assert np.array_equal(low['action'][row], acts) and low['action_is_pad'][row].tolist() == pad
        assert (low['episode'][row], low['step'][row], low['instruction'][row]) == (ep, t, f'go to {ep}')
        assert np.array_equal(low['state'][row], src.episode(ep).state[t])
    assert len(w) == src.lengths().sum() and low['subtask'] is None


def test_windows_agree_with_dexvla_where_its_loss_counts():
    "Items recorded from DexVLA's own data set class, with and without the one-step shift of real-robot files"
    d = torch.load(here/'fixtures/dexvla_windows.pt', weights_only=True)
    st = d['stats']
    for sim in (0, 1):
        src = ArraySource([Episode({}, r['qpos'].numpy(), r['action'].numpy(), '', action_shift=1-sim) for r in d['raw']])
        want, w = d[f'sim{sim}_delta0'], Windows(src, d['sim0_delta0']['action'].shape[1])
        low = w.lowdim(np.arange(len(w)), torch.arange(len(w)))
        assert torch.equal(low['action_is_pad'], want['is_pad'].bool())
        norm = Normalizer((st['action_max']+st['action_min'])/2, (st['action_max']-st['action_min'])/2)
        diff = (norm(low['action'])-want['action'])[~low['action_is_pad']].abs()
        assert diff[:,:3].max() < 1e-5 and diff[:,3].max() < 1e-3, 'dimension 3 is a constant that DexVLA stretches 10^4-fold'
        assert (zscore(dict(mean=st['qpos_mean'].tolist(), std=st['qpos_std'].tolist()))(low['state'])-want['state']).abs().max() < 1e-5
        mine = compute_stats(src)
        n = mine['action']['count']
        np.testing.assert_allclose(mine['action']['mean'], st['action_mean'], atol=1e-6)
        np.testing.assert_allclose(np.maximum(np.array(mine['action']['std'])*(n/(n-1))**.5, 1e-2), st['action_std'], atol=1e-6)
        np.testing.assert_allclose(np.array(mine['action']['min'])-1e-4, st['action_min'], atol=1e-6)


@pytest.mark.parametrize('seed', range(4))
def test_relative_and_delta_are_undone(seed):
    g = torch.Generator().manual_seed(seed)
    b,t,a,p = (int(x) for x in torch.randint(1, 12, (4,), generator=g))
    p = p+a
    x, s = torch.randn(b, t, a, generator=g, dtype=torch.float64), torch.randn(b, p, generator=g, dtype=torch.float64)
    perm = torch.randperm(p, generator=g)[:a].tolist()
    for dims in (None, perm, [None if i % 2 else d for i,d in enumerate(perm)], [None]*a):
        for there,back in ((to_relative, from_relative), (to_delta, from_delta)):
            assert (back(there(x, s, dims), s, dims)-x).abs().max() < 1e-12
        for i,d in enumerate(dims or range(a)):
            if d is None: assert torch.equal(to_delta(x, s, dims)[...,i], x[...,i]) and torch.equal(to_relative(x, s, dims)[...,i], x[...,i])
            else: assert torch.allclose(to_delta(x, s, dims)[:,0,i], x[:,0,i]-s[:,d])
    for dims in ([0]*(a+1), [p]*a, [-1]*a):
        with pytest.raises(ValueError, match='dims'): to_relative(x, s, dims)


@pytest.mark.parametrize('control', ['relative', 'delta'])
def test_windows_in_other_controls_come_back_absolute(control):
    src = ArraySource([wander(i, a=3, p=4, size=(4, 4), action_shift=i % 2) for i in range(3)])
    w, plain = Windows(src, 7, control=control, dims=(0, None, 2)), Windows(src, 7)
    low, want = (x.lowdim(np.arange(len(x)), torch.arange(len(x))) for x in (w, plain))
    assert (w.to_absolute(low['action'], low['state'])-want['action']).abs().max() < 1e-5
    assert torch.equal(low['action'][...,1], want['action'][...,1]) and not torch.equal(low['action'][...,0], want['action'][...,0])
    assert w.fingerprint != plain.fingerprint


def test_windows_at_the_door():
    src = ArraySource([wander(0), wander(1, subtask=['a']*12)])
    w = Windows(src, 3, stride=5, cameras=('wrist',))
    assert w.starts.tolist() == [0, 5, 10, 12, 17, 22] and w.samples([3]).subtask == ['a'] and w.samples([0]).subtask == ['']
    assert w.samples([1, 4]).images.shape == (2, 1, 3, 16, 24)
    assert np.array_equal(w.samples([1]).images[0,0].permute(1, 2, 0), src.episode(0).cameras['wrist'][5])
    for kw in (dict(horizon=0), dict(horizon=2, stride=0), dict(horizon=2, control='polar'), dict(horizon=2, cameras=('side',)), dict(horizon=2, control='delta', dims=(0,))):
        with pytest.raises(ValueError, match='expected .*found'): Windows(src, **kw)
    with pytest.raises(ValueError, match='episode 1: action: expected 4'): Windows(ArraySource([wander(0), wander(1, a=3)]), 2)


# statistics and normalisers

@pytest.mark.parametrize('seed', range(4))
def test_joined_moments_equal_the_whole(seed, monkeypatch):
    monkeypatch.setattr(Moments, 'size', 200)    # so that the sample of rows is exercised too
    g = np.random.default_rng(seed)
    x = g.normal(g.normal(0, 1e4, 3), [1e-3, 1, 50], (int(g.integers(3, 2000)), 3))
    cuts = np.sort(g.integers(1, len(x), 5)); cuts = np.unique([0, *cuts, len(x)])
    parts = [Moments.of(x[a:b], a) for a,b in zip(cuts, cuts[1:])]
    whole = Moments.of(x).as_dict()
    for order in (parts, parts[::-1], [parts[i] for i in g.permutation(len(parts))]):
        got = reduce(lambda a,b: a+b, order).as_dict()
        assert got['count'] == len(x)
        for k in ('min', 'max', 'q01', 'q99'): assert got[k] == whole[k], k
        for k in ('mean', 'std'): np.testing.assert_allclose(got[k], whole[k], rtol=1e-9)
    np.testing.assert_allclose(whole['std'], x.std(0), rtol=1e-9)
    if len(x) <= 200: np.testing.assert_allclose(whole['q01'], np.quantile(x.astype(np.float32), .01, axis=0), rtol=1e-6)


def test_statistics_of_sources_windows_and_caches(tmp_path):
    src = ArraySource([wander(i, l=5+i, size=(4, 4)) for i in range(5)])
    stats, acts = compute_stats(src), np.concatenate([e.action for e in src.episodes])
    np.testing.assert_allclose(stats['action']['mean'], acts.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats['action']['q99'], np.quantile(acts, .99, axis=0), atol=1e-6)
    assert compute_stats(Windows(src, 4)) == stats and stats['fingerprint'] == src.fingerprint
    assert json.loads(json.dumps(stats)) == stats
    w = Windows(src, 4, control='relative')
    a,pad = w.chunk(np.arange(len(w)))
    rel = cached_stats(w, tmp_path)
    np.testing.assert_allclose(rel['action']['mean'], a[~pad].mean(0), atol=1e-6)
    assert rel['action']['count'] == int((~pad).sum()) and rel['state'] == stats['state']
    path, = tmp_path.iterdir()
    path.write_text(json.dumps({**rel, 'fingerprint': 'of other data'}))
    assert cached_stats(w, tmp_path) == rel
    assert cached_stats(src, tmp_path) == stats and len(list(tmp_path.iterdir())) == 2
    src.episodes[2].state[3,1] = np.inf
    with pytest.raises(ValueError, match='dimension 1: expected a finite number, found inf'): compute_stats(src)


@pytest.mark.parametrize('make', [zscore, minmax, quantile])
@pytest.mark.parametrize('seed', range(3))
def test_normalisers_return_what_they_were_given(make, seed):
    g = np.random.default_rng(seed)
    x = torch.tensor(g.normal(g.normal(0, 10, 6), 10.**g.uniform(-6, 2, 6), (500, 6)), dtype=torch.float32)
    n = make(Moments.of(x).as_dict())
    y = n(x)
    size = n.offset.abs()+n.scale*y.abs().amax(0)
    assert y.isfinite().all() and ((n.inverse(y)-x).abs() <= 4*torch.finfo(torch.float32).eps*size).all()
    assert n(x.reshape(50, 10, 6)).shape == (50, 10, 6)
    if make is minmax: assert y.abs().max() <= 1+1e-3


def test_normalisers_do_not_stretch_what_does_not_move():
    x = torch.cat([torch.full((100, 1), 3.), 3+1e-5*torch.randn(100, 1, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 100)[:,None]], 1)
    stats = Moments.of(x).as_dict()
    for make in (zscore, minmax, quantile):
        y = make(stats)(x)
        assert y[:,0].abs().max() < 1e-4 and y[:,1].abs().max() < .02 and y[:,2].abs().max() > .9
    assert minmax(stats, margin=1e-4, min_range=0)(x)[:,1].abs().max() > .05
    for bad in (torch.tensor([0.]), torch.tensor([-1.]), torch.tensor([torch.nan])):
        with pytest.raises(ValueError, match='positive'): Normalizer(torch.zeros(1), bad)
