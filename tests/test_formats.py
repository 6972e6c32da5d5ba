"Folders and Parquet: what is read, what is refused; and that each of the five formats goes into every other and back without a loss"
import json, pickle
from functools import partial

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest

from test_convert import full, jpegs
from test_data import wander
from vla_nb.data.cache import build_cache
from vla_nb.data.convert import compare, convert, hdf5
from vla_nb.data.dataset import DataConfig, open_source, train_val
from vla_nb.data.doctor import check, report, require_healthy
from vla_nb.data.episode import ArraySource, EpisodeSource, Frames, Subset
from vla_nb.data.folders import FolderSource, folders, slug, write_run
from vla_nb.data.hdf5 import Hdf5Source, write_episode
from vla_nb.data.integrity import notes
from vla_nb.data.lerobot import LeRobotSource
from vla_nb.data.lerobot_write import lerobot
from vla_nb.data.loader import Loader
from vla_nb.data.parquet import ParquetSource, Tables, parquet, write_parquet
from vla_nb.data.parts import Pictures, decode_picture, encode_png, picture_size
from vla_nb.data.rlds import RldsSource
from vla_nb.data.rlds_write import rlds
from vla_nb.data.stats import compute_stats

inf = float('inf')
formats = {'hdf5': (hdf5, Hdf5Source), 'folders': (folders, FolderSource), 'parquet': (parquet, ParquetSource), 'rlds': (rlds, RldsSource), 'lerobot': (lerobot, LeRobotSource), 'lerobot_v21': (partial(lerobot, 'v2.1'), LeRobotSource)}
exact = {'hdf5': hdf5(None), 'folders': folders(lossless=True), 'parquet': parquet(lossless=True), 'rlds': rlds(lossless=True), 'lerobot': lerobot(lossless=True), 'lerobot_v21': lerobot('v2.1', lossless=True)}


def keep(s): return s


@pytest.mark.parametrize('b', formats)
@pytest.mark.parametrize('a', formats)
def test_every_format_goes_into_every_other_and_back(tmp_path, a, b):
    eps = [full(0), full(1), full(2, l=40), full(3, l=1)]
    (to_a,read_a), (to_b,read_b) = formats[a], formats[b]
    convert(ArraySource(eps), tmp_path/'a', to_a(), progress=False)
    assert convert(read_a(tmp_path/'a'), tmp_path/'b', to_b(), progress=False) == dict(episodes=4, written=4, psnr=None)
    assert convert(read_b(tmp_path/'b'), tmp_path/'c', to_a(), progress=False)['psnr'] is None
    for source in (read_b(tmp_path/'b'), read_a(tmp_path/'c'), open_source(tmp_path/'b')):
        assert isinstance(source, EpisodeSource) and source.lengths().sum() == 65
        found = {source.episode(i).instruction: source.episode(i) for i in range(4)}
        for e in eps:
            assert compare(e, found[e.instruction]) == inf
            for c,f in e.cameras.items(): assert isinstance(found[e.instruction].cameras[c], Frames) and f.data == [found[e.instruction].cameras[c].jpeg(i) for i in range(len(f))], 'the very bytes'


@pytest.mark.parametrize('kind', formats)
def test_frames_that_were_never_compressed_stay_what_they_were(tmp_path, kind):
    eps = [wander(i, l=5) for i in range(2)]
    assert convert(ArraySource(eps), tmp_path/'a', exact[kind], progress=False)['psnr'] is None
    source = open_source(tmp_path/'a')
    assert all((source.episode(i).cameras[c][t] == e.cameras[c][t]).all() for i,e in enumerate(eps) for c in source.cameras for t in range(5))
    assert convert(ArraySource([wander(0, size=(48, 64))]), tmp_path/'b', formats[kind][0](), progress=False)['psnr'] > 30


@pytest.mark.parametrize('kind', formats)
def test_statistics_windows_loader_and_cache_do_not_see_the_format(tmp_path, kind):
    src = ArraySource([full(i) for i in range(6)])
    convert(src, tmp_path/'a', formats[kind][0](), progress=False)
    got = open_source(tmp_path/'a')
    i = [got.episode(k).instruction for k in range(6)]
    order = [i.index(f'go to {k}') for k in range(6)]    # folders lie in the order of their names
    got = Subset(got, order)
    a, b = compute_stats(src), compute_stats(got)
    assert {k: a[k] for k in ('action', 'state')} == {k: b[k] for k in ('action', 'state')}
    batches = []
    for s in (src, got):
        train, _ = train_val(s, DataConfig(val_fraction=.2), 4)
        batches.append(list(Loader(train, 8, keep, size=(16, 24), steps=5)))
    for x,y in zip(*batches): assert (x.images == y.images).all() and (x.action == y.action).all() and x.instruction == y.instruction and x.subtask == y.subtask
    cache = build_cache(got, tmp_path/'cache', height=16, width=24, progress=False)
    assert (cache.episode(3).action == src.episode(3).action).all()
    assert check(open_source(tmp_path/'a')) == [] and notes(open_source(tmp_path/'a')) == []
    require_healthy(open_source(tmp_path/'a'))
    assert (tmp_path/'a'/'.healthy.json').exists() and pickle.loads(pickle.dumps(open_source(tmp_path/'a'))).fingerprint == open_source(tmp_path/'a').fingerprint


