"Data sets that are not as they should be are refused by file and field; and however many files there are, few stay open"
import json, os

import numpy as np, pyarrow.parquet as pq, pytest

from vla_nb.data.convert import convert, hdf5
from vla_nb.data.dataset import open_source
from vla_nb.data.doctor import check
from vla_nb.data.episode import ArraySource, Episode
from vla_nb.data.lerobot import LeRobotSource, read_meta
from vla_nb.data.lerobot_write import lerobot
from vla_nb.data.oxe import bridge, bridge_oxe, fractal, libero, quantile_bounds, read_statistics
from vla_nb.data.parquet import parquet
from vla_nb.data.rlds import RldsSource
from vla_nb.data.rlds_write import rlds, write_rlds

def wander(i, l=6, dims=4):
    g = np.random.default_rng(i)
    s = np.cumsum(g.normal(0, .1, (l, dims)), 0)
    return Episode({'top': g.integers(0, 256, (l, 8, 8, 3), dtype=np.uint8)}, s, s+.01, 'geh ü 红', success=True, fps=20.)

@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='counts open files where the system lists them')
@pytest.mark.parametrize('form', [rlds(lossless=True), parquet(lossless=True), lerobot('v2.1', lossless=True), hdf5()], ids=['rlds', 'parquet', 'lerobot_v21', 'hdf5'])
def test_few_files_stay_open(tmp_path, form):
    convert(ArraySource([wander(i, 2) for i in range(80)]), tmp_path/'d', form, progress=False)
    source, before = open_source(tmp_path/'d'), len(os.listdir('/proc/self/fd'))
    held = [source.episode(i) for i in range(80)]
    assert np.array_equal(held[0].cameras['top'][1], source.episode(0).cameras['top'][1]) and held[79].instruction == 'geh ü 红'
    assert len(os.listdir('/proc/self/fd')) - before <= 64

@pytest.mark.parametrize('change', [lambda j: [1], lambda j: j.pop('name') and None, lambda j: j['splits'][0].update(shardLengths=['x']), lambda j: j['splits'][0].update(filepathTemplate='{FOO}'),
    lambda j: j['splits'][0].pop('name') and None, lambda j: j.update(splits=None), lambda j: j['splits'][0].update(multiSplitInfos=[1])])
def test_rlds_info(tmp_path, change):
    p = write_rlds(tmp_path/'1.0.0', ArraySource([wander(i) for i in range(2)]))/'dataset_info.json'
    j = json.loads(p.read_text())
    p.write_text(json.dumps(change(j) or j))
    with pytest.raises(ValueError, match='dataset_info.json: (file|splits): expected .*; copy it again'): RldsSource(p.parent)

@pytest.mark.parametrize('standardize', [bridge, bridge_oxe, fractal, libero])
def test_another_standardisation(tmp_path, standardize):
    source = RldsSource(write_rlds(tmp_path/'1.0.0', ArraySource([wander(i) for i in range(2)])), standardize=standardize)
    with pytest.raises(ValueError, match='record 1: steps/action.*: expected at least .* a step, found'): source.episode(1)
    assert [f.field.split('/')[1] for f in check(source)] == ['action']*2

def test_bridge_of_one_step(tmp_path):
    source = RldsSource(write_rlds(tmp_path/'1.0.0', ArraySource([wander(i, 1, 7) for i in range(2)])), standardize=bridge)
    with pytest.raises(ValueError, match='steps: expected at least 3'): source.episode(0)

@pytest.mark.parametrize('text, message', [('[1]', 'expected statistics by data set'), ('{"a": {"action": {"min": [0]}}}', 'q01: expected a list')])
def test_statistics(tmp_path, text, message):
    (tmp_path/'s.json').write_text(text)
    with pytest.raises(ValueError, match=message): quantile_bounds(read_statistics(tmp_path/'s.json')['action'])

def lerobots(path, version): return convert(ArraySource([wander(i) for i in range(2)]), path, lerobot(version, lossless=True), progress=False) and path

@pytest.mark.parametrize('change, message', [(lambda j: [1], 'codebase_version'), (lambda j: j.update(features=[1]), 'features: expected'), (lambda j: j.update(fps='x'), 'fps: expected'),
    (lambda j: j.update(data_path='a/{x}'), 'data_path: expected')])
def test_lerobot_info(tmp_path, change, message):
    p = lerobots(tmp_path/'d', 'v3.0')/'meta'/'info.json'
    j = json.loads(p.read_text())
    p.write_text(json.dumps(change(j) or j))
    with pytest.raises(ValueError, match=message): LeRobotSource(tmp_path/'d').episode(1)

@pytest.mark.parametrize('name, text, message', [('episodes.jsonl', '{"episode_index": 0}\n', 'entry 0: length: expected'), ('episodes.jsonl', '1\n', 'entry 0: episode_index: expected'), ('tasks.jsonl', '{"a": 1}\n', 'tasks.jsonl: entry 0: task_index: expected')])
def test_lerobot_lines(tmp_path, name, text, message):
    (lerobots(tmp_path/'d', 'v2.1')/'meta'/name).write_text(text)
    with pytest.raises(ValueError, match=message): open_source(tmp_path/'d')

def test_lerobot_tables(tmp_path):
    root = lerobots(tmp_path/'d', 'v3.0')
    with pytest.raises(ValueError, match='meta/info.json: expected a LeRobotDataset, found none'): read_meta(tmp_path)
    for path, column, message in ((root/'meta/episodes/chunk-000/file-000.parquet', 'data/file_index', 'data_path: expected numbers that fill'), (root/'data/chunk-000/file-001.parquet', 'episode_index', 'episode_index: expected a column')):
        whole = pq.read_table(path)
        pq.write_table(whole.drop([column]), path)
        with pytest.raises(ValueError, match=message): LeRobotSource(root).episode(1)
        pq.write_table(whole, path)
    assert open_source(root).episode(1).instruction == 'geh ü 红'
