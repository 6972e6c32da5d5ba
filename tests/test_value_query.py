"The value query: what a recorded head gathered, where the query stands, and what may move it"
from pathlib import Path

import pytest, torch
from vla_nb.heads.value_query import Tokens, ValueQuery, query_hume, query_last

recorded = Path(__file__).parent/'fixtures'/'value_head.pt'

def small(**kw):
    torch.manual_seed(0)
    return ValueQuery(16, 2, 24, 2, 1, 8, **kw)

def some(b=4, s=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, s, 16, generator=g), torch.arange(s)[None] < torch.randint(3, s+1, (b, 1), generator=g)

def test_recorded_vectors():
    "Weights and tokens of the original; its query was inserted among them, with a camera missing in one row"
    r = torch.load(recorded, weights_only=True)['head_fp32']
    prefix = 'vqh_backbone.gemma_expert.model.'
    weights = {'gemma.'+k.removeprefix(prefix): v for k,v in r['state_dict'].items() if k.startswith(prefix) and 'embed' not in k}
    head = ValueQuery(16, 2, 32, 4, 1, 8, hume=True)
    head.load_state_dict(weights | {'query': r['state_dict']['query_embedding']})
    rows, at = torch.arange(6), r['query_index']
    others = torch.ones(r['embs'].shape[:2]).bool()
    others[rows,at] = False
    tokens = Tokens(r['embs'][others].reshape(6, -1, 16), r['pad_masks'][others].reshape(6, -1))
    assert not tokens.valid.int().diff(dim=1).le(0).all(), 'a row with a gap is what this test is about'
    assert torch.equal(query_hume(tokens.valid)[:,-1], r['position_ids'][rows,at])
    assert (head(tokens) - r['encoded']).abs().max() < 1e-5

def test_places_agree_without_a_gap():
    _,valid = some(40)
    a, b = query_last(valid), query_hume(valid)
    there = torch.cat([valid, torch.ones(40, 1).bool()], 1)
    assert torch.equal(a[there], b[there])

def test_an_absent_camera_takes_no_place():
    "Ours: the same vector with the camera left out as with it masked"
    head, (x,_) = small(), some()
    valid = torch.ones(4, 9).bool()
    valid[:,2:5] = False
    assert torch.allclose(head(Tokens(x, valid)), head(Tokens(x[:,[0, 1, 5, 6, 7, 8]], torch.ones(4, 6).bool())), atol=1e-5)

@pytest.mark.parametrize('kw', [{}, {'hume': True}, {'state_dim': 3}])
def test_gradients(kw):
    "Every weight learns; a pair gives the next observation none, not even through the tokens"
    head, (x,valid) = small(**kw), some()
    state = torch.randn(4, 3) if 'state_dim' in kw else None
    later = Tokens(x.clone().requires_grad_(), valid, state)
    a,b = head.pair(Tokens(x, valid, state), later)
    a.square().sum().backward()
    assert later.x.grad is None and not b.requires_grad
    assert [k for k,p in head.named_parameters() if p.grad is None or not p.grad.any()] == []

def test_target_reads_what_follows():
    head, slow, (x,valid) = small(), small(), some()
    with torch.no_grad(): slow.query += 1
    now = Tokens(x, valid)
    assert torch.equal(head.pair(now, now, slow)[1], slow(now)) and not torch.equal(slow(now), head(now))

def test_half_precision_tokens_and_autocast():
    head, (x,valid) = small(), some()
    want = head(Tokens(x, valid))
    assert (head(Tokens(x.bfloat16(), valid)) - want).abs().max() < .1
    with torch.autocast('cpu', torch.bfloat16): got = head(Tokens(x, valid))
    assert got.dtype == torch.float32 and (got-want).abs().max() < .1

def test_chains_of_any_length():
    head, (x,_) = small(), some(6)
    valid = torch.ones(6, 9).bool()
    for links in (2, 3, 6):
        now,after = head.chain(Tokens(x, valid), links)
        every = head(Tokens(x, valid)).reshape(6//links, links, 16)
        assert torch.allclose(now, every[:,:-1], atol=1e-5) and torch.allclose(after, every[:,1:], atol=1e-5)