def test_two_formats_in_one_folder_are_refused(tmp_path):
    write_episode(tmp_path/'a.hdf5', full(0)); write_parquet(tmp_path/'a.parquet', full(0))
    with pytest.raises(ValueError, match=r'expected one kind of data, found \*.hdf5 episodes and \*.parquet'): open_source(tmp_path)


def test_one_mixture_of_all_formats(tmp_path):
    for k,(to,_) in formats.items(): convert(ArraySource([full(i) for i in range(4)]), tmp_path/k, to(), progress=False)
    (tmp_path/'m.json').write_text(json.dumps(dict(t=dict(dataset_dir=list(formats), sample_weights=[1, 1, 2, 1, 1, 1]))))
    mix = open_source(tmp_path/'m.json')
    train, _ = train_val(mix, DataConfig(val_fraction=.25), 4)
    assert check(mix) == [] and len(train) == 6*3*12
    for s in Loader(train, 9, keep, size=(16, 24), steps=8): assert s.images.any()


@pytest.mark.parametrize('kind', formats)
def test_a_fingerprint_changes_with_a_picture(tmp_path, kind):
    convert(ArraySource([full(0)]), tmp_path/'a', formats[kind][0](), progress=False)
    was = formats[kind][1](tmp_path/'a').fingerprint
    assert formats[kind][1](tmp_path/'a').fingerprint == was
    p = next(p for p in (tmp_path/'a').rglob('*') if 'meta' not in p.parts and (p.suffix in ('.hdf5', '.jpg', '.parquet') or '.tfrecord-' in p.name))
    p.write_bytes(p.read_bytes()[:-1])
    assert formats[kind][1](tmp_path/'a').fingerprint != was


# folders

def tree(at, **words):
    for i in range(2): write_run(at/f'clean_up/pick_pillow/run_{i}', full(i))
    for p in at.rglob('episode.json'): p.unlink()
    (at/'instruction.json').write_text(json.dumps(words)) if words else None
    return at


def test_words_come_from_the_table_then_from_the_names(tmp_path):
    said = lambda at: [(e.instruction, e.subtask[0]) for e in [FolderSource(at).episode(0)]][0]
    assert said(tree(tmp_path/'a')) == ('clean up', 'pick pillow')
    assert said(tree(tmp_path/'b', tasks={'clean_up': {'text': 'clean the room', 'subtasks': {'pick_pillow': {'text': 'lift it'}}}})) == ('clean the room', 'lift it')
    (tmp_path/'c').mkdir(); (tmp_path/'a'/'clean_up'/'pick_pillow').rename(tmp_path/'c'/'stage2')
    with pytest.raises(ValueError, match='stage2/run_0: instruction.json: expected an entry for stage 2'): FolderSource(tmp_path/'c').episode(0)
    (tmp_path/'c'/'instruction.json').write_text(json.dumps(dict(high_level_task='tidy', task_instructions=[dict(stage=2, text='old words')])))
    assert said(tmp_path/'c') == ('tidy', 'old words')


@pytest.mark.parametrize('text,said', [('{"a": 1 // no\n}', 'expected JSON'), ('[]', 'expected names'), ('{"tasks": {"t": 3}}', 'tasks: t'), ('{"tasks": {"t": {"subtasks": {"s": 1}}}}', 'subtasks: s'),
    ('{"task_instructions": {}}', 'expected a list'), ('{"task_instructions": [1]}', 'entry 0')])
def test_a_table_that_cannot_be_read_is_named(tmp_path, text, said):
    tree(tmp_path)
    (tmp_path/'instruction.json').write_text(text)
    with pytest.raises(ValueError, match=f'instruction.json.*{said}'): FolderSource(tmp_path).episode(0)
    assert {f.field for f in check(FolderSource(tmp_path))} == {'instruction.json'}


def test_slugs_say_their_words_or_carry_a_hash():
    assert slug('press the button') == 'press_the_button' and slug('Press it') != slug('press it') and slug('a/../b').count('/') == 0 and slug('дом').startswith('none_')
    assert len(slug('x'*500)) < 80 and slug('x'*500) != slug('x'*501)


