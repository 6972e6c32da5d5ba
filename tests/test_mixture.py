"Mixtures: what is read from a file, which episodes belong, who is held out, and that weights decide what is seen"
import json

import numpy as np, pytest

from test_data import wander
from vla_nb.core import Batch
from vla_nb.data.dataset import DataConfig, open_source, train_val
from vla_nb.data.episode import ArraySource, EpisodeSource, Subset, split_episodes
from vla_nb.data.hdf5 import Hdf5Source, write_episode
from vla_nb.data.loader import Loader, Order
from vla_nb.data.mixture import MixedOrder, MixedWindows, Mixture, Task, open_mixture, read_tasks, wanted
from vla_nb.data.stats import cached_stats, compute_stats


def folder(path, n, seed=0, **kw):
    for i in range(n): write_episode(path/f'episode_{i}.hdf5', wander(seed+i, **kw))
    return path


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    at = tmp_path_factory.mktemp('mix')
    folder(at/'a', 6, l=30); folder(at/'b', 3, 50, l=10); folder(at/'b'/'mirror', 4, 70, l=10); folder(at/'b'/'pointcloud', 2, 90)
    write_episode(at/'b'/'features_0.hdf5', wander(99))
    return at


def write(at, obj, name='mix.json'):
    (at/name).write_text(json.dumps(obj) if name.endswith('json') else obj)
    return at/name


# the file

def test_json_and_yaml_say_the_same_and_a_task_is_named_where_there_are_several(data):
    d = dict(one=dict(dataset_dir=['a'], sample_weights=[2]), two=dict(dataset_dir=['a', 'b'], skip_mirrored=True, camera_names=['wrist', 'top']))
    j = write(data, d)
    y = write(data, 'one: {dataset_dir: [a], sample_weights: [2]}\ntwo: {dataset_dir: [a, b], skip_mirrored: true, camera_names: [wrist, top]}', 'mix.yaml')
    assert read_tasks(j) == read_tasks(y)
    for f in (j, y):
        mix = open_source(f'{f}:two')
        assert isinstance(mix, Mixture) and isinstance(mix, EpisodeSource) and len(mix) == 9 and mix.cameras == ('wrist', 'top')
        with pytest.raises(ValueError, match=r"task: expected one of \['one', 'two'\], found none; name it as .*:one"): open_source(f)
        with pytest.raises(ValueError, match="found three"): open_source(f'{f}:three')


@pytest.mark.parametrize('text,said', [
    ('{}', 'found nothing'), ('', 'expected JSON'), ('[1]', 'found list'), ('{', 'expected JSON'), ('{"t": 3}', 't: expected settings'), ('{"t": {}}', 'dataset_dir: expected at least one folder'),
    ('{"t": {"dataset_dir": []}}', 'dataset_dir: expected at least one'), ('{"t": {"dataset_dir": "a"}}', "dataset_dir: expected a list, found 'a'"),
    ('{"t": {"dataset_dir": [1]}}', 'dataset_dir: expected texts'), ('{"t": {"dataset_dir": ["a"], "sample_weights": ["1"]}}', 'sample_weights: expected numbers'),
    ('{"t": {"dataset_dir": ["a"], "camera_nmes": []}}', "did you mean 'camera_names'"), ('{"t": {"dataset_dir": ["a"], "episode_len": 900}}', 'episode_len.*take it out'),
    ('{"t": {"dataset_dir": ["a"], "skip_mirrored": 1}}', 'skip_mirrored: expected a bool'),
    ('{"t": {"dataset_dir": ["a"], "sample_weights": [1, 2]}}', 'sample_weights: expected 1 positive'), ('{"t": {"dataset_dir": ["a"], "sample_weights": [0]}}', 'leave a folder out'),
    ('{"t": {"dataset_dir": ["a"], "sample_weights": [-1]}}', 'positive'), ('{"t": {"dataset_dir": ["a", "a"]}}', 'each folder once'),
    ('{"t": {"dataset_dir": ["a", "nowhere"]}}', 'nowhere: expected a folder'), ('{"t": {"dataset_dir": ["b"], "name_filter": "*fold*"}}', "b: episodes: expected some that fit name_filter='\\*fold\\*'"),
    ('{"t": {"dataset_dir": ["a"], "train_only": ["b"]}}', 'train_only: expected some of'),
])
def test_what_is_wrong_with_a_file_is_said(data, text, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said): open_source(_raw(data, text))


