"""Cal-QL: recordings of Hume, Comet and CORL replayed and spoilt, what each loss moves, chunks and time, and the stacked runs of the study."""
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch

from vla_nb import parity as P
from vla_nb.data.returns import mc_returns, n_step, rewards
from vla_nb.envs.point_maze import PointMaze, follow, record
from vla_nb.heads.critic import Critics, Temperature, TanhGaussian, comet_spread, frozen, from_released, hume_spread, soft_update, target_copy, xavier
from vla_nb.objectives.cal_ql import CalQLConfig, COMET, HUME, Networks, Transitions, cal_ql_losses, draw_noise
from vla_nb.objectives.chunk_values import chain_values, random_share
from vla_nb.replay.calql import calql, settings
from vla_nb.replay.recording import Recording

fixture = Path(__file__).parent/'fixtures'/'calql.pt'


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


@pytest.fixture
def modules():
    "The recording without the whole value heads, whose replay is tested elsewhere"
    return {k: v for k,v in torch.load(fixture, weights_only=True).items() if not k.startswith('head_')}


def failed(rec, tmp_path):
    torch.save(rec, tmp_path/'rec.pt')
    return [r.name for r in calql(Recording(tmp_path/'rec.pt')) if not r.ok]


def test_every_run_equals_the_originals():
    rows = P.check(fixture)
    assert not [r for r in rows if not r.ok]
    assert max(r.diff for r in rows if '/grads/' in r.name and not r.name.startswith('head_bf16')) < 1e-5
    names = {r.name.split('/')[0] for r in rows}
    assert {'hume_default', 'hume_clip', 'comet_default', 'corl_temp2', 'soft_update', 'random_density', 'rewards_intended', 'fixed_policy_loss', 'head_fp32'} <= names


@pytest.mark.parametrize('run,key', [('hume_default', 'target_critics.networks.1.layers.2.bias'), ('hume_no_calql', 'critics.output_layer.weight'),
    ('comet_default', 'policy.network.layers.4.weight'), ('hume_clip', 'policy.std_layer.bias')])
def test_one_changed_weight_fails(modules, tmp_path, run, key):
    modules[run]['state_dict'][key].view(-1)[0] += .01
    bad = failed(modules, tmp_path)
    assert bad and any(b.startswith(run) for b in bad)


def test_changed_noise_and_settings_fail(modules, tmp_path):
    modules['hume_default']['noise']['eps_next'][0,0,0] += .1
    modules['hume_clip']['config']['cql_clip_diff_max'] = torch.tensor(2.)
    bad = failed(modules, tmp_path)
    assert 'hume_default/losses/cql_loss' in bad and 'hume_clip/losses/cql_loss' in bad and 'hume_no_importance/losses/cql_loss' not in bad


def test_settings_are_read(modules, tmp_path):
    torch.save(modules, tmp_path/'rec.pt')
    rec = Recording(tmp_path/'rec.pt')
    assert settings(rec, 'hume_default') == replace(HUME, n_actions=3, tau=.005)
    assert settings(rec, 'comet_default') == replace(COMET, n_actions=3, discount=.99)
    assert settings(rec, 'hume_no_importance').importance is False and settings(rec, 'hume_no_max_backup').max_target_backup is False


def nets(d=6, a=4, **form):
    policy, critics = TanhGaussian(d, a, (16, 16)), Critics(d, a, (16, 16), init=xavier, **form)
    return policy, critics, target_copy(critics), Temperature()


def losses(parts, batch, cfg, seed=0):
    policy, critics, target, t = parts
    return cal_ql_losses(Networks(policy.sample, critics, frozen(critics), target, t), batch, draw_noise(torch.arange(len(batch.rewards)) + seed, batch.actions.shape[1], cfg), cfg)


def transitions(b=8, d=6, a=4): return Transitions(torch.randn(b, d), torch.randn(b, d), torch.rand(b, a)*2-1, -torch.ones(b), torch.ones(b), torch.full((b,), .9), -torch.rand(b)*5)


