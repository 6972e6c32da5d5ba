"LeRobotDataset folders of both versions and their videos: the frame that was asked for, every field there and back, and every fault by its name"
import json, os, pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest

from test_convert import full, jpegs
from test_data import wander
from vla_nb.data.cache import build_cache
from vla_nb.data.convert import compare, convert
from vla_nb.data.dataset import DataConfig, open_source, train_val
from vla_nb.data.doctor import check, report
from vla_nb.data.episode import ArraySource, EpisodeSource
from vla_nb.data.lerobot import LeRobotSource, find_lerobot, read_meta
from vla_nb.data.lerobot_write import join_stats, lerobot
from vla_nb.data.loader import Loader
from vla_nb.data.video import Clips, VideoFrames, nearest, write_video

inf, key = float('inf'), 'observation.images.top'


@pytest.fixture(autouse=True)
def quick(monkeypatch): monkeypatch.setattr(os, 'fsync', lambda fd: None)    # what a power cut leaves is the business of other tests


def keep(s): return s


# video

def bars(k, h=32, w=64): # A picture that says its number in ten bars, so that a codec cannot blur it
    bits = np.array([k >> b & 1 for b in range(8)], np.uint8)
    return np.repeat(np.repeat(np.stack([bits*200+20]*3, -1)[None], w//8, 1), h, 0)


def number(x): return int(sum((x[8:24,8*b+2:8*b+6].mean() > 120) << b for b in range(8)))


@pytest.mark.parametrize('fps,every,codec', [(30, 2, 'libx264'), (29.97, 12, 'libx264'), (10, 250, 'libx264'), (50, 2, 'libsvtav1')])
def test_every_frame_is_the_one_that_was_asked_for(tmp_path, fps, every, codec):
    p = write_video(tmp_path/'a.mp4', (bars(k) for k in range(120)), fps, every=every, codec=codec)
    clips, order = Clips(), np.random.default_rng(0).permutation(120).tolist()
    assert len(clips[p].times) == 120 and [number(clips.frame(p, k)) for k in order] == order
    assert [number(clips.frame(p, k)) for k in range(120)] == list(range(120)) and [number(clips.frame(p, k)) for k in range(119, -1, -1)] == list(range(119, -1, -1))
    assert np.abs(clips[p].times-np.arange(120)/fps).max() < .01/fps


def test_threads_and_copies_agree_and_few_files_are_open(tmp_path):
    paths = [write_video(tmp_path/f'{i}.mp4', (bars((k+40*i) % 256) for k in range(40)), 10) for i in range(4)]
    clips = Clips(size=2)
    at = [(int(a), int(b)) for a,b in np.random.default_rng(1).integers(0, (4, 40), (150, 2))]
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda x: number(clips.frame(paths[x[0]], x[1])), at))
    assert got == [(b+40*a) % 256 for a,b in at] and len(clips.open) <= 2
    assert number(pickle.loads(pickle.dumps(clips)).frame(paths[1], 3)) == 43


def test_a_frame_given_out_is_ones_own(tmp_path):
    f = VideoFrames(Clips(), write_video(tmp_path/'a.mp4', map(bars, range(4)), 10), np.arange(4))
    x = f[2]; x[:] = 0
    assert number(f[2]) == 2 and f.shape == (32, 64, 3) and f.jpeg(0) is None
    with pytest.raises(IndexError): f[4]


def test_what_cannot_be_written_or_read_is_said(tmp_path):
    for frames,said in (([np.zeros((15, 16, 3), np.uint8)], 'expected an even height and width'), ([], 'expected at least one'), ([bars(0), bars(0, h=16)], 'as the first')):
        with pytest.raises(ValueError, match=said): write_video(tmp_path/'a.mp4', frames, 10)
    assert not list(tmp_path.iterdir())
    (tmp_path/'b.mp4').write_bytes(b'no video at all')
    with pytest.raises(ValueError, match='b.mp4: file: expected a whole video'): Clips()[tmp_path/'b.mp4']


def test_times_name_the_nearest_frame_or_none():
    def stop(expected, found): raise ValueError(f'{expected}; {found}')
    t = np.arange(50)/30
    assert (nearest(t, t.astype(np.float32).astype(float), 30, stop) == np.arange(50)).all() and nearest(np.zeros(1), np.zeros(1), 30, stop).tolist() == [0]
    assert nearest(t, t+.1/30, 30, stop).tolist() == list(range(50)) and nearest(t, t[::-1], 30, stop).tolist() == list(range(49, -1, -1))
    with pytest.raises(ValueError, match='for step 3'): nearest(t, np.array([0, 1/30, 2/30, 3.3/30]), 30, stop)