def _raw(at, text):
    (at/'bad.json').write_text(text)
    return at/'bad.json'


def test_which_episodes_belong(data):
    names = lambda **kw: [s.describe(i).removeprefix('b/') for s in [open_source(write(data, dict(t=dict(dataset_dir=['b'], **kw))))] for i in range(len(s))]
    assert names(skip_mirrored=True) == [f'episode_{i}.hdf5' for i in range(3)]
    assert names() == [f'episode_{i}.hdf5' for i in range(3)] + [f'mirror/episode_{i}.hdf5' for i in range(4)]
    assert names(name_filter='*_1*') == ['episode_1.hdf5', 'mirror/episode_1.hdf5'] and names(name_filter='mirror/*') == [f'mirror/episode_{i}.hdf5' for i in range(4)]


def test_only_names_within_the_folder_count(tmp_path):
    folder(tmp_path/'mirror_lab'/'pointcloud_truncate'/'a', 3)
    assert len(open_source(write(tmp_path, dict(t=dict(dataset_dir=['mirror_lab/pointcloud_truncate/a'], skip_mirrored=True))))) == 3
    assert not wanted('a/mirror_1.hdf5', Task(('a',), skip_mirrored=True)) and wanted('a/mirror_1.hdf5', Task(('a',)))


def test_absolute_folders_and_folders_beside_the_file_from_anywhere(data, tmp_path, monkeypatch):
    f = write(data, dict(t=dict(dataset_dir=['a', str(data/'b')])))
    monkeypatch.chdir(tmp_path)
    assert len(open_source(f)) == 6+7


# sources as one

def sources(*sizes, **kw): return {f's{k}': ArraySource([wander(100*k+i, **kw) for i in range(n)]) for k,n in enumerate(sizes)}


def test_an_episode_is_that_of_its_source_with_the_cameras_asked_for():
    parts = sources(3, 2)
    mix = Mixture(parts, cameras=['wrist'])
    assert len(mix) == 5 and mix.lengths().tolist() == [12]*5 and mix.describe(3) == 's1/episode 0' and mix.member(np.arange(5)).tolist() == [0, 0, 0, 1, 1]
    for i,e in enumerate([*parts['s0'].episodes, *parts['s1'].episodes]):
        got = mix.episode(i)
        assert list(got.cameras) == ['wrist'] and np.array_equal(got.action, e.action) and got.cameras['wrist'] is e.cameras['wrist']
    assert len({m.fingerprint for m in (mix, Mixture(parts), Mixture(sources(2, 3)), Mixture(parts, cameras=['top']))}) == 4
    assert mix.fingerprint == Mixture(parts, [1, 5], ['wrist']).fingerprint, 'weights change what is seen, not what there is'


def test_each_folder_holds_out_its_own_and_a_new_folder_moves_nothing():
    two, three = Mixture(sources(10, 7)), Mixture(sources(10, 7, 5))
    (t2,v2), (t3,v3) = two.split(.2, 3), three.split(.2, 3)
    assert sorted([*t3, *v3]) == list(range(22)) and np.bincount(three.member(v3)).tolist() == [2, 1, 1]
    assert v3[:3].tolist() == v2.tolist() and v2[:2].tolist() == split_episodes(10, .2, 3)[1].tolist()
    alone = Mixture(sources(10, 7), train_only=['s1']).split(.2, 3)
    assert np.bincount(two.member(alone[1]), minlength=2).tolist() == [2, 0] and len(alone[0]) == 15
    with pytest.raises(ValueError, match='s1: 1 episode: .*train_only'): Mixture(sources(10, 1)).split(.2)
    assert len(Mixture(sources(10, 1), train_only=['s1']).split(.2)[0]) == 9 and len(Mixture(sources(3, 1)).split(0)[1]) == 0


