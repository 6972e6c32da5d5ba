"""OpenVLA with an energy: nothing leaks into the policy, checkpoints and resumed runs carry the energy, the policy's own chunk is always a candidate, refining stays within its region"""
import subprocess, sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np, pytest, torch

from vla_nb.core import Observation, Samples
from vla_nb.data.episode import ArraySource, Episode
from vla_nb.data.windows import Windows
from vla_nb.energy_ranking import fit_energy, frozen_rows, stop_early, with_energy
from vla_nb.policies.openvla import OpenVLA
from vla_nb.policies.openvla_config import OpenVLAConfig
from vla_nb.policies.openvla_energy import OpenVLAEnergy, OpenVLAEnergyConfig
from vla_nb.train.config import TrainConfig
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


def test_checkpoint_and_resume_carry_the_energy(assert_resumes):
    loaded, row = assert_resumes(policy, lambda p, k: p.prepare(made(seed=k)))
    state = loaded.state_dict()
    whole = sum(made(seed=k).action_is_pad.any(1).logical_not().sum() for k in range(4)).clamp(max=16)
    assert any(k.startswith('energy.') for k in state) and state['filled'] == whole > 0 and state['bank'].abs().sum() > 0
    assert {'loss/energy', 'val/energy', 'val/energy_gap'} <= set(row)


def test_the_bank_holds_whole_chunks_and_offers_no_empty_row():
    p, half = policy(candidates=16), torch.arange(4) >= torch.tensor([4, 2, 4, 4, 1, 3, 2, 4]).repeat(2)[:,None]
    mine, seed = torch.rand(16, 4, 3)*2-1, torch.arange(16)
    assert p.filled == 0 and torch.equal(p.propose(mine, seed), mine[:,None].expand(-1, 16, -1, -1)), 'an empty bank offers the own chunk'
    b = p.prepare(replace(made(16), action_is_pad=half))
    whole = b['valid'].all(1)
    p.keep(b['chunk'], b['valid'])
    assert p.filled == whole.sum() == 8 and torch.equal(p.bank[:p.filled], b['chunk'][whole]) and not p.bank[p.filled:].any()
    offered = p.propose(mine, seed)[:,1:].flatten(0, 1)
    known = [(offered == x).all(2).all(1) for x in b['chunk'][whole]]
    assert torch.stack(known).any(0).all() and all(k.any() for k in known), 'every offer is a demonstrated chunk, and every one is offered'
    more = [p.prepare(replace(made(16, seed=k), action_is_pad=half)) for k in (1, 2)]
    for m in more: p.keep(m['chunk'], m['valid'])
    assert p.filled == 16 and torch.equal(p.bank, torch.cat([m['chunk'][m['valid'].all(1)] for m in (*more[::-1], b)])[:16]), 'the newest first; the oldest fall out'
    was = p.bank.clone()
    p.keep(b['chunk'], torch.zeros_like(b['valid']))
    assert p.filled == 16 and torch.equal(p.bank, was)
    p.eval().loss(b)
    assert torch.equal(p.bank, was), 'a validation keeps nothing'


def test_what_is_behind_an_end_is_not_learnt():
    p, s = policy(name_words=0.), made()
    def of(s):
        p.zero_grad()
        l = p.train().loss(p.prepare(s))
        l.total.backward()
        return l.parts['energy'], [q.grad.clone() for q in p.energy.parameters()]
    same = replace(s, episode=torch.zeros(8, dtype=torch.long), step=torch.zeros(8, dtype=torch.long))    # no chunk is another's negative
    changed = replace(same, action=torch.where(s.action_is_pad[...,None], -s.action, s.action))
    (x, gx), (y, gy) = of(same), of(changed)
    torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    for g,h in zip(gx, gy, strict=True): torch.testing.assert_close(g, h, rtol=0, atol=1e-5)


def split(s, rank): return Samples(**{f.name: None if (v := getattr(s, f.name)) is None else v[4*rank:4*rank+4] for f in fields(s)})


