"The bench of π's structure: what is compared computes the same, the record is complete, goals are judged rightly. No timing is asserted."
import json, re
from dataclasses import replace

import pytest, torch

from vla_nb import bench_pi as B


@pytest.fixture(scope='module')
def record(tmp_path_factory):
    out, threads = tmp_path_factory.mktemp('bench')/'results'/'bench_pi.json', torch.get_num_threads()
    r = B.bench_pi(out, quick=True)
    assert torch.get_num_threads() == threads, 'the number of threads was not put back'
    return r, json.loads(out.read_text())


def test_everything_is_compared_before_it_is_timed(record):
    r, saved = record
    assert saved == json.loads(json.dumps(r)) and saved['quick'] and 'commit' in saved and not re.search(r'/(tmp|root|home|work)\b', json.dumps(saved))
    timed = {f"{k}: {x['name']}" for k,rows in r['tasks'].items() for x in rows[:-1]}
    assert timed - r['agreement'].keys() == {'8 noises: ours, 1'}
    for k,v in r['agreement'].items(): assert max(v.values()) < (1e-3 if 'transformers' in k else 1e-5), k
    assert r['words']['agreement'] < 1e-5


def test_rows(record):
    r = record[0]
    assert set(r['tasks']) == {'full', 'expert only', 'short prompt, full', 'short prompt, sampling', 'words and flow', '8 noises', 'sampling', 'π0, full', 'π0, expert only', 'π0, sampling'}
    for k,rows in r['tasks'].items(): assert rows[0]['speedup'] == 1 and rows[-1]['name'].startswith('ours') and all(x['cpu_ms'] > 0 for x in rows), k
    kept = {x['name']: x['kept_mb'] for x in r['tasks']['full']}
    assert kept['joint, eager, checkpointed twice'] < kept['ours'] < kept['joint, fused'] < kept['joint, eager']
    assert {g['name'] for g in r['goals']} >= {'full, times as fast', 'words, of the memory', 'full, of the operations of the model'} and len(r['goals']) == 16
    assert len(B.pi_table(r).splitlines()) == 1 + sum(map(len, r['tasks'].values())) + 2 + 2 + len(r['flops']) + 2 + len(r['probe']) + 1 + 16


def test_what_differs_is_not_timed(monkeypatch):
    right = B.split_loss
    def wrong(*a, **k):
        l = right(*a, **k)
        return replace(l, total=1.01*l.total)
    monkeypatch.setattr(B, 'split_loss', wrong)
    with pytest.raises(AssertionError, match='does not compute the same'): B.bench_pi(None, quick=True)


def test_peak_counts_what_is_alive():
    with B.Peak(but=-1) as p:
        x = torch.ones(1000)
        for _ in range(5): y = x + 1
        del x, y
        torch.ones(500)
    assert p.most in (8000, 12000)    # the old sum may be alive while the next is made
    with B.Peak(but=4000) as p: torch.ones(1000) + torch.ones(10)[0]
    assert p.most <= 44


def test_the_frozen_language_model_gets_no_gradient(record):
    pi, c = B.awake(B.toy(), 0), B.sample_batch(B.toy(), 2, words=24, horizon=6)
    _, g = B.gradients(pi, lambda m: B.split_loss(m, c, frozen=True))
    assert g and all(k.startswith('expert.') for k in g)
    free = B.gradients(pi, lambda m: B.split_loss(m, c))[1]
    assert all(torch.equal(free[k], v) for k,v in g.items())
