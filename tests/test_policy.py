"""The tokenizer, the tiny backbone and the DexVLA-shaped policy: what readers need not see.

Fast: random images of 64 px, four samples.
"""
from dataclasses import replace

import pytest, torch

from vla_nb.backbones.tiny import TinyBackbone
from vla_nb.core import Batch, Observation, Samples
from vla_nb.policies.dexvla import DexVLA, DexVLAConfig, move, shift_noise, tiny
from vla_nb.objectives.diffusion import squared_cosine
from vla_nb.text.tokenize import encode, hide_words, train_tokenizer, unknown_words

torch.set_num_threads(1)


def one(x): return dict(mean=x.mean(0).tolist(), std=x.std(0).tolist(), min=x.amin(0).tolist(), max=x.amax(0).tolist())


@pytest.fixture(scope='module')
def data():
    g = torch.Generator().manual_seed(0)
    return Samples(torch.randint(0, 256, (4, 1, 3, 64, 64), dtype=torch.uint8, generator=g), torch.randn(4, 3, generator=g), ['press red', 'press blue', 'go', 'press the red one'],
                   torch.randn(4, 6, 2, generator=g), torch.arange(6)[None] >= torch.tensor([6, 6, 4, 1])[:, None], torch.arange(4))


@pytest.fixture(scope='module')
def stats(data): return dict(state=one(data.state), action=one(data.action.flatten(0, 1)))


def make(data, stats, **kw): return DexVLA.from_data(DexVLAConfig(**kw), data.instruction, stats)


def awake(policy):
    "The same policy with a head that does not answer zero"
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.policy_head.parameters(): p.add_(.05*torch.randn(p.shape, generator=g))
    return policy.eval()


# --- tokenizer

def test_tokenizer_of_no_words():
    with pytest.raises(ValueError, match='texts: expected at least one word'): train_tokenizer(['', ' '])


def test_tokenizer_truncates_and_is_case_blind():
    tok = train_tokenizer(['Open THE drawer'], max_length=2)
    ids, mask = encode(tok, ['open the drawer', 'Open'])
    assert ids.shape == (2, 2) and mask.tolist() == [[True, True], [True, False]]
    assert unknown_words(tok, ['OPEN the tap']) == ['tap']


def test_hide_words_never_touches_padding():
    tok = train_tokenizer(['a b c'])
    ids, mask = encode(tok, ['a b c', 'a'])
    hid = hide_words(ids, mask, torch.zeros(2, 3), p=1.)
    assert hid.tolist() == [[1, 1, 1], [1, 0, 0]]


# --- backbone

@pytest.mark.parametrize('cameras,size,depth', [(1, 64, 0), (2, 64, 1), (1, 96, 2)])
def test_backbone_shapes(cameras, size, depth):
    m = TinyBackbone(9, cameras=cameras, depth=depth, learned=3, spoken=5)
    h, image, text = m(torch.zeros(2, cameras, 3, size, size), torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool))
    assert h.shape == (2, 8*cameras+4, 96) and image.sum() == 2*8*cameras and text.sum() == 8


def test_backbone_hears_the_words():
    torch.manual_seed(0)
    m = TinyBackbone(9)
    images, ones = torch.rand(1, 1, 3, 64, 64)*2-1, torch.ones(1, 1, dtype=torch.bool)
    a, b = (m(images, torch.tensor([[i]]), ones)[0][:, :32] for i in (2, 3))
    assert (a-b).abs().max() > .1


# --- policy

def test_initial_weights_depend_on_the_seed_alone(data, stats):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a = make(data, stats)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    b = make(data, stats)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    c = DexVLA.from_data(tiny(), data.instruction, stats, seed=1)
    assert not torch.equal(a.backbone.project, c.backbone.project)


def test_needs_a_tokenizer(stats):
    with pytest.raises(ValueError, match='tokenizer'): DexVLA(DexVLAConfig(), stats)