def test_dimensions_that_do_not_fit_are_named_by_both_episodes():
    mix = Mixture({'here': ArraySource([wander(0)]*4), 'there': ArraySource([wander(1, a=3)]*4)}, [1, 1])
    with pytest.raises(ValueError, match='there/episode 0: action: expected 4 dimensions as in here/episode 0, found 3'): train_val(mix, DataConfig(), 4)


# the order

def test_shares_are_kept_to_the_sample_over_any_number_of_epochs():
    g = np.random.default_rng(0)
    for _ in range(30):
        k = g.integers(1, 6)
        sizes, shares = g.integers(20, 200, k), g.uniform(.05, 3, k)
        group = g.permutation(np.repeat(np.arange(k), sizes))
        order = MixedOrder(group, shares.tolist(), batch_size=int(g.integers(1, 9)), seed=int(g.integers(99)))
        epochs = int(g.integers(1, 6))
        seen = np.concatenate([order(s)[0] for s in range(epochs*order.steps)])
        assert np.abs(np.bincount(group[seen], minlength=k) - len(seen)*shares/shares.sum()).max() <= k
        for i in range(k):    # nothing twice before all of the group once
            times = np.bincount(seen, minlength=len(group))[group == i]
            assert times.max()-times.min() <= 1


def test_the_order_is_a_function_of_seed_and_step_alone():
    group = np.repeat([0, 1, 2], [50, 30, 7])
    a, b = (MixedOrder(group, [1, 2, 3], 8, seed=4) for _ in range(2))
    steps = np.random.default_rng(0).permutation(60)
    got = {int(k): a(int(k)) for k in steps}
    for k in range(60):
        idx, seed = b(k)
        assert np.array_equal(got[k][0], idx) and (got[k][1] == seed).all()
    assert not np.array_equal(MixedOrder(group, [1, 2, 3], 8, seed=5)(0)[0], b(0)[0])
    assert MixedOrder(group, [1, 2, 3], 8)(0)[0].tolist() == MixedOrder(group, [10, 20, 30], 8)(0)[0].tolist()


def test_ranks_together_are_one_and_seeds_differ_between_repeats():
    group = np.repeat([0, 1], [90, 6])
    one, parts = MixedOrder(group, [1, 1], 12), [MixedOrder(group, [1, 1], 4, rank=r, world=3) for r in range(3)]
    for k in range(40):
        idx, seed = one(k)
        for r,p in enumerate(parts): assert np.array_equal(p(k)[0], idx[r::3]) and (p(k)[1] == seed[r::3]).all()
    pairs = [(i, s) for k in range(40) for i,s in zip(one(k)[0].tolist(), one(k)[1].tolist())]
    assert len(set(pairs)) == len(pairs) and len({s for _,s in pairs}) == len(pairs), 'a sample that comes again draws other noise'


def test_equal_shares_of_equal_groups_are_one_epoch_of_everything():
    order = MixedOrder(np.repeat([0, 1], 40), [1, 1], 8)
    for e in range(3): assert sorted(np.concatenate([order(e*10+k)[0] for k in range(10)])) == list(range(80))


def test_shares_that_cannot_be_kept_are_refused():
    for group,shares,batch,said in (([0]*5, [1], 9, 'batch_size: expected at most 5'), ([0]*5, [1, 1], 1, 'group 1: expected samples'), ([0, 1, 2, 3], [1]*4, 1, 'shares: expected at least 4')):
        with pytest.raises(ValueError, match=said): MixedOrder(np.array(group), shares, batch)


# through the doors

class Kept(Batch): pass


def keep(s): return Kept(episode=s.episode, step=s.step, seed=s.seed, images=s.images.clone(), action=s.action)


