"""PaliGemma-VLA, its flow MLP and Heun's sampler: what readers need not see.

Fast: frames of 32 px, a language model of width 32, five samples of unequal length.
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest, torch
from torch import nn

from vla_nb.core import Batch, Observation, Samples, draw_normal
from vla_nb.heads.flow_mlp import AttentionPool, FlowMLP
from vla_nb.layers.gemma import block_mask, positions_of
from vla_nb.objectives.flow_matching import beta_time, euler_sample, flow_loss, heun_path, heun_sample, shifted_time, uniform_noise
from vla_nb.policies.paligemma_config import PaliGemmaVLAConfig, paligemma_3b, tiny
from vla_nb.policies.paligemma_vla import PaliGemmaVLA
from vla_nb.policies.paligemma_weights import paligemma_weights
from vla_nb.text.pi_prompt import small_gemma_tokenizer
from vla_nb.train.config import TrainConfig, load_config, read_settings

torch.set_num_threads(1)
root = Path(__file__).resolve().parent.parent
small = dict(image=32, patch=16, vision_width=32, vision_depth=1, vision_heads=2, vision_mlp=32, width=32, depth=1, heads=2, kv_heads=1, head_dim=16, mlp=32,
             head_width=32, head_depth=2, cameras=2)


def one(x): return {**{k: f.tolist() for k, f in dict(mean=x.mean(0), std=x.std(0), min=x.amin(0), max=x.amax(0)).items()},
                    'q01': x.quantile(.01, 0).tolist(), 'q99': x.quantile(.99, 0).tolist()}


@pytest.fixture(scope='module')
def data():
    g = torch.Generator().manual_seed(0)
    return Samples(torch.randint(0, 256, (5, 2, 3, 32, 32), dtype=torch.uint8, generator=g), torch.randn(5, 3, generator=g), ['press red', 'press blue', '', 'press the red one', 'go'],
                   torch.randn(5, 6, 2, generator=g), torch.arange(6)[None] >= torch.tensor([6, 6, 4, 1, 6])[:, None], torch.arange(5),
                   subtask=['red is on the left', 'blue is on the right', '', 'red is on the left, press', 'go'])


@pytest.fixture(scope='module')
def stats(data): return dict(state=one(data.state), action=one(data.action.flatten(0, 1)))


def make(data, stats, seed=0, **kw): return PaliGemmaVLA.from_data(PaliGemmaVLAConfig(**{**small, **kw}), [*data.instruction, *data.subtask], stats, seed)


def awake(policy):
    "The same policy with a head that does not start at zero"
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.action_head.parameters(): p.add_(.1*torch.randn(p.shape, generator=g))
    return policy.eval()


def row(data, i): return Observation(data.images[i:i+1], data.state[i:i+1], data.instruction[i:i+1])


# --- samplers

def curved(x, tau, s=.5): return x*((tau - (1-tau)*s**2)/(tau**2 + (1-tau)**2*s**2))[:, None, None]


def test_heun_is_of_second_order_and_euler_of_first():
    noise = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    def miss(f, n): return (f(curved, noise, n) - .5*noise).abs().max().item()
    assert 1.6 < miss(euler_sample, 20)/miss(euler_sample, 40) < 2.4
    assert 3. < miss(heun_sample, 20)/miss(heun_sample, 40) < 5.
    assert torch.equal(heun_sample(curved, noise, 1), euler_sample(curved, noise, 1))


def test_heun_asks_where_it_says():
    asked = []
    def model(x, tau):
        asked.append(round(tau[0].item(), 4))
        return torch.zeros_like(x)
    path = list(heun_path(model, torch.ones(2, 1, 1), 3, lambda n: torch.tensor([1., .7, .3])))
    assert asked == [1., .7, .7, .3, .3] and len(path) == 3
    assert min(asked) > 0    # a field may be singular at the data


def test_the_noise_of_the_loss_is_a_setting():
    a, seen = torch.zeros(6, 4, 3), []
    def model(x, tau):
        seen.append(x/tau[:, None, None])
        return torch.zeros_like(x)
    mask, seed = torch.ones(6, 4).bool(), torch.arange(6)
    flow_loss(model, a, mask, seed, 2, noise=uniform_noise)
    assert seen[0].abs().max() <= 1 + 1e-5
    flow_loss(model, a, mask, seed, 2)
    torch.testing.assert_close(seen[1].unflatten(0, (6, 2)), draw_normal(seed, 2, 4, 3), rtol=1e-3, atol=1e-3)


# --- the head

def test_pooling_reads_valid_tokens_alone():
    torch.manual_seed(0)
    pool, h, valid = AttentionPool(16, 8, 3, 4), torch.randn(3, 6, 16), torch.arange(6) < torch.tensor([[6], [1], [4]])
    for p in pool.parameters(): nn.init.normal_(p)
    out = pool(h, valid)
    torch.testing.assert_close(out, pool(h.masked_fill(~valid[..., None], 1e3), valid))
    torch.testing.assert_close(out[1:2], pool(h[1:2, :1], valid[1:2, :1]))
    g, = torch.autograd.grad(pool(h.requires_grad_(), valid).sum(), h)
    assert not g[~valid].any() and g[valid].any(-1).all()
    with pytest.raises(ValueError, match='dim: expected a multiple of heads=4, found 18'): AttentionPool(18, 8, 3, 4)


def test_head_repeats_conditions_row_by_row():
    torch.manual_seed(0)
    head = FlowMLP(2, 3, 8, 4, 16, 2, 2, 2)
    for p in head.parameters(): nn.init.normal_(p, std=.3)
    c, x, t = torch.randn(3, 16), torch.randn(6, 4, 2), torch.rand(6)
    torch.testing.assert_close(head(x, t, c), torch.cat([head(x[i:i+1], t[i:i+1], c[i//2:i//2+1]) for i in range(6)]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(head(x, t, c), head(x, 1-t, c))
    with pytest.raises(ValueError, match='expected a multiple of 3 rows'): head(x[:4], t[:4], c)


# --- words

def test_ids_and_mask_come_together(data, stats):
    p = make(data, stats)
    b = p.prepare(data)
    for i in range(5):
        ids = b['input_ids'][i][b['mask'][i]]
        assert ids[0] == p.tokenizer.bos_token_id and p.tokenizer.decode(ids, skip_special_tokens=True) == data.instruction[i] + '\n'
    assert (b['input_ids'][~b['mask']] == p.tokenizer.pad_token_id).all() and not b['mask'].all()
    assert b['images'].dtype == torch.uint8 and p.config.vocab == len(p.tokenizer)
    with pytest.raises(ValueError, match='expected at most 6 tokens'): make(data, stats, max_words=6).prepare(data.say('press the red one and then the blue one'))


# --- loss

@pytest.mark.parametrize('kw', [{}, dict(direction='noise_at_1'), dict(noise='uniform'), dict(sampler='heun', sample_steps=3), dict(guide=0.), dict(name_words=0.), dict(guide=0., name_words=0.)])
def test_loss_and_act(data, stats, kw):
    p = awake(make(data, stats, **kw))
    l = p.loss(p.prepare(data))
    assert l.count == 6+6+4+1+6 and set(l.parts) == {'flow', 'guide', 'naming'} - ({'guide'} if 'guide' in kw else set()) - ({'naming'} if 'name_words' in kw else set()) and l.total.isfinite()
    torch.testing.assert_close(l.total.detach(), sum(l.parts.values()))
    a = p.act(data, seed=data.seed)
    assert a.action.shape == (5, 6, 2) and a.action.isfinite().all() and a.text is None


def test_every_weight_learns_by_the_second_step(data, stats):
    p = awake(make(data, stats)).train()
    p.loss(p.prepare(data)).total.backward()
    assert [k for k, q in p.named_parameters() if q.grad is None or not q.grad.any()] == []


def test_padding_does_not_count(data, stats):
    p = awake(make(data, stats))
    other = replace(data, action=torch.where(data.action_is_pad[..., None], 9., data.action))
    assert torch.equal(p.loss(p.prepare(data)).total, p.loss(p.prepare(other)).total)
    b = p.prepare(data)
    wild = Batch({**b, 'input_ids': b['input_ids'].masked_fill(~b['mask'], 5)})
    torch.testing.assert_close(p.loss(b).total, p.loss(wild).total, rtol=1e-5, atol=1e-6)


def test_padded_actions_get_no_gradient(data, stats):
    p = awake(make(data, stats, guide=0., name_words=0.))
    b = p.prepare(data)
    a = b['action'].requires_grad_()
    p.loss(Batch({**b, 'action': a})).total.backward()
    moved = a.grad.any(-1)
    assert moved[b['valid']].all()
    # a padded action stands in the noisy chunk of its row; it is set to zero in `prepare`, so whatever was recorded there cannot matter
    assert not b['action'].detach()[~b['valid']].any()


def test_validation_is_the_same_each_time_and_training_is_not(data, stats):
    p = awake(make(data, stats))
    b = p.prepare(data)
    assert torch.equal(p.loss(b).total, p.loss(b).total)
    assert not torch.equal(p.loss(b).total, p.train().loss(b).total)    # augmented


def test_both_clocks_are_one_flow(data, stats):
    "A head of either clock gives the same loss, once the other is put behind the door"
    a, b = (awake(make(data, stats, direction=d)) for d in ('noise_at_0', 'noise_at_1'))
    assert [k for k in b.state_dict()] == [k for k in a.state_dict()]
    b.config = replace(b.config, direction='noise_at_0')    # the same weights on the other clock
    batch = a.prepare(data)
    assert torch.equal(a.loss(batch).total, b.loss(batch).total)
    assert torch.equal(a.act(data, seed=data.seed).action, b.act(data, seed=data.seed).action)
    b.config = replace(b.config, direction='noise_at_1')
    assert not torch.allclose(a.loss(batch).total, b.loss(batch).total)


def test_times():
    u = torch.linspace(.001, .999, 500)
    assert torch.equal(shifted_time(u, 1.), beta_time(u)/(beta_time(u) + 1.*(1-beta_time(u))))
    assert (shifted_time(u, .1) >= shifted_time(u, 1.)).all() and shifted_time(u, .1).max() < 1 and shifted_time(u, .1).min() > 0


def test_words_of_a_subtask_are_named_where_there_are_some(data, stats):
    p = awake(make(data, stats))
    b = p.prepare(data)
    for i, s in enumerate(data.subtask):
        assert p.tokenizer.decode(b['named'][i].nonzero()[:, 0]) or not s
        assert set(p.tokenizer(s, add_special_tokens=False)['input_ids']) == set(b['named'][i].nonzero()[:, 0].tolist())
    z = p._look(b['images'], b['input_ids'], b['mask'], b['state'])[0]
    each = nn.functional.binary_cross_entropy_with_logits(p.naming(z), b['named'].float(), reduction='none').sum(1)
    torch.testing.assert_close(p.loss(b).parts['naming'], each[[0, 1, 3, 4]].mean().detach())
    none = p.loss(p.prepare(replace(data, subtask=None)))
    assert none.parts['naming'] == 0
    none.total.backward()
    assert not p.naming.weight.grad.any()    # there, so that DDP need not look for it
    assert make(data, stats, name_words=0.).naming is None


# --- acting

def test_rows_do_not_know_their_company(data, stats):
    p = awake(make(data, stats))
    all_ = p.act(data, seed=data.seed).action
    for i in range(5): torch.testing.assert_close(p.act(row(data, i), seed=data.seed[i:i+1]).action[0], all_[i], rtol=1e-4, atol=1e-5)
    g = lambda: torch.Generator().manual_seed(3)
    assert torch.equal(p.act(data, generator=g()).action, p.act(data, generator=g()).action)
    assert not torch.equal(p.act(data, generator=g()).action, all_)


def test_words_and_both_cameras_matter(data, stats):
    p = awake(make(data, stats))
    def go(obs): return p.act(obs, seed=torch.zeros(len(obs), dtype=torch.long)).action
    same = go(row(data, 0))
    assert (go(row(data, 0).say('press blue')) - same).abs().max() > 1e-4
    for n in (0, 1):
        images = data.images[:1].clone()
        images[:, n] = 255 - images[:, n]
        assert (go(replace(row(data, 0), images=images)) - same).abs().max() > 1e-4
    with pytest.raises(ValueError, match='expected 4 patches, found 9'): go(replace(row(data, 0), images=data.images[:1].repeat(1, 1, 1, 2, 2)[..., :48, :48]))


def test_one_batch_by_heart_in_both_directions(data, stats):
    for kw in (dict(), dict(direction='noise_at_1', noise='uniform')):
        p = make(data, stats, noise_shift=1., **kw).eval()
        b, opt, first = p.prepare(data), torch.optim.Adam(p.parameters(), 5e-3), None
        for i in range(80):
            l = p.loss(Batch({**b, 'seed': b['seed'] + 100*i})).total
            first = first or l.item()
            opt.zero_grad(); l.backward(); opt.step()
        assert l < first/4, (kw, first, l.item())
        made = p.action_norm(p.act(data, seed=data.seed).action)[b['valid']]
        assert (made - b['action'][b['valid']]).abs().mean() < .3, kw


def test_heun_and_euler_meet(data, stats):
    p = awake(make(data, stats))
    ends = []
    for f, n in ((euler_sample, 200), (heun_sample, 40)):
        p.sampler, p.config = f, replace(p.config, sample_steps=n)
        ends.append(p.act(data, seed=data.seed).action)
    torch.testing.assert_close(*ends, rtol=0, atol=.02*(ends[0].abs().max().item()+1))


# --- folders, groups, sizes

def test_folder_comes_back(data, stats, tmp_path):
    p = awake(make(data, stats, frozen=('vision',)))
    folder = p.save_pretrained(tmp_path/'p')
    again = PaliGemmaVLA.from_pretrained(folder)
    assert torch.equal(p.act(data, seed=data.seed).action, again.act(data, seed=data.seed).action) and again.config == p.config
    assert json.loads((folder/'config.json').read_text())['policy'] == 'paligemma_vla'
    with pytest.raises(ValueError, match="tokenizer: expected one, found None"): PaliGemmaVLA(p.config, stats)


def test_groups_hold_every_parameter_once(data, stats):
    p = make(data, stats, frozen=('vision', 'language'), head_lr=2.)
    groups = {g.name: g for g in p.groups()}
    names = [k for g in groups.values() for k in g.params]
    assert sorted(names) == sorted(k for k, _ in p.named_parameters()) and [g.trainable for g in groups.values()] == [False, False, True]
    assert groups['head'].lr == 2. and 'vlm.projector.weight' in groups['vision'].params and 'vlm.embed.weight' in groups['language'].params


def test_published_size(data, stats):
    wide, tokenizer = dict(state=one(torch.rand(9, 8)), action=one(torch.rand(9, 7))), make(data, stats).tokenizer
    with torch.device('meta'): p = PaliGemmaVLA(paligemma_3b(), wide, tokenizer)
    n = {g.name: sum(q.numel() for q in g.params.values()) for g in p.groups()}
    assert round(n['vision']/1e6, 1) == 414.8 and round(n['language']/1e6, 1) == 2508.5    # as PaliGemma's: 2923.3 together
    assert round((n['vision']+n['language'])/1e6, 1) == 2923.3 and 30e6 < n['head'] < 80e6
    assert all(q.is_meta for q in p.parameters())
    m = PaliGemmaVLA.from_data(tiny(), data.instruction, stats)
    assert sum(q.numel() for q in m.parameters()) < 2.5e6


def paligemma_folder(folder, data, **text):
    "A small PaliGemma of transformers with random weights, and a tokenizer"
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    tok = small_gemma_tokenizer(data.instruction, 400)
    torch.manual_seed(0)
    stock = PaliGemmaForConditionalGeneration(PaliGemmaConfig(projection_dim=32, hidden_size=32, image_token_index=len(tok),
        vision_config=dict(model_type='siglip_vision_model', hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32, projection_dim=32, vision_use_head=False),
        text_config=dict(model_type='gemma', hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=8, vocab_size=len(tok)+64) | text)).eval()
    for q in stock.parameters(): nn.init.normal_(q, std=.2)
    stock.save_pretrained(folder)
    tok.save_pretrained(folder)
    return stock


def test_a_policy_begins_with_paligemma(data, stats, tmp_path):
    stock = paligemma_folder(tmp_path/'vlm', data)
    p = make(data, stats, vlm=str(tmp_path/'vlm')).eval()
    c = p.config
    assert (c.vlm, c.image, c.patch, c.vision_mlp, c.width, c.mlp, c.kv_heads) == ('', 32, 8, 40, 32, 48, 1) and c.vocab == len(p.tokenizer) + 64
    b = p.prepare(data)
    image = torch.full((5, 16), stock.config.image_token_id)
    one_camera = data.images[:, :1]
    with torch.no_grad():
        theirs = stock(input_ids=torch.cat([image, b['input_ids']], 1), pixel_values=one_camera[:, 0]/127.5-1, attention_mask=torch.cat([torch.ones(5, 16).bool(), b['mask']], 1).long(),
                       token_type_ids=torch.zeros(5, 16+b['mask'].shape[1], dtype=torch.long), output_hidden_states=True)
        x, valid = p.vlm.prefix(one_camera/127.5-1, torch.ones(5, 1).bool(), b['input_ids'], b['mask'])
        hidden, _ = p.vlm.language_model(x, positions_of(valid), block_mask(torch.zeros_like(valid), valid))
    torch.testing.assert_close(hidden[valid], theirs.hidden_states[-1][valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.vlm.logits(hidden)[valid], theirs.logits[valid], rtol=1e-4, atol=1e-5*theirs.logits.abs().max().item())
    again = PaliGemmaVLA.from_pretrained(p.save_pretrained(tmp_path/'p'))    # needs the first folder no more
    assert again.config == c and torch.equal(again.act(data, seed=data.seed).action, p.act(data, seed=data.seed).action)
    p.train().loss(b).total.backward()
    back = paligemma_weights(p.vlm, 'in memory, transformers 5', ['lm_head.weight'])
    want = stock.state_dict()
    assert back.keys() == want.keys() and all(torch.equal(back[k], want[k]) for k in want)


def test_other_language_models_are_refused(data, stats, tmp_path):
    paligemma_folder(tmp_path, data, rms_norm_eps=1e-5)
    with pytest.raises(ValueError, match='text_config.rms_norm_eps: expected 1e-06, found 1e-05'): make(data, stats, vlm=str(tmp_path))


# --- the engine

def test_a_run_goes_on_where_it_stopped(data, stats, assert_resumes):
    _,row = assert_resumes(lambda: make(data, stats), lambda p, k: Batch({**(b := p.prepare(data)), 'seed': b['seed']+100*k}))
    assert {'loss/flow', 'loss/guide', 'val/flow', 'val/guide'} <= set(row)


def test_example_settings_are_ours():
    file = root/'docs/examples/paligemma_vla.yaml'

    @dataclass(frozen=True)
    class Run:
        policy: str
        model: PaliGemmaVLAConfig
        dataset: dict
        train: TrainConfig
    run = load_config(Run, file)
    want = replace(paligemma_3b(), cameras=1)    # cameras are those of the data
    assert run.policy == PaliGemmaVLA.name and run.model == want and run.train.lr == 1e-4 and run.train.schedule == 'cosine'
    assert run.dataset == dict(height=run.model.image, width=run.model.image)
    assert read_settings(file)['model']['direction'] == 'noise_at_0'