@pytest.mark.parametrize('layer_norm,shared', [(False, False), (True, True)])
def test_candidates_are_valued_as_alone(layer_norm, shared):
    c = Critics(5, 3, (8, 8), n=3, shared_head=shared, layer_norm=layer_norm, init=xavier)
    obs, a = torch.randn(4, 5), torch.rand(4, 6, 3)
    alone = torch.stack([last(net(torch.cat([obs[:,None].expand(-1, 6, -1), a], -1)))[...,0] for net,last in zip(c.networks, c.last)])
    torch.testing.assert_close(c(obs, a), alone)
    torch.testing.assert_close(c(obs, a[:,2]), alone[...,2])


def test_what_each_loss_moves():
    parts, batch = nets(), transitions()
    batch.obs.requires_grad_(); batch.next_obs.requires_grad_()
    out = losses(parts, batch, CalQLConfig())
    policy, critics, target, t = parts
    moved = lambda k, ps: [g is not None and bool(g.any()) for g in torch.autograd.grad(out[k], ps, retain_graph=True, allow_unused=True)]
    groups = dict(policy=list(policy.parameters()), critics=list(critics.parameters()), t=[t.multiplier], obs=[batch.obs], after=[batch.next_obs])
    reached = {k: {g for g,ps in groups.items() if any(moved(k, ps))} for k in ('critic', 'actor', 'temperature')}
    assert reached == dict(critic={'critics', 'obs'}, actor={'policy'}, temperature={'t'})
    assert all(moved('critic', groups['critics'])) and all(moved('actor', groups['policy']))
    assert not any(p.requires_grad for p in target.parameters())


def test_the_actor_climbs_unless_as_written():
    parts, batch = nets(), transitions()
    slope = lambda cfg: torch.cat([g.flatten() for g in torch.autograd.grad(losses(parts, batch, cfg)['actor'], list(parts[0].parameters()))])
    assert (slope(CalQLConfig()) - slope(CalQLConfig(q_gradient=False))).abs().max() > 1e-4
    for p in parts[1].parameters(): p.data.zero_()
    torch.testing.assert_close(slope(CalQLConfig()), slope(CalQLConfig(q_gradient=False)))


def test_noise_is_each_samples_own():
    cfg = CalQLConfig(n_actions=3, next_temperature=True)
    whole, part = draw_noise(torch.tensor([5, 6, 7]), 4, cfg), draw_noise(torch.tensor([6]), 4, cfg)
    for a,b in zip(whole, part): assert torch.equal(a[1:2], b)
    assert whole.random.abs().max() < 1 and len({float(z.flatten()[0]) for z in whole}) == 6
    assert draw_noise(torch.tensor([1]), 4, CalQLConfig(max_target_backup=False)).target.shape == (1, 1, 4)


def test_options():
    parts, batch = nets(), transitions()
    run = lambda **k: losses(parts, batch, replace(CalQLConfig(alpha=2.), **k))
    assert torch.equal(run(clip_max=-5.)['gap'], torch.tensor(-5.)) and run(clip_max=-5.)['gap_unclipped'] != -5
    assert run(importance=False)['gap'] != run()['gap'] and run(temp=2.)['gap'] != run(temp=2., divide_density=True)['gap']
    assert torch.equal(run(temp=1.)['gap'], run(divide_density=True)['gap'])
    low, high = (losses(parts, batch._replace(mc_returns=torch.full((8,), m)), CalQLConfig()) for m in (-1e9, 1e9))
    assert low['bound_rate'] == 0 and high['bound_rate'] == 1 and high['gap'] > low['gap']
    m = Temperature(.5)
    policy, critics, target, t = parts
    out = cal_ql_losses(Networks(policy.sample, critics, frozen(critics), target, t, m), batch, draw_noise(torch.arange(8), 4, CalQLConfig()), CalQLConfig(lagrange_gap=.1))
    assert (torch.autograd.grad(out['multiplier'], m.multiplier)[0] < 0) == (out['gap'] > .1)
    torch.testing.assert_close(out['loss'], out['critic'] + out['actor'] + out['temperature'] + out['multiplier'])


@pytest.mark.parametrize('spread', [hume_spread, comet_spread])
def test_released_names_and_spreads(spread):
    a = TanhGaussian(4, 3, (8, 8, 8), layer_norm=True, spread=spread)
    names = {k.replace('network.', 'network.layers.'): v for k,v in a.state_dict().items()}
    assert {'network.layers.0.weight', 'network.layers.1.weight', 'network.layers.3.weight', 'network.layers.4.bias', 'network.layers.7.weight'} < set(names)
    a.load_state_dict(from_released(names))
    assert spread(torch.tensor([50.])) <= np.log(10) + 1e-6 and spread(torch.tensor([-50.])) >= np.log(1e-5) - 1e-5


