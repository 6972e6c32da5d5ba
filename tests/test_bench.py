"The bench's mechanics: what is measured is the same frames, goals are judged rightly, the record is complete. No timing is asserted."
import json, re

import numpy as np, pytest, torch

from vla_nb import bench
from vla_nb.bench import Way, bench_data, data_table, goals, measure, panning


@pytest.fixture(scope='module')
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp('bench')/'results'/'bench_data.json'
    threads = torch.get_num_threads()
    rows = bench_data(out, quick=True)
    assert torch.get_num_threads() == threads, 'the number of threads was not put back'
    return rows, json.loads(out.read_text())


def test_rows(record):
    rows, _ = record
    names = [r['name'] for r in rows]
    assert len(set(names)) == len(names) and {'JPEG folder + PIL, openpi pad', 'ACT: raw HDF5 (re-expressed)'} < set(names)
    for n in ('camera JPEG at 1/2', 'JPEG cache', 'uint8 cache'):
        assert f'{n}, asked' in names and f'{n}, loader' in names
    for r in rows: assert r['frames_per_cpu_s'] > 0 and r['frames_per_wall_s'] > 0 and r['ratio'] > 0
    assert any(r['ratio'] == 1 for r in rows if not r['ours'])


def test_all_show_the_same_frames(record):
    for r in record[0]:
        if r['gives'].startswith('uint8') and r['psnr_db'] is not None: assert r['psnr_db'] > 30, r


def test_record(record):
    rows, saved = record
    assert saved['rows'] == rows and saved['quick'] and saved['seed'] == 0
    assert saved['hardware']['cores'] >= 1 and saved['frames']['cameras'] == 3 and 'commit' in saved
    assert '/' not in json.dumps({k: saved[k] for k in ('hardware', 'frames')}), 'no paths in the record'
    assert not re.search(r'/(tmp|root|home|work)\b', json.dumps(saved))
    assert len(data_table(rows).splitlines()) == len(rows)+1


def made(**rate):
    rows = []
    for n, (asked, loader, db) in rate.items():
        n = {'cam': 'camera JPEG at 1/2', 'jpg': 'JPEG cache', 'u8': 'uint8 cache'}[n]
        rows += [dict(name=f'{n}, {h}', frames_per_cpu_s=v, ratio=v, psnr_db=db) for h, v in (('asked', asked), ('loader', loader))]
    return rows


def test_goals_are_judged():
    good = goals(made(cam=(2.6, 2.5, 46.), jpg=(14.5, 14., 41.2), u8=(151., 150., 72.)))
    assert len(good) == 8 and all(g['met'] for g in good)
    bad = {(g['name'], g['what']): g for g in goals(made(cam=(2.4, 2.4, 44.), jpg=(13., 11., 40.), u8=(149., 100., 72.)))}
    assert not bad['camera JPEG at 1/2', 'times the best peer']['met'] and not bad['camera JPEG at 1/2', 'dB against PIL']['met']
    assert bad['camera JPEG at 1/2', 'share lost on the way']['met'] and not bad['JPEG cache', 'share lost on the way']['met']
    assert sum(not g['met'] for g in bad.values()) == 7


def test_the_loss_is_judged_within_rounds():
    "A slow round slows both; the loss is not to see it"
    rows = made(cam=(3, 3, 50), jpg=(20, 20, 50), u8=(200, 200, 50))
    rates = np.array([[100, 95]*3, [50, 47.5]*3, [100, 95]*3])
    assert all(g['found'] == .05 for g in goals(rows, rates) if g['what'].startswith('share'))


def test_measure_counts_frames():
    calls = []
    cpu, wall = measure(Way('w', '', calls.append), 48, seconds=0)
    assert calls == [0, 1, 2] and cpu > 0 and wall > 0


