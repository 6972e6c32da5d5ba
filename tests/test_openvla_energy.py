"""OpenVLA with an energy: nothing leaks into the policy, checkpoints and resumed runs carry the energy, the policy's own chunk is always a candidate, refining stays within its region"""
import shutil
from dataclasses import replace

import numpy as np, pytest, torch

from vla_nb.core import Observation, Samples
from vla_nb.data.episode import ArraySource, Episode
from vla_nb.data.windows import Windows
from vla_nb.energy_ranking import fit_energy, frozen_rows, stop_early, with_energy
from vla_nb.policies.openvla import OpenVLA
from vla_nb.policies.openvla_config import OpenVLAConfig
from vla_nb.policies.openvla_energy import OpenVLAEnergy, OpenVLAEnergyConfig
from vla_nb.train.config import TrainConfig
from vla_nb.train.loop import train
from vla_nb.train.optim import build_optimizer, set_lr

sizes = dict(horizon=4, image=16, patch=8, vision_width=32, vision_heads=2, vision_depth=2, width=32, depth=1, heads=2, mlp=32, head_width=32)
own = dict(energy_width=16, bank=16, energy_warmup=1)
num = lambda n: dict(mean=[0.]*n, std=[1.]*n, min=[-1.]*n, max=[1.]*n, q01=[-1.]*n, q99=[1.]*n)
stats = dict(state=num(2), action=num(3))