# there and back

@pytest.mark.parametrize('video', [False, True])
@pytest.mark.parametrize('version', ['v2.1', 'v3.0'])
def test_every_field_survives(tmp_path, version, video):
    eps = [full(0), full(1), full(2, l=40), full(3, l=1)]
    done = convert(ArraySource(eps), tmp_path/'a', lerobot(version, video), progress=False)
    src = open_source(tmp_path/'a')
    assert isinstance(src, LeRobotSource) and isinstance(src, EpisodeSource) and src.meta.version == version and src.lengths().tolist() == [12, 12, 40, 1] and check(src) == []
    assert (done['psnr'] is None) == (not video)
    for i,e in enumerate(eps):
        assert (compare(e, src.episode(i), 15 if video else inf) == inf) == (not video)
        if not video: assert all(f.data == [src.episode(i).cameras[c].jpeg(t) for t in range(len(f))] for c,f in e.cameras.items()), 'the very bytes'
    assert pickle.loads(pickle.dumps(src)).episode(2).cameras['top'][39].shape == (16, 24, 3)
    assert find_lerobot(tmp_path) == [] and not list(tmp_path.rglob('.*tmp'))


@pytest.mark.parametrize('version', ['v2.1', 'v3.0'])
def test_the_tables_are_what_its_readers_ask_for(tmp_path, version):
    eps = [full(i, l=5+i) for i in range(3)]
    convert(ArraySource(eps), tmp_path, lerobot(version), progress=False)
    info = json.loads((tmp_path/'meta/info.json').read_text())
    assert (info['total_episodes'], info['total_frames'], info['total_tasks'], info['fps'], info['splits']) == (3, 18, 3, 20, {'train': '0:3'})
    t = [pq.read_table(p) for p in sorted((tmp_path/'data').rglob('*.parquet'))]
    assert {*t[0].column_names} == {*info['features']} and np.concatenate([x['index'].to_numpy() for x in t]).tolist() == list(range(18))
    assert np.allclose(t[2]['timestamp'].to_numpy(), np.arange(7)/20) and t[1].schema.field('action').type == pa.list_(pa.float32(), 4) and json.loads(t[0].schema.metadata[b'huggingface'])['info']['features'][key] == {'_type': 'Image'}
    if version == 'v3.0':
        e = pq.read_table(tmp_path/'meta/episodes/chunk-000/file-000.parquet').to_pylist()
        assert [(r['dataset_from_index'], r['dataset_to_index']) for r in e] == [(0, 5), (5, 11), (11, 18)] and len(e[0]['stats/action/mean']) == 4 and json.loads((tmp_path/'meta/stats.json').read_text())['action']['count'] == [18]
        assert b'pandas' in pq.read_schema(tmp_path/'meta/tasks.parquet').metadata
    else:
        lines = [json.loads(l) for l in (tmp_path/'meta/episodes_stats.jsonl').read_text().splitlines()]
        stats = join_stats([l['stats'] for l in lines])
        a = np.concatenate([e.action for e in eps])
        assert np.allclose(stats['action']['mean'], a.mean(0), atol=1e-6) and np.allclose(stats['action']['std'], a.std(0), atol=1e-6) and np.shape(stats[key]['mean']) == (3, 1, 1)


def test_many_episodes_in_one_table_and_one_video(tmp_path):
    l = [7, 1, 20]
    write_video(tmp_path/f'videos/{key}/chunk-000/file-003.mp4', (bars(k) for k in range(28)), 20)
    t = {'observation.state': [[float(k)] for k in range(28)], 'action': [[float(k)] for k in range(28)], 'timestamp': np.concatenate([np.arange(n)/20 for n in l]).astype(np.float32), 'episode_index': np.repeat([0, 1, 2], l), 'task_index': [0]*28}
    for d in ('data/chunk-000', 'meta/episodes/chunk-000'): (tmp_path/d).mkdir(parents=True)
    pq.write_table(pa.table(t), tmp_path/'data/chunk-000/file-002.parquet', row_group_size=5)
    a = np.cumsum([0, *l])
    pq.write_table(pa.Table.from_pylist([{'episode_index': i, 'length': n, 'data/chunk_index': 0, 'data/file_index': 2, f'videos/{key}/chunk_index': 0, f'videos/{key}/file_index': 3, f'videos/{key}/from_timestamp': a[i]/20} for i,n in enumerate(l)]), tmp_path/'meta/episodes/chunk-000/file-000.parquet')
    pq.write_table(pa.table({'task_index': [0], '__index_level_0__': ['do it']}), tmp_path/'meta/tasks.parquet')
    (tmp_path/'meta/info.json').write_text(json.dumps(dict(codebase_version='v3.0', fps=20, features={key: dict(dtype='video')}, data_path='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet', video_path='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4')))
    src = open_source(tmp_path)
    for i in (2, 0, 1):
        e = src.episode(i)
        assert e.action[:,0].tolist() == [number(e.cameras['top'][t]) for t in range(l[i])] == list(range(a[i], a[i+1])) and (e.instruction, e.fps, e.success, e.subtask) == ('do it', 20, None, None)
    assert [f for f in check(src) if 'dimension' not in f.field] == []