def test_frames_are_repeatable_and_pan():
    a, b = (panning(1, 3, cameras=1, height=48, width=64, seed=4)[0] for _ in range(2))
    assert a.cameras['cam0'].data == b.cameras['cam0'].data and (a.state == b.state).all()
    x = [a.cameras['cam0'][t].astype(float) for t in range(2)]
    assert np.abs(x[0][:, 4:]-x[1][:, :-4]).mean() < np.abs(x[0]-x[1]).mean()


def test_peers_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(bench, 'installed', lambda n: False)
    assert any('datasets not installed' in n for n, *_ in bench.peers())
    monkeypatch.setattr(bench, 'installed', lambda n: True)
    assert any('LeRobot' in n for n, *_ in bench.peers())


def test_a_peer_that_fails_is_named_in_the_record(monkeypatch, tmp_path):
    def missing(*a): raise RuntimeError('no video decoder')
    monkeypatch.setattr(bench, 'lerobot_video', missing)
    monkeypatch.setattr(bench, 'peers', lambda: iter([('LeRobotDataset, video', 'float32 480x640', missing), ('JPEG folder + PIL', 'uint8 224', bench.jpeg_folder)]))
    ways, failed = bench.open_ways(tmp_path, panning(1, 4, height=48, width=64), 2, (24, 24), 0)
    assert failed == [dict(name='LeRobotDataset, video', why='RuntimeError')] and ways[0].name == 'JPEG folder + PIL'
    monkeypatch.setattr(bench, 'peers', lambda: iter([('mine', 'uint8 224', lambda *a: 1/0)]))
    (tmp_path/'b').mkdir()
    with pytest.raises(ZeroDivisionError): bench.open_ways(tmp_path/'b', panning(1, 4, height=48, width=64), 2, (24, 24), 0)


@pytest.fixture(scope='module')
def step(tmp_path_factory):
    from vla_nb.bench_step import bench_step
    out, threads = tmp_path_factory.mktemp('bench')/'results'/'bench_step.json', torch.get_num_threads()
    r = bench_step(out, quick=True)
    assert torch.get_num_threads() == threads, 'the number of threads was not put back'
    return r, json.loads(out.read_text())


def test_the_steps_compared_are_the_same_step(step):
    a = step[0]['agreement']
    assert a['loss'] < 1e-5 and a['gradient'] < 1e-5 and a['worst'] < 1e-4 and a['tensors'] > 50


def test_step_record(step):
    from vla_nb.bench_step import step_table
    r, saved = step
    assert saved == r and saved['quick'] and saved['seed'] == 0 and 'commit' in saved and saved['hardware']['cores'] >= 1
    assert [x['name'] for x in r['rows']] == ['original, as shipped', 'original, without gc', 'ours', 'ours, with gradient checkpointing']
    assert r['rows'][0]['speedup'] == 1 and all(x['cpu_ms'] > x['loading_ms'] > 0 for x in r['rows'])
    kept = {x['name']: x['kept_mb'] for x in r['rows']}
    assert kept['ours, with gradient checkpointing'] < kept['ours'] <= kept['original, without gc'] == kept['original, as shipped']
    assert len(r['pieces']) == 3 and not re.search(r'/(tmp|root|home|work)\b', json.dumps(saved))
    assert step_table(r).count('\n') == 4 + 1 + 3 + 2


def test_ways_that_differ_are_not_timed(step, monkeypatch):
    "A step that computes something else is refused, however fast"
    from vla_nb import bench_step as b
    right = b.ce_everywhere
    monkeypatch.setattr(b, 'ce_everywhere', lambda *a: 1.01*right(*a))
    with pytest.raises(AssertionError, match='do not compute the same'): b.bench_step(None, quick=True)


def test_kept_bytes_are_counted_once():
    from vla_nb.bench_step import Way, kept_bytes
    w, x = torch.nn.Linear(4, 4, bias=False), torch.ones(8, 4)
    def loss(m, b):
        h = m(b).exp()    # keeps the input, and its own answer
        return h*h        # keeps the same memory twice
    assert kept_bytes(Way('w', w, lambda k: x, loss, torch.optim.SGD(w.parameters()))) == 2*8*4*4