def test_pickles_are_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path/'boom'), 'w'))
    tree(tmp_path)
    np.save(tmp_path/'clean_up/pick_pillow/run_0/actions.npy', np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match='run_0: actions.npy: expected a .npy file of numbers'): FolderSource(tmp_path).episode(0)
    assert not (tmp_path/'boom').exists()


# parquet

def test_many_episodes_in_one_file_and_any_row_groups(tmp_path):
    eps = [full(0, l=7), full(2, l=33), full(4, l=64)]
    for rows in (1, 32, 1000):
        p = write_parquet(tmp_path/f'{rows}'/'a.parquet', *eps, rows=rows)
        assert pq.ParquetFile(p).metadata.num_row_groups == sum(-(-len(e)//rows) for e in eps)
        src = ParquetSource(p.parent)
        assert src.lengths().tolist() == [7, 33, 64] and [compare(e, src.episode(i)) for i,e in enumerate(eps)] == [inf]*3
        assert [src.describe(i) for i in range(3)] == [f'a.parquet, episode {i}' for i in range(3)]
    with pytest.raises(ValueError, match='episode 1: cameras'): write_parquet(tmp_path/'x.parquet', full(0), jpegs(2, cameras=('top',), subtask=['a']*12, reward=np.ones(12), velocity=np.ones((12, 3))))
    with pytest.raises(ValueError, match='episode 1: subtask'): write_parquet(tmp_path/'x.parquet', full(0), jpegs(2, reward=np.ones(12), velocity=np.ones((12, 3))))
    assert not (tmp_path/'x.parquet').exists()


def test_groups_are_kept_up_to_their_bytes_and_threads_agree(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    e = full(0, l=200)
    p = write_parquet(tmp_path/'a.parquet', e, rows=10)
    small = Tables(keep=3*10*600)
    src = ParquetSource(tmp_path)
    src.tables = small
    at = np.random.default_rng(0).integers(0, 200, 400).tolist()
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda i: src.episode(0).cameras['top'].jpeg(i), at))
    assert got == [e.cameras['top'].data[i] for i in at] and sum(c.nbytes for c in small.groups.values()) <= 3*10*600


def theirs(path, change, *eps):
    write_parquet(path, *(eps or [full(0)]))
    t = {**pq.read_table(path).to_pydict()}
    change(t)
    pq.write_table(pa.table(t), path)
    return path


def test_other_peoples_columns(tmp_path):
    def change(t):
        t['state'] = [[float(x) for x in r] for r in t['state']]
        t['is_first'] = [int(x) for x in t['is_first']]
        del t['subtask'], t['velocity'], t['reward']
    theirs(tmp_path/'a.parquet', change)
    e = ParquetSource(tmp_path).episode(0)
    assert list(e.cameras) == ['image_1', 'image_2'] and np.allclose(e.state, full(0).state) and e.subtask is None and e.success is None
    assert check(ParquetSource(tmp_path)) == []


wrong = {  # what to do to a table -> field, found
    'ragged': (lambda t: t['action'].__setitem__(5, [1.]), 'action', '1 at step 5'),
    'nan': (lambda t: t['state'][3].__setitem__(1, float('nan')), 'state', 'nan at step 3, dimension 1'),
    'no action': (lambda t: t.pop('action'), 'action', "['state', 'velocity', 'prompt'"),
    'null state': (lambda t: t['state'].__setitem__(2, None), 'state', '1 empty, the first at step 2'),
    'two prompts': (lambda t: t['prompt'].__setitem__(4, 'x'), 'prompt', '2, another from step 4'),
    'empty prompt': (lambda t: t.__setitem__('prompt', [' ']*12), 'prompt', 'an empty text'),
    'no end': (lambda t: t['is_last'].__setitem__(11, False), 'is_last', 'true at []'),
    'no beginning': (lambda t: t['is_first'].__setitem__(0, False), 'is_first', 'false, or nothing, at step 0'),
    'no flags': (lambda t: t.pop('is_first'), 'is_first', 'none'),
    'garbage': (lambda t: t['image_2_bytes'].__setitem__(6, b'\xff\xd8oh'), 'image_2', 'frame 6: 4 bytes'),
    'null picture': (lambda t: t['image_1_bytes'].__setitem__(1, None), 'image_1', 'frame 1: nothing (null)'),
    'cut png': (lambda t: t['image_1_bytes'].__setitem__(1, encode_png(np.zeros((9, 9, 3), np.uint8))[:-20]), 'image_1', 'frame 1:'),
    'text for numbers': (lambda t: t.__setitem__('state', ['x']*12), 'state', 'string'),
}


@pytest.mark.parametrize('how', wrong)
def test_each_fault_of_a_table_is_named_by_the_command_and_training_refuses(tmp_path, how, capsys):
    from vla_nb.cli import main
    for i in range(4): theirs(tmp_path/f'{i}.parquet', wrong[how][0] if i == 2 else lambda t: None, full(2*i))
    faults = check(ParquetSource(tmp_path))
    assert [(f.file, f.field) for f in faults] == [('2.parquet', wrong[how][1])], report(faults)
    assert wrong[how][2] in faults[0].found
    assert main(['doctor', str(tmp_path)]) == 2 and f'2.parquet  {wrong[how][1]}' in capsys.readouterr().out
    assert main(['train', '--data', str(tmp_path), '--out', str(tmp_path/'run')]) == 2 and f'2.parquet: {wrong[how][1]}: expected' in capsys.readouterr().err


broken_runs = {
    'no actions': (lambda r: (r/'actions.npy').unlink(), 'actions.npy', 'no file'),
    'cut array': (lambda r: (r/'qpos.npy').write_bytes((r/'qpos.npy').read_bytes()[:-5]), 'qpos.npy', 'bytes ('),
    'flat array': (lambda r: np.save(r/'qpos.npy', np.arange(12.)), 'qpos.npy', 'float64 (12,)'),
    'inf': (lambda r: np.save(r/'actions.npy', np.where(np.arange(48).reshape(12, 4) == 9, np.inf, np.arange(48.).reshape(12, 4))), 'actions.npy', 'inf at step 2, dimension 1'),
    'missing frame': (lambda r: (r/'top'/'000004.jpg').unlink(), 'top', '11'),
    'cut frame': (lambda r: (r/'top'/'000004.jpg').write_bytes((r/'top'/'000004.jpg').read_bytes()[:-9]), 'top', 'frame 4:'),
    'missing camera': (lambda r: [p.unlink() for p in (r/'wrist').iterdir()] and (r/'wrist').rmdir(), 'wrist', "only ['top']"),
    'not utf-8': (lambda r: (r/'episode.json').write_bytes(b'{"instruction": "gr\xfcn"}'), 'episode.json', 'utf-8'),
    'short subtask': (lambda r: (r/'episode.json').write_text(json.dumps({**json.loads((r/'episode.json').read_text()), 'subtask': ['a']})), 'subtask', '1'),
    'still': (lambda r: np.save(r/'actions.npy', np.hstack([np.load(r/'actions.npy')[:,:3], np.full((12, 1), .3)])), 'actions.npy, dimension 3', '0.3 at every step'),
}


@pytest.mark.parametrize('how', broken_runs)
def test_each_fault_of_a_run_is_named_by_the_command_and_training_refuses(tmp_path, how, capsys):
    from vla_nb.cli import main
    for i in range(8):
        e = full(i); e.may_rest = ()
        write_run(tmp_path/'t'/'s'/f'run_{i}', e)
    broken_runs[how][0](tmp_path/'t'/'s'/'run_0')
    faults = check(FolderSource(tmp_path))
    assert [(f.file, f.field) for f in faults] == [('t/s/run_0', broken_runs[how][1])], report(faults)
    assert broken_runs[how][2] in faults[0].found
    assert main(['doctor', str(tmp_path)]) == 2 and f't/s/run_0  {broken_runs[how][1]}' in capsys.readouterr().out
    assert main(['train', '--data', str(tmp_path), '--out', str(tmp_path/'run')]) == 2 and f't/s/run_0: {broken_runs[how][1]}: expected' in capsys.readouterr().err


def test_a_cut_file_is_named_beside_whole_ones(tmp_path):
    for i in range(3): write_parquet(tmp_path/f'{i}.parquet', full(2*i))
    (tmp_path/'0.parquet').write_bytes((tmp_path/'0.parquet').read_bytes()[:-30])
    src = open_source(tmp_path)
    assert src.cameras == ('top', 'wrist') and [(f.file, f.field) for f in check(src)] == [('0.parquet', 'file')]
    with pytest.raises(ValueError, match='0.parquet: file: expected a complete Parquet file'): src.episode(0)


def test_pictures(tmp_path):
    x = wander(0).cameras['top'][0]
    assert (decode_picture(encode_png(x)) == x).all() and picture_size(encode_png(x)) == x.shape[:2]
    for bad in (b'', b'x', encode_png(x)[:40], encode_png(x)[:9]):
        with pytest.raises(ValueError): decode_picture(bad)
    with pytest.raises(IndexError): Pictures(lambda i: b'', 3, 'r: top')[3]