@pytest.mark.parametrize('video', [False, True])
def test_statistics_windows_loader_and_cache(tmp_path, video):
    src = ArraySource([full(i) for i in range(6)])
    convert(src, tmp_path/'a', lerobot(video=video), progress=False)
    got = open_source(tmp_path/'a')
    for x,y in zip(*([*Loader(train_val(s, DataConfig(val_fraction=.2), 4)[0], 8, keep, size=(16, 24), steps=4, threads=2)] for s in (src, got))):
        assert (x.action == y.action).all() and x.instruction == y.instruction and x.subtask == y.subtask and ((x.images == y.images).all() or video)
    assert (build_cache(got, tmp_path/'cache', height=16, width=24, progress=False).episode(3).action == src.episode(3).action).all()


def test_a_conversion_goes_on_where_it_stopped(tmp_path):
    src = ArraySource([full(i) for i in range(5)])
    convert(src, tmp_path/'a', lerobot(video=True), progress=False)
    want = {p.relative_to(tmp_path/'a'): p.read_bytes() for p in (tmp_path/'a').rglob('*') if p.is_file() and p.suffix != '.mp4'}
    for k in (2, 4): (tmp_path/f'a/data/chunk-000/file-00{k}.parquet').unlink()
    assert convert(src, tmp_path/'a', lerobot(video=True), progress=False)['written'] == 2
    assert {p.relative_to(tmp_path/'a'): p.read_bytes() for p in (tmp_path/'a').rglob('*') if p.is_file() and p.suffix != '.mp4'} == want
    with pytest.raises(ValueError, match="to: expected 'lerobot_v21', found 'lerobot'"): convert(src, tmp_path/'a', lerobot('v2.1', video=True), progress=False)    # would leave files of both versions


def test_episodes_that_do_not_fit_together_are_refused(tmp_path):
    for other,said in ((jpegs(1, reward=np.ones(12)), 'next.reward: expected none as in the first episode, found float32'), (jpegs(1, fps=7.), 'fps: expected 10 as in the first episode, found 7'), (wander(1, size=(48, 64)), 'image .* as in the first')):
        with pytest.raises(ValueError, match=f'episode 1: {said}|episode 1: .*{said}'): convert(ArraySource([jpegs(0), other]), tmp_path/said[:4], lerobot(), progress=False)
    with pytest.raises(ValueError, match="version: expected one of .*found 'v1'"): lerobot('v1')
    with pytest.raises(ValueError, match='even height and width'): convert(ArraySource([wander(0, size=(15, 16))]), tmp_path/'odd', lerobot(video=True), progress=False)


# faults

def table(root, i, change):
    p = root/f'data/chunk-000/file-00{i}.parquet'
    t = pq.read_table(p)
    d = {c: t[c].to_pylist() for c in t.column_names}
    change(d)
    pq.write_table(pa.table(d), p)


wrong = {  # what to do to episode 2 -> field, found
    'nan': (lambda r: table(r, 2, lambda d: d['action'][3].__setitem__(1, float('nan'))), 'action', 'nan at step 3, dimension 1'),
    'no state': (lambda r: table(r, 2, lambda d: d.pop('observation.state')), 'observation.state', "['action'"),
    'ragged': (lambda r: table(r, 2, lambda d: d['action'].__setitem__(5, [1.])), 'action', '1 at step 5'),
    'unknown task': (lambda r: table(r, 2, lambda d: d.__setitem__('task_index', [9]*12)), 'task_index', '9'),
    'two tasks': (lambda r: table(r, 2, lambda d: d['task_index'].__setitem__(4, 0)), 'task_index', '2, another from step 4'),
    'short table': (lambda r: table(r, 2, lambda d: [v.pop() for v in d.values()]), 'episode_index', '11'),
    'no table': (lambda r: (r/'data/chunk-000/file-002.parquet').unlink(), 'file', 'o such file'),
    'cut table': (lambda r: (r/'data/chunk-000/file-002.parquet').write_bytes((r/'data/chunk-000/file-002.parquet').read_bytes()[:-40]), 'file', ''),
    'no video': (lambda r: (r/f'videos/{key}/chunk-000/file-002.mp4').unlink(), 'top', 'no file'),
    'cut video': (lambda r: (r/f'videos/{key}/chunk-000/file-002.mp4').write_bytes((r/f'videos/{key}/chunk-000/file-002.mp4').read_bytes()[:-400]), 'top', ''),
    'short video': (lambda r: write_video(r/f'videos/{key}/chunk-000/file-002.mp4', map(bars, range(9)), 20), 'top', 'the nearest of 9'),
    'late times': (lambda r: table(r, 2, lambda d: d.__setitem__('timestamp', [x+.02 for x in d['timestamp']])), 'top', 'the nearest of 12'),
}