def found(rank=None):
    "Losses and gradients of a policy on a batch, or on a process's half; and how many steps they are means over"
    s = made()
    s = replace(s, action_is_pad=torch.arange(4) >= torch.tensor([1, 2, 1, 3, 4, 4, 3, 4])[:,None])
    p = policy(name_words=0.).train()
    l = p.loss(p.prepare(s if rank is None else split(s, rank)))
    l.total.backward()
    return l.count, dict(total=l.total.detach(), **{f'parts/{k}': v for k,v in l.parts.items() if not k.endswith('_l1')}, **{k: q.grad for k,q in p.named_parameters() if q.grad is not None})


def work(rank, out):    # one of two processes
    torch.distributed.init_process_group('gloo', init_method=f'file://{out}/meet', rank=rank, world_size=2)
    n, mine = found(rank)
    torch.distributed.all_reduce(all := n.clone())
    for v in mine.values(): torch.distributed.all_reduce(v.mul_(n/all))
    if rank == 0: torch.save(mine, out/'found.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    "The first process has 7 real steps, the second 15: total, parts and every gradient are those of one process with all 22"
    both = [subprocess.Popen([sys.executable, __file__, str(r), str(tmp_path)], stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    for p in both: assert p.wait(300) == 0, p.stderr.read()[-3000:]
    two, (n, one) = torch.load(tmp_path/'found.pt', weights_only=True), found()
    (n0, a), (n1, b) = found(0), found(1)
    assert (n0, n1, n) == (7, 15, 22) and two.keys() == one.keys()
    for k in one: torch.testing.assert_close(two[k], one[k], rtol=0, atol=1e-6, msg=lambda m: f'{k}: {m}')
    assert abs((n0*a['parts/energy'] + n1*b['parts/energy'])/n - one['parts/energy']) > .1, 'alone they have fewer negatives'


def test_its_optimiser_has_its_own_settings():
    p = policy(energy_lr=.5, energy_delay=4, energy_warmup=2, energy_clip=.7)
    opt = build_optimizer(p, cfg := TrainConfig(steps=20, warmup=1, schedule='constant', lr=1e-2))
    rate = lambda k: (set_lr(opt, k, cfg), {g['name']: g['lr'] for g in opt.param_groups}['energy'])[1]
    assert [rate(k) for k in (0, 3, 4, 5, 9)] == [0., 0., .0025, .005, .005]
    assert {g['name'] for g in opt.param_groups if g['alone']} == {'energy'} and {g['own'].clip for g in opt.param_groups if g['name'] == 'energy'} == {.7}


@pytest.mark.parametrize('kw', [dict(candidates=16), dict(candidates=16, near=15), dict(candidates=8, near=4)])
def test_own_chunk_is_a_candidate_and_stays_unless_another_is_lower(kw):
    p, seed = policy(**kw, switches=(2,)).eval(), torch.arange(4)
    p.keep(torch.rand_like(p.bank)*2-1, torch.ones(16, 4, dtype=torch.bool))
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
    p.keep(torch.rand_like(p.bank)*2-1, torch.ones(16, 4, dtype=torch.bool))
    seeds, obs = torch.arange(4), looked()
    both = p.act(obs, seed=seeds).action
    for i in range(4):
        alone = Observation(obs.images[i:i+1], obs.state[i:i+1], obs.instruction[i:i+1])
        torch.testing.assert_close(p.act(alone, seed=seeds[i:i+1]).action[0], both[i], rtol=0, atol=1e-5)
    g = lambda: torch.Generator().manual_seed(3)
    assert torch.equal(p.act(obs, g()).action, p.act(obs, g()).action)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match='near'): OpenVLAEnergyConfig(candidates=4, near=4)
    for k,bad in dict(bank=0, candidates=0, negatives=-1, refine_steps=-1, energy_delay=-1, margin=-.1, spread=float('nan'), sigma=0., tau=0., radius=0., field=-1., energy_lr=float('inf')).items():
        with pytest.raises(ValueError, match=f'{k}: expected .*, found {bad}'): OpenVLAEnergyConfig(**{k: bad})
    with pytest.raises(ValueError, match='energy_width: expected an even number that energy_heads=4 divides, found 18'): OpenVLAEnergyConfig(energy_width=18)
    for bad in (3, -1):
        with pytest.raises(ValueError, match=f'switches: expected dimensions of an action, 0 to 2, found {bad}'): policy(switches=(0, bad))
    OpenVLAEnergyConfig(negatives=0, margin=0., spread=0., field=0.)


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


if __name__ == '__main__': work(int(sys.argv[1]), Path(sys.argv[2]))