def test_chunks_and_the_data_say_the_same():
    reward, alive = rewards(np.array([40, 17]), np.array([True, True]))
    bounds = np.array([0, 40, 57])
    mc = mc_returns(reward, alive, bounds, .98)
    for n in (1, 8, 32):
        total, mask, then = n_step(reward, alive, bounds, .98, n)
        np.testing.assert_allclose(total + .98**n*mask*mc[then], mc, atol=1e-4)
        ours = chain_values(torch.from_numpy(reward[:40]), torch.from_numpy(alive[:40]).float(), .98, n)
        np.testing.assert_allclose(ours.numpy(), mc[:40], atol=1e-3)
    wrong = chain_values(torch.from_numpy(reward[:40]), torch.from_numpy(alive[:40]).float(), .98, 8, one_reward=True)
    assert abs(wrong[0] + 4.80) < .01 and abs(mc[0] + 26.32) < .01


def test_importance_weights_die():
    share = {a: random_share(a, .3, draws=60)[0] for a in (2, 32, 736)}
    assert share[2] < .6 < share[32] <= share[736] and share[736] > .999


def test_maze():
    walks = record(20, 3)
    assert walks.obs.dtype == np.float32 and walks.bounds[-1] == len(walks.obs)
    assert all((walks.masks[i:j-1] == 1).all() for i,j in zip(walks.bounds, walks.bounds[1:]))
    maze = PointMaze(200, 1)
    at = maze.reset(np.random.default_rng(0).uniform(-1, 1, (200, 2)))
    for _ in range(30):
        was, (at,_,_) = at, maze.step(np.random.default_rng(1).uniform(-1, 1, (200, 2)))
        assert not ((abs(at[:,0]) < .1) & (at[:,1] < .3) & (was != at).all(1)).any()
    assert follow(lambda p: PointMaze.goal - p, 30, 0)[0].sum() == 0, 'the wall forces a detour'


def test_stacked_runs_are_single_runs():
    from vla_nb.value_study import Memory, Stack, best_of, online, runs_of, succeed, train
    walks = record(10, 0)
    runs = runs_of('Cal-QL', (0, 1)) + runs_of('SAC', (1,))
    many, one = Stack(runs, width=16), Stack(runs[1:2], width=16)
    for stack in (many, one): train(stack, Memory(walks, stack), 5, show=False)
    for k,p in one.trained.items(): torch.testing.assert_close(many.trained[k][1], p[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(many.trained['critics.networks.0.0.weight'][1], many.trained['critics.networks.0.0.weight'][2])
    memory = Memory(walks, many)
    curve = online(many, memory, 60, 30, show=False)
    assert [len(c) for c in curve] == [3, 3, 3] and memory.size.min() == 50
    assert (memory.new[2][:,:50] <= 0).all() and (memory.new[5][:,0] <= -12).all(), 'walks that fail go on at -1'
    assert len(best_of(many, walks, n=10)) == 4 and len(succeed(many, 5)) == 3


def test_corl_form():
    from vla_nb.value_study import Agent, Memory, Stack, corl, hume, runs_of, train
    torch.manual_seed(0)
    actor, critics, temperature = corl(64)
    assert len(actor.network) == 6 and len(critics.networks[0]) == 4, 'the actor is one layer deeper'
    torch.testing.assert_close(torch.stack([h.weight.norm() for h in critics.heads]), torch.full((2,), 2**.5))
    torch.testing.assert_close(actor.spread(torch.tensor([-50., 0., 50.])), torch.tensor([-20., -1., 2.]))
    assert temperature() == 1 and isinstance(Agent(hume).temperature, Temperature)
    stack = Stack(runs_of('Cal-QL', (0, 1)), build=corl, width=16)
    train(stack, Memory(record(10, 0), stack), 3, show=False)
    assert (stack.trained['actor.spread.slope'] != 1).all() and (stack.trained['temperature.log'] != 0).all()