@pytest.mark.parametrize('prediction', ['epsilon', 'sample'])
def test_loss_and_act(data, stats, prediction):
    p = awake(make(data, stats, prediction=prediction))
    l = p.loss(p.prepare(data))
    assert l.count == 6+6+4+1 and set(l.parts) == {'action', 'guide'} and l.total.isfinite()
    a = p.act(data, seed=data.seed).action
    lo, hi = (torch.tensor(stats['action'][k]) for k in ('min', 'max'))
    assert a.shape == (4, 6, 2) and (a >= lo-1e-4).all() and (a <= hi+1e-4).all()


def test_padding_does_not_count(data, stats):
    p = awake(make(data, stats))
    other = replace(data, action=torch.where(data.action_is_pad[..., None], 9., data.action))
    assert torch.equal(p.loss(p.prepare(data)).total, p.loss(p.prepare(other)).total)


def test_training_draws_belong_to_the_sample(data, stats):
    p = awake(make(data, stats)).train()
    x, batch = p._augment(p.prepare(data)), p.prepare(data)
    torch.manual_seed(9)
    assert all(torch.equal(a, b) for a, b in zip(x, p._augment(batch)))
    whole = p.loss(batch)
    rows = [p.loss(Batch({k: v[i:i+1] for k, v in batch.items()})) for i in range(4)]
    torch.testing.assert_close(sum(r.total*r.count for r in rows)/whole.count, whole.total, atol=1e-5, rtol=1e-5)
    other = p._augment({**batch, 'seed': batch['seed']+100})
    assert not torch.equal(x[0], other[0]) and not torch.equal(x[1], x[1]+1)


def test_generator_and_seed(data, stats):
    p = awake(make(data, stats))
    a, b = (p.act(data, generator=torch.Generator().manual_seed(3)).action for _ in range(2))
    assert torch.equal(a, b)
    row = Observation(data.images[2:3], data.state[2:3], data.instruction[2:3])
    torch.testing.assert_close(p.act(row, seed=data.seed[2:3]).action[0], p.act(data, seed=data.seed).action[2], atol=1e-4, rtol=0)


def test_every_parameter_in_one_group(data, stats):
    p = make(data, stats)
    names = [k for g in p.groups() for k in g.params]
    assert sorted(names) == sorted(k for k, _ in p.named_parameters()) and {g.name: g.lr for g in p.groups()} == {'head': 1., 'backbone': .1}


def test_no_guide(data, stats):
    p = make(data, stats, guide=0.)
    assert set(p.loss(p.prepare(data)).parts) == {'action'} and not [k for k, _ in p.named_parameters() if k.startswith('guide')]


def test_save_and_load(tmp_path, data, stats):
    p = awake(make(data, stats, dilations=(1, 2)))
    q = DexVLA.from_pretrained(p.save_pretrained(tmp_path/'p'))
    assert q.config == p.config
    assert torch.equal(q.act(data, seed=data.seed).action, p.act(data, seed=data.seed).action)
    assert q.act(data.say('sing a song'), seed=data.seed).action.isfinite().all()
    assert q.act(data.say(''), seed=data.seed).action.isfinite().all()


def test_move_is_the_same_for_all_cameras():
    x = torch.randint(0, 256, (2, 1, 3, 8, 8), dtype=torch.uint8).expand(-1, 2, -1, -1, -1)
    y = move(x, torch.tensor([[.1, .9], [.5, .5]]), 2)
    assert torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[1], x[1]) and y.dtype == torch.uint8
    assert torch.equal(y[0, 0, :, 2:, :-2], x[0, 0, :, :-2, 2:])


def test_shift_noise_scales_the_ratio():
    s = squared_cosine()
    a, b = s.alpha_bar, shift_noise(s, .5).alpha_bar
    torch.testing.assert_close((b/(1-b))/(a/(1-a)), torch.full_like(a, .25), atol=1e-3, rtol=1e-3)