def test_the_loader_follows_the_weights_and_resumes(data):
    src = open_source(write(data, dict(t=dict(dataset_dir=['a', 'b'], skip_mirrored=True, sample_weights=[1, 3]))))
    train, held_out = train_val(src, DataConfig(val_fraction=.2, height=16, width=24), 4)
    assert isinstance(train, MixedWindows) and len(train) == 5*30+2*10 and len(held_out) == 30+10 and type(held_out) is not MixedWindows
    run = list(Loader(train, 10, keep, size=(16, 24), steps=34))
    small = sum(int((train.group[b['episode']] == 1).sum()) for b in run)
    assert small == 255, f'three quarters of 340, found {small}'
    later = list(Loader(train, 10, keep, size=(16, 24), start_step=20, steps=34, threads=0))
    for a,b in zip(run[20:], later): assert all(bool((a[k] == b[k]).all()) for k in a)
    seen = np.concatenate([b['episode'].numpy() for b in Loader(held_out, 5, keep, size=(16, 24), steps=8)])
    assert np.bincount(seen).tolist() == [30, 10], 'validation knows no weights'


def test_without_weights_every_step_is_seen_equally_often(data):
    src = open_source(write(data, dict(t=dict(dataset_dir=['a', 'b'], skip_mirrored=True))))
    train, _ = train_val(src, DataConfig(val_fraction=.2), 4)
    assert not hasattr(train, 'order') and isinstance(Loader(train, 10, keep, size=(8, 8)).order, Order)


def test_statistics_are_of_training_episodes_whatever_the_weights(data, tmp_path):
    entry = dict(dataset_dir=['a', 'b'], skip_mirrored=True)
    all = [train_val(open_source(write(data, dict(t={**entry, **w}))), DataConfig(val_fraction=.2), 4)[0] for w in ({}, dict(sample_weights=[1, 9]))]
    a, b = (compute_stats(w) for w in all)
    assert a == b and a['action']['count'] == 170
    by_hand = np.concatenate([all[0].source.episode(i).action for i in range(7)])
    assert np.allclose(a['action']['mean'], by_hand.mean(0), atol=1e-6) and np.array_equal(a['action']['max'], by_hand.max(0).astype(float))
    assert cached_stats(all[1], tmp_path) == b and all[0].fingerprint != all[1].fingerprint


def test_blind_mixtures_keep_their_weights(data):
    src = open_source(write(data, dict(t=dict(dataset_dir=['a', 'b'], skip_mirrored=True, sample_weights=[1, 1]))))
    seen, blind = (train_val(src, DataConfig(val_fraction=.2, blind=b), 4)[0] for b in (False, True))
    b = next(iter(Loader(blind, 10, keep, size=(8, 8)))); a = next(iter(Loader(seen, 10, keep, size=(8, 8))))
    assert not b['images'].any() and a['images'].any() and (a['seed'] == b['seed']).all()


def test_one_command_trains_on_a_mixture_and_refuses_a_broken_one(data, tmp_path, capsys):
    from vla_nb.cli import main
    f = write(data, dict(fold=dict(dataset_dir=['a', 'b'], skip_mirrored=True, sample_weights=[1, 1]), wipe=dict(dataset_dir=['a'])))
    tiny = ['--steps', '2', '--batch-size', '4', '--warmup', '1', '--no-progress', '--height', '32', '--width', '32', '--val-fraction', '.2']
    assert main(['train', '--data', f'{f}:fold', '--out', str(tmp_path/'run'), *tiny]) == 0
    assert list((tmp_path/'run').glob('checkpoint-*'))
    assert main(['train', '--data', str(f), '--out', str(tmp_path/'none'), *tiny]) == 2 and "expected one of ['fold', 'wipe']" in capsys.readouterr().err
    folder(tmp_path/'c', 4)
    (tmp_path/'c'/'episode_2.hdf5').write_bytes((tmp_path/'c'/'episode_2.hdf5').read_bytes()[:999])
    g = write(tmp_path, dict(t=dict(dataset_dir=[str(data/'a'), 'c'])))
    assert main(['train', '--data', str(g), '--out', str(tmp_path/'broken'), *tiny]) == 2
    assert 'c/episode_2.hdf5: file: expected a complete HDF5 file' in capsys.readouterr().err and not list((tmp_path/'broken').glob('checkpoint-*'))
