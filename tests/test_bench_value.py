"The value head's step beside Hume's design: operations counted at the released size, the forms compute the same, nothing timed."
import json
from dataclasses import replace

import pytest, torch

from vla_nb import bench_value as B


@pytest.fixture(scope='module')
def counts(): return {r['name']: r for r in B.value_flop_rows(B.ValueSize(), 48, 16)}


def test_humes_design_by_hand(counts):
    "Eyes of .22 T an image for six images, four layers of 34.6 million weights at 969 tokens, thrice for two observations"
    trunk = 4*(2*34.6e6*969 + 4*969**2*2048)
    assert counts["Hume's design"]['tflop'] == pytest.approx((6*.22e12 + 6*trunk)/1e12, rel=.01)


def test_a_fifth_with_a_cache_and_shared_windows(counts):
    assert counts['ours, cached, not padded, chains of 16']['of_hume'] <= .2
    shares = [r['of_hume'] for r in counts.values() if r['name'].startswith('ours')]
    assert shares == sorted(shares, reverse=True) and shares[0] < .75 and shares[1] < .3


def test_long_chains_read_each_observation_once():
    s = replace(B.ValueSize(), words=48, used=48)
    one, many = B.value_flops(B.ValueQuery, s, 1, True), B.value_flops(B.ChainedQuery, s, 64, True)
    assert .75 <= many/one < .76    # forward and backward are three of four passes


@pytest.mark.parametrize('query', [B.ValueQuery, B.ChainedQuery])
def test_every_form_computes_the_same(query):
    def made(q):
        torch.manual_seed(0)
        return B.ValueModel(B.small(), q)
    c = B.value_batch(B.small(), 3)
    a, b = (B.gradients(made(q), lambda m: B.value_loss(m, c)) for q in (B.JoinedQuery, query))
    assert max(B.apart(a, b).values()) < 1e-5
    assert a[1].keys() == {k for k,_ in made(query).named_parameters() if k.startswith(('head.trunk', 'head.actor', 'head.critics', 'head.temperature'))}


def test_the_record(tmp_path):
    out, threads = tmp_path/'bench_value.json', torch.get_num_threads()
    r = B.bench_value(out, quick=True)
    assert torch.get_num_threads() == threads and json.loads(out.read_text()) == json.loads(json.dumps(r)) and r['quick'] and 'commit' in r
    assert all({x['name'] for x in rows[1:]} == r['agreement'][k].keys() for k,rows in r['rows'].items()) and len(r['goals']) == 5
    assert len(B.value_table(r).splitlines()) == 2*7 + 1 + 6 + 1 + 5


def test_what_differs_is_not_timed(monkeypatch):
    right = B.ValueQuery.pair
    monkeypatch.setattr(B.ValueQuery, 'pair', lambda self, now, after, target=None: (1.01*right(self, now, after, target)[0], right(self, now, after, target)[1]))
    with pytest.raises(AssertionError, match='does not compute the same'): B.bench_value(None, quick=True)