@pytest.mark.parametrize('how', wrong)
def test_each_fault_is_named_by_the_command_and_training_refuses(tmp_path, how, capsys):
    from vla_nb.cli import main
    convert(ArraySource([full(2*i) for i in range(4)]), tmp_path/'d', lerobot(video=True), progress=False)
    wrong[how][0](tmp_path/'d')
    name = 'episode 2 (data/chunk-000/file-002.parquet)'
    faults = check(LeRobotSource(tmp_path/'d'))
    assert {f.file for f in faults} == {name} and wrong[how][1] in [f.field for f in faults], report(faults)
    assert wrong[how][2] in next(f for f in faults if f.field == wrong[how][1]).found
    assert main(['doctor', str(tmp_path/'d')]) == 2 and f'{name}  {wrong[how][1]}' in capsys.readouterr().out
    assert main(['train', '--data', str(tmp_path/'d'), '--out', str(tmp_path/'run')]) == 2 and f'{name}: {wrong[how][1]}' in capsys.readouterr().err
    LeRobotSource(tmp_path/'d').episode(1)


def test_a_garbled_video_is_found_by_decoding(tmp_path):
    convert(ArraySource([full(2*i, l=40) for i in range(3)]), tmp_path/'d', lerobot(video=True), progress=False)
    p = tmp_path/f'd/videos/{key}/chunk-000/file-001.mp4'
    b = bytearray(p.read_bytes())
    at = b.index(b'mdat')
    b[at+900:at+1600] = bytes(700)
    p.write_bytes(b)
    assert {(f.file, f.field) for f in check(LeRobotSource(tmp_path/'d'))} == {('episode 1 (data/chunk-000/file-001.parquet)', 'top')}


@pytest.mark.parametrize('how,said', [(lambda m: (m/'info.json').write_text('{'), 'info.json: file: expected JSON'), (lambda m: (m/'info.json').write_text('{"codebase_version": "v4.0"}'), "codebase_version: expected 'v2.0', 'v2.1' or 'v3.0', found 'v4.0'"),
    (lambda m: (m/'info.json').write_text('{"codebase_version": "v3.0", "fps": 3}'), 'features: expected an entry'), (lambda m: (m/'tasks.parquet').unlink(), 'tasks: expected tasks.parquet, found none'),
    (lambda m: (m/'episodes/chunk-000/file-000.parquet').unlink(), 'expected Parquet tables, found no file'), (lambda m: (m/'episodes/chunk-000/file-000.parquet').write_bytes(b'PAR1'), 'expected a complete Parquet file')])
def test_what_is_wrong_in_meta_is_said(tmp_path, how, said):
    convert(ArraySource([full(0)]), tmp_path/'d', lerobot(), progress=False)
    how(tmp_path/'d/meta')
    with pytest.raises(ValueError, match=said): open_source(tmp_path/'d')


def test_no_pyav_is_said(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(ImportError, match=r'pip install "vla_nb\[lerobot\]"'): write_video(tmp_path/'a.mp4', [], 10)


def test_a_fingerprint_changes_with_a_video_and_with_meta(tmp_path):
    convert(ArraySource([full(0), full(1)]), tmp_path/'d', lerobot(video=True), progress=False)
    was = LeRobotSource(tmp_path/'d').fingerprint
    assert LeRobotSource(tmp_path/'d').fingerprint == was
    p = tmp_path/f'd/videos/{key}/chunk-000/file-001.mp4'
    p.write_bytes(p.read_bytes()+b'x')
    assert LeRobotSource(tmp_path/'d').fingerprint != was and read_meta(tmp_path/'d').cameras == {'top': key, 'wrist': 'observation.images.wrist'}
