"Comet: what moves and what never does, resume, the codec, the published settings, and what is refused"
from dataclasses import replace

import numpy as np, pytest, torch
from vla_nb.core import Observation, read_config
from vla_nb.data.episode import ArraySource, Episode
from vla_nb.data.loader import Loader
from vla_nb.data.stats import compute_stats
from vla_nb.data.windows import Windows
from vla_nb.objectives.cal_ql import CalQLConfig
from vla_nb.policies.comet import Comet, start_comet
from vla_nb.policies.comet_config import CometConfig, comet_json
from vla_nb.policies.pi05 import Pi05
from vla_nb.policies.pi_config import Pi05Config
from vla_nb.policies.pi_files import export_policy
from vla_nb.policies.pi_modes import Pi05Flat, Pi05High
from vla_nb.policies.value_head import select
from vla_nb.train.config import TrainConfig
from vla_nb.train.loop import train

PI = Pi05Config(width=32, hidden=48, depth=2, heads=2, head_dim=16, expert_width=24, expert_hidden=48, vision_width=16, vision_depth=1, vision_hidden=24, vision_heads=2, patch=8, image=16, horizon=2, sample_steps=3, max_new_tokens=4)
SMALL = dict(pi=PI, mode='pi05_flat', chunk=2, hidden=32, heads=2, head_dim=8, actor_hidden=(16,), critic_hidden=(16,), candidates=3, num_pos=1, value_warmup=2, calql=CalQLConfig(n_actions=2, tau=.1))

def episode(i, dims=2):
    g = np.random.default_rng(i)
    return Episode(dict(front=g.integers(0, 255, (5, 16, 16, 3)).astype(np.uint8)), g.standard_normal((5, 3)).astype(np.float32), g.standard_normal((5, dims)).astype(np.float32), 'go there', success=i%2 == 0, fps=10.)