def made(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Samples(torch.randint(256, (n, 1, 3, 16, 16), generator=g, dtype=torch.uint8), torch.rand(n, 2, generator=g), ['go left', 'go right']*(n//2),
        torch.rand(n, 4, 3, generator=g)*2-1, torch.arange(4) >= torch.randint(2, 5, (n, 1), generator=g), torch.arange(n)+100*seed, episode=torch.arange(n)//2, step=torch.arange(n) % 2)


def policy(cls=OpenVLAEnergy, **kw):
    config = OpenVLAEnergyConfig(**sizes, **{**own, **kw}) if cls is OpenVLAEnergy else OpenVLAConfig(**sizes)
    return cls.from_data(config, ['go left', 'go right'], stats)


def looked(n=4):
    s = made(n)
    return Observation(s.images, s.state, s.instruction)


@pytest.mark.parametrize('head', ['l1', 'diffusion', 'discrete'])
def test_no_gradient_into_the_rest(head):
    plain = OpenVLA.from_data(OpenVLAConfig(**sizes, head=head), ['go left', 'go right'], stats)
    both = policy(head=head)
    for p in (plain, both): p.train().loss(p.prepare(made())).total.backward()
    mine, theirs = dict(both.named_parameters()), dict(plain.named_parameters())
    assert {k for k in mine if k not in theirs} == {k for k in mine if k.startswith('energy.')}
    for k,p in theirs.items():
        assert torch.equal(p, mine[k]), f'{k} begins otherwise than without an energy'
        assert (p.grad is None) == (mine[k].grad is None) and (p.grad is None or torch.equal(p.grad, mine[k].grad)), k
    assert all(p.grad is not None and p.grad.isfinite().all() for k,p in mine.items() if k.startswith('energy.'))


def test_without_candidates_it_acts_as_a_plain_one():
    plain, both = policy(OpenVLA).eval(), policy().eval()
    assert torch.equal(plain.act(looked(), seed=torch.arange(4)).action, both.act(looked(), seed=torch.arange(4)).action)


def run(out, steps, resume=False, p=None):
    p = p or policy()
    train(p, lambda start, rank, world: (p.prepare(made(seed=i)) for i in range(start, 99)), TrainConfig(steps=6, warmup=1, lr=1e-2, cpu=True, progress=False, save_every=steps, eval_every=0, keep=0), out,
        [p.prepare(made(seed=50))], resume)
    return p


def test_checkpoint_and_resume_carry_the_energy(tmp_path):
    whole = run(tmp_path/'a', 3)
    shutil.copytree(tmp_path/'a', tmp_path/'b', ignore=shutil.ignore_patterns('checkpoint-000006'))
    again = run(tmp_path/'b', 3, resume=True)
    a, b = whole.state_dict(), again.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and any(k.startswith('energy.') for k in a) and a['bank'].abs().sum() > 0
    loaded = OpenVLAEnergy.from_pretrained(tmp_path/'a'/'checkpoint-000006')
    chunks = torch.rand(4, 3, 4, 3)
    assert torch.equal(loaded.energies(looked(), chunks), whole.eval().energies(looked(), chunks)) and torch.equal(loaded.bank, whole.bank)


def test_its_optimiser_has_its_own_settings():
    p = policy(energy_lr=.5, energy_delay=4, energy_warmup=2, energy_clip=.7)
    opt = build_optimizer(p, cfg := TrainConfig(steps=20, warmup=1, schedule='constant', lr=1e-2))
    rate = lambda k: (set_lr(opt, k, cfg), {g['name']: g['lr'] for g in opt.param_groups}['energy'])[1]
    assert [rate(k) for k in (0, 3, 4, 5, 9)] == [0., 0., .0025, .005, .005]
    assert {g['name'] for g in opt.param_groups if g['alone']} == {'energy'} and {g['own'].clip for g in opt.param_groups if g['name'] == 'energy'} == {.7}


@pytest.mark.parametrize('kw', [dict(candidates=16), dict(candidates=16, near=15), dict(candidates=8, near=4)])
def test_own_chunk_is_a_candidate_and_stays_unless_another_is_lower(kw):
    p, seed = policy(**kw, switches=(2,)).eval(), torch.arange(4)
    p.bank.copy_(torch.rand_like(p.bank)*2-1)
    mine = torch.rand(4, 4, 3)*2-1
    c = p.propose(mine, seed)
    assert c.shape == (4, kw['candidates'], 4, 3) and torch.equal(c[:,0], mine) and c.abs().max() <= 1
    if n := kw.get('near', 0): assert torch.equal(c[:,-n:,:,2], mine[:,None,:,2].expand(-1, n, -1)) and not torch.equal(c[:,-n:,:,0], mine[:,None,:,0].expand(-1, n, -1))
    assert torch.equal(p.propose(mine[1:2], seed[1:2])[0], c[1]), 'the draws depend on who else is there'
    b = p.prepare(made(4))
    row = p._row(b['images'], b, b['state'])
    e = p.energy.score(p._contexts(row), c)
    got = p.choose(row, mine, seed)
    assert torch.equal(got, c[torch.arange(4), e.argmin(1)])
    p.config = replace(p.config, margin=1e9)
    assert torch.equal(p.choose(row, mine, seed), mine)


def test_refining_lowers_the_energy_within_its_region():
    p = policy(refine_steps=4, radius=.07, switches=(1,)).eval()
    with torch.inference_mode(): refined = p.act(looked(), seed=torch.arange(4)).action
    p.config = replace(p.config, refine_steps=0)
    plain = p.act(looked(), seed=torch.arange(4)).action
    moved = (refined - plain.clamp(-1, 1)).abs()
    assert 0 < moved.max() <= .07+1e-5 and moved[...,1].max() < 1e-6
    e = p.energies(looked(), torch.stack([plain.clamp(-1, 1), refined], 1))
    assert (e[:,1] <= e[:,0]+1e-6).all() and (e[:,1] < e[:,0]).any()


def test_ranked_answers_do_not_depend_on_the_batch_and_smoke_with_a_generator():
    p = policy(candidates=8, near=3).eval()
    p.bank.uniform_(-1, 1)
    seeds, obs = torch.arange(4), looked()
    both = p.act(obs, seed=seeds).action
    for i in range(4):
        alone = Observation(obs.images[i:i+1], obs.state[i:i+1], obs.instruction[i:i+1])
        torch.testing.assert_close(p.act(alone, seed=seeds[i:i+1]).action[0], both[i], rtol=0, atol=1e-5)
    g = lambda: torch.Generator().manual_seed(3)
    assert torch.equal(p.act(obs, g()).action, p.act(obs, g()).action)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match='near'): OpenVLAEnergyConfig(candidates=4, near=4)
    with pytest.raises(ValueError, match='bank'): OpenVLAEnergyConfig(bank=0)


def test_frozen_rows_are_what_the_policy_sees_and_what_is_trained_on_them_fits_it():
    g = np.random.default_rng(0)
    ep = lambda l, told: Episode({'front': g.integers(256, size=(l, 16, 16, 3), dtype=np.uint8)}, g.uniform(-1, 1, (l, 2)), g.uniform(-1, 1, (l, 3)), told)
    windows = Windows(ArraySource([ep(5, 'go left'), ep(7, 'go right')]), 4)
    p = with_energy(policy(OpenVLA).eval())
    rows, s = frozen_rows(p, windows), windows.samples(np.arange(12))
    obs, before = Observation(s.images, s.state, s.instruction), dict(p.vlm.state_dict())
    shown = p.energy.score(p.energy.contexts(rows['h'].float(), ~rows['seen']), rows['chunk'][:,None])
    torch.testing.assert_close(shown, p.energies(obs, s.action[:,None]), rtol=1e-2, atol=2e-3)    # rows are kept in half precision
    torch.testing.assert_close(p.way.head(rows['slots'].float()), p.act(obs, seed=torch.arange(12)).action, rtol=1e-2, atol=5e-3)
    stop_early(p, rows, 3)
    fit_energy(p, rows, 4, batch=6)
    assert p.bank.abs().sum() > 0 and all(torch.equal(v, before[k]) for k,v in p.vlm.state_dict().items())
    assert not torch.equal(p.energies(obs, s.action[:,None]), shown)
    with pytest.raises(ValueError, match='labels'): fit_energy(p, rows, 4, labels='other')