source = ArraySource([episode(i) for i in range(8)])
def new(seed=0, src=source, **kw): return Comet.from_data(CometConfig(**{**SMALL, **kw}), ['go there'], compute_stats(src), seed)
def batch(policy, n=8): return policy.prepare(policy.windows(Windows(source, 2)).samples(np.arange(n)))
def state(policy): return {k: v.clone() for k,v in policy.state_dict().items()}
def obs(b=2): return Observation(torch.randint(0, 255, (b, 1, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8), torch.zeros(b, 3), ['go there']*b)

def run(policy, out, accumulate=1):
    cut = policy.windows(Windows(source, 2))
    cfg = TrainConfig(steps=4, batch_size=8//accumulate, accumulate=accumulate, lr=1e-2, warmup=1, eval_every=0, save_every=0, clip=0., progress=False, cpu=True)
    train(policy, lambda start, rank, world: Loader(cut, cfg.batch_size, policy.prepare, size=(16, 16), rank=rank, world=world, start_step=start), cfg, out)
    return policy

def test_what_training_moves(tmp_path):
    policy, = [new()]
    before, base = state(policy), policy.base
    run(policy, tmp_path/'a')
    after = policy.state_dict()
    moved = {k.split('.')[1] if k.startswith('value.') else 'base' for k in before if not torch.equal(before[k], after[k])}
    assert moved == {'trunk', 'actor', 'critics', 'temperature', 'target_critics'}
    assert not base.training and all(p.grad is None and not p.requires_grad for p in base.parameters())

def test_gradient_table():
    for target_trunk in (False, True):
        policy = new(target_trunk=target_trunk)
        policy.loss(batch(policy)).total.backward()
        has = {k.split('.')[1] for k,p in policy.named_parameters() if p.grad is not None and p.grad.any()}
        none = {k.split('.')[0] if k.startswith('base') else k.split('.')[1] for k,p in policy.named_parameters() if p.grad is None}
        assert has == {'trunk', 'actor', 'critics', 'temperature'}
        assert none == {'base', 'target_critics'} | ({'slow_trunk'} if target_trunk else set())

def test_groups_cover_everything_once():
    policy = new(target_trunk=True)
    names = [k for g in policy.groups() for k in g.params]
    assert sorted(names) == sorted(k for k,_ in policy.named_parameters()) and len(names) == len(set(names))

def test_resume_is_exact(assert_resumes):
    "Targets, moments and schedules of all groups come back"
    again,_ = assert_resumes(new, lambda p, k: next(iter(Loader(p.windows(Windows(source, 2)), 8, p.prepare, size=(16, 16), start_step=k))))
    fresh = new().state_dict()
    assert any('target' in k and not torch.equal(v, fresh[k]) for k,v in again.state_dict().items())

def test_targets_move_once_a_step_not_a_batch(tmp_path):
    a, b = run(new(), tmp_path/'one'), run(new(), tmp_path/'two', accumulate=2)
    far = max((v - b.state_dict()[k]).abs().max().item() for k,v in a.state_dict().items() if 'target' in k)
    assert far < 1e-3    # two updates a step would be far off: tau is .1

def test_one_codec_for_training_and_ranking():
    policy = new()
    s = policy.windows(Windows(source, 2)).samples(np.arange(4))
    assert torch.equal(policy.prepare(s)['action'], policy.codec(s.action))
    r = policy.rank(obs(), seed=torch.arange(2))
    b = policy.prepare(replace(s, images=obs(4).images, state=torch.zeros(4, 3)))
    q = policy.value.values(policy._tokens(b), policy.codec(r.chunks).repeat(2, 1, 1))
    assert torch.allclose(q[:2], r.q, atol=1e-5)
    assert policy.codec(1e3*s.action).abs().max() == 1 and policy.codec.outside(1e3*s.action).min() > .9

def test_own_answer_is_among_the_proposals():
    policy, seed = new(), torch.tensor([3, 4])
    own = policy.base.act(obs(), seed=seed).action
    assert torch.allclose(policy.rank(obs(), seed=seed).chunks[:,0], own, atol=1e-5)
    policy.config = replace(policy.config, candidates=1)
    assert torch.allclose(policy.act(obs(), seed=seed).action, own, atol=1e-5)

def test_beta_draws_and_best_is_best():
    q = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    u = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    before = q.clone()
    assert torch.equal(select(q, 1e-3, u), q.argmax(1)) and torch.equal(select(q), q.argmax(1)) and torch.equal(q, before)
    with pytest.raises(ValueError, match='noise'): select(q, 1.)
    policy = new(beta=.5)
    a = policy.act(obs(), seed=torch.arange(2)).action
    assert torch.equal(a, policy.act(obs(), seed=torch.arange(2)).action)

def test_adopts_a_whole_run(tmp_path):
    pi = Pi05Flat.from_data(PI, ['walk'], compute_stats(source), seed=5)
    policy = new()
    assert 'frozen' in start_comet(policy, Pi05Flat.from_pretrained(pi.save_pretrained(tmp_path/'pi')))
    assert torch.allclose(policy.base.act(obs(), seed=torch.arange(2)).action, pi.act(obs(), seed=torch.arange(2)).action)
    assert policy.tokenizer.get_vocab() == pi.tokenizer.get_vocab()
    assert all(not p.requires_grad for p in policy.base.parameters())
    again = Comet.from_pretrained(policy.save_pretrained(tmp_path/'comet'))
    assert torch.equal(again.rank(obs(), seed=torch.arange(2)).q, policy.rank(obs(), seed=torch.arange(2)).q)

def test_released_weights_with_a_strict_report(tmp_path):
    policy = new()
    pi = Pi05Flat(policy.base.config, policy.stats, policy.tokenizer)
    folder = export_policy(pi, tmp_path/'openpi')
    assert 'openpi' in start_comet(policy, folder)
    assert all(torch.equal(p, dict(pi.named_parameters())[k]) for k,p in policy.base.named_parameters())
    with pytest.raises(ValueError, match='nothing was loaded|vocab|depth'): start_comet(new(pi=replace(PI, depth=3)), folder)

@pytest.mark.parametrize('name,make', [
    ('cameras', lambda: Pi05Flat.from_data(replace(PI, cameras=2), ['walk'], compute_stats(source))),
    ('pi.horizon', lambda: Pi05Flat.from_data(replace(PI, horizon=3), ['walk'], compute_stats(source))),
    ('action', lambda: Pi05Flat.from_data(PI, ['walk'], compute_stats(ArraySource([episode(i, 3) for i in range(4)])))),
    ('acts by flow', lambda: Pi05High.from_data(PI, ['walk'], compute_stats(source)))])
def test_other_policies_are_refused_by_name(name, make):
    policy = new()
    before = state(policy)
    with pytest.raises(ValueError, match=name): start_comet(policy, make())
    assert all(torch.equal(v, policy.state_dict()[k]) for k,v in before.items())

def test_plain_windows_are_refused():
    with pytest.raises(ValueError, match='policy.windows'): new().prepare(Windows(source, 2).samples(np.arange(2)))

SEED = '''{
    "policy": {
        "type": "comet",
        "chunk_size": 32,           // a remark, with "quotes"
        "n_action_steps": 32,
        "vqh_chunk_size": 32,
        "next_obs_offset": 32,      // another
        "pi05": true,
        "freeze_pi0": true,
        "train_vqh_only": true,

        // a line of its own
        "optimizer_lr": 2e-4,
        "actor_lr": 3e-4,
        "critic_lr": 3e-4,
        "temp_lr": 3e-4,
        "cql_alpha": 5.0,
        "cql_n_actions": 10,
        "target_entropy_coef": -0.2, // target_entropy = coef * action_dim
        "discount": 0.99,
        "policy_hidden_dims": [512, 512, 256],
        "critic_hidden_dims": [1024, 512, 256],
        "use_layer_norm": true
    }
}'''

def test_published_settings_as_they_stand():
    c, lr, told = comet_json(SEED)
    assert (c.horizon, c.chunk, c.calql.alpha, c.calql.n_actions, c.calql.target_entropy, c.calql.discount) == (32, 32, 5., 10, -.2, .99)
    assert (c.actor_hidden, c.critic_hidden, c.layer_norm) == ((512, 512, 256), (1024, 512, 256), True)
    assert np.allclose([lr*r for r in (c.trunk_lr, c.actor_lr, c.critic_lr, c.temperature_lr)], [2e-4, 3e-4, 3e-4, 3e-4])
    for name in ('trunk', 'actor', 'critic', 'temperature', 'target_entropy', 'discount', 'alpha', 'importance'): assert any(t.startswith(name) for t in told)
    assert not c.calql.weighs(32*23)

def test_settings_survive_a_file(tmp_path):
    policy = new(calql=CalQLConfig(alpha=2., clip_min=-7.))
    assert read_config(Comet, policy.save_pretrained(tmp_path/'p')) == policy.config

def test_reading_the_thought_is_the_same_cached(tmp_path):
    policy = new(reads='thought', bootstrap=False)
    plain, cache = batch(policy), policy.features(source, tmp_path, (16, 16), dtype='float32', progress=False)
    cached = policy.prepare(policy.windows(Windows(source, 2), cache).samples(np.arange(8)))
    assert cached['features'].shape == (8, 1, 1, 32)
    a, b = policy.loss(plain), policy.loss(cached)
    assert torch.allclose(a.total, b.total, atol=1e-4)
    assert torch.allclose(b.parts['q_target'], plain['mc_return'].mean())
    r, seed = policy.rank(obs(), seed=torch.arange(2)), torch.arange(2)
    own = policy.look(obs())[:,0]
    assert torch.equal(r.q, policy.value.values(policy._tokens(dict(features=own[:,None], state=policy.base.state_norm(torch.zeros(2, 3)))), policy.codec(r.chunks)))
    with pytest.raises(ValueError, match='reads'): new(reads='thought', mode='pi05_expert')
