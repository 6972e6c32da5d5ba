"The energy and its contrast, beyond their pages: two processes are one with the joined batch, and what is wrong is refused"
import math, subprocess, sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from vla_nb.core import masked_mean
from vla_nb.heads.energy import Energy, bounded_floor
from vla_nb.objectives.info_nce import (energy_inbatch_swap_infonce, energy_loss, gather, gradient_field, info_nce, local_negatives,
    same_chunk, same_moment)
from vla_nb.objectives.refine import best_of, refine

forms = {'published': dict(residual=False, norm_actions=True, bounded=True, per_step=False), 'next day': dict(residual=False, norm_actions=True, bounded=True),
         '2026': dict(residual=False, norm_actions=True), 'ours': {}}


def make(form='ours', width=16, dims=3, **kw):
    torch.manual_seed(0)
    return Energy(8, dims, width, 4, **{**forms[form], **kw})


def batch(n=12, t=4, dims=3):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(n, 5, 8, generator=g), torch.rand(n, t, dims, generator=g)*2-1, torch.arange(5) > torch.randint(1, 5, (n, 1), generator=g),
            torch.arange(n), torch.arange(n)//4, torch.arange(n) % 4)


cut = torch.tensor([1, 2, 1, 3, 1, 2, 4, 4, 3, 4, 4, 4])[:,None] > torch.arange(4)    # real steps: 10 of the first six rows, 23 of the others


def losses(net, rows):
    "Both losses of some rows, whole: local negatives, gradient field, anchor, false negatives left out, ends of episodes not learnt"
    h, a, hidden, seed, episode, step = (x[rows] for x in batch())
    ctx, valid = net.contexts(h, hidden), cut[rows]
    apart = same_moment(episode, step, gather(episode)[0], gather(step)[0], 2)
    each,c = energy_loss(partial(net.score, ctx), a, seed, negatives=3, exclude=apart, switches=(2,), valid=valid)
    full,n = masked_mean(each[:,None].expand(valid.shape), valid)
    return full, energy_inbatch_swap_infonce(net, h, a, hidden)[0], n, c


def found(rows):
    net = make()
    full, published, n, c = losses(net, rows)
    grads = {f'{of}/{k}': g for of,l in (('full', full), ('published', published)) for k,g in zip(dict(net.named_parameters()), torch.autograd.grad(l, net.parameters(), retain_graph=True), strict=True)}
    said = {f'full/{k}': v for k,v in c.summary(cut[rows].sum(1)).items()}
    return n, dict(published=published.detach(), first=c.first, candidates=c.candidates, **{'full/': full.detach()}, **said, **grads)


def work(rank, out):    # one of two processes
    torch.distributed.init_process_group('gloo', init_method=f'file://{out}/meet', rank=rank, world_size=2)
    n, mine = found(slice(6*rank, 6*rank+6))
    share = n/sum(gather(n[None])[0])    # as the engines weight processes and micro-batches
    for k,v in mine.items():
        if k in ('first', 'candidates'): mine[k] = gather(v)[0]
        else:
            v *= share if k.startswith('full/') else .5
            torch.distributed.all_reduce(v)
    if rank == 0: torch.save(mine, out/'found.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    both = [subprocess.Popen([sys.executable, __file__, str(r), str(tmp_path)], stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    for p in both: assert p.wait(300) == 0, p.stderr.read()[-3000:]
    two, (n, one) = torch.load(tmp_path/'found.pt', weights_only=True), found(slice(0, 12))
    assert two.keys() == one.keys() and torch.equal(two['first'], one['first']) and torch.equal(two['candidates'], one['candidates'])
    assert one['candidates'].tolist() == [14, 13, 13, 14]*3, 'neighbours in time are no negatives'
    for k in one: torch.testing.assert_close(two[k].double(), one[k].double(), rtol=0, atol=1e-6)
    (n0, a), (n1, b) = (found(slice(6*r, 6*r+6)) for r in (0, 1))
    assert (n0, n1, n) == (10, 23, 33), 'padding differs between the processes'
    assert abs((n0*a['full/'] + n1*b['full/'])/n - one['full/']) > .1, 'without the gather it would have been another loss'


def test_ends_of_episodes_are_not_learnt():
    "What stands behind an end changes nothing for its own context, in value or gradient; and the length of a chunk does not tell the right one from the others"
    h, a, hidden, seed, *_ = batch()
    net, other = make(), torch.where(cut[...,None], a, 9.)
    def of(a):
        c = energy_loss(partial(net.score, net.contexts(h, hidden)), a, seed, 3, valid=cut, exclude=torch.ones(12, 12, dtype=torch.bool))[0]
        return c, *torch.autograd.grad(c.sum(), net.parameters())
    for x,y in zip(of(a), of(other), strict=True): torch.testing.assert_close(x, y, rtol=0, atol=2e-5)
    same = a[:1].expand(12, -1, -1)    # all chunks alike, their lengths not: every energy of a row is the same
    e = net.score(net.contexts(h, hidden), same[None], cut[:,None])
    assert (e - e[:,:1]).abs().max() < 1e-6
    whole = energy_loss(partial(net.score, net.contexts(h, hidden)), a, seed, 3)[0]
    told = energy_loss(partial(net.score, net.contexts(h, hidden)), a, seed, 3, valid=torch.ones_like(cut))[0]
    torch.testing.assert_close(whole, told, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('form', forms)
def test_swaps_are_what_pairs_say(form):
    h,a,hidden,*_ = batch()
    net = make(form).eval()
    E = net.swaps(h, a, hidden)
    slow = torch.stack([net(h, a[j:j+1].expand(12, -1, -1), hidden)[:,0] for j in range(12)], 1)
    torch.testing.assert_close(E, slow, rtol=1e-5, atol=1e-6)
    loss,pos,neg = energy_inbatch_swap_infonce(net, h, a, hidden)
    off = ~torch.eye(12, dtype=torch.bool)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(-E/.5, torch.arange(12)))
    torch.testing.assert_close(pos, E.diagonal().mean())
    torch.testing.assert_close(neg, E[off].mean())


def test_parameters_have_the_published_names():
    names = set(make('published').state_dict())
    assert {k.split('.')[0] for k in names} == {'cross', 'state_linear', 'action_linear', 'prediction_head'} and 'prediction_head.mlp_resnet_blocks.1.ffn.1.weight' in names
    for k in ('next day', '2026'): make(k).load_state_dict(make('published').state_dict())


def test_the_published_form_is_blind_to_size_and_shift_and_ours_is_not():
    h,a,hidden,*_ = batch(dims=7)
    for form in ('published', 'next day', '2026'):
        net = make(form, dims=7).eval()
        assert (net(h, 2*a+.3, hidden) - net(h, a, hidden)).abs().max() < 1e-5
    net = make(dims=7).eval()
    assert (net(h, 2*a+.3, hidden) - net(h, a, hidden)).abs().max() > 1e-2


def test_dropout_works_in_training_alone():
    h,a,hidden,*_ = batch()
    net = make(dropout=.2)
    assert not torch.equal(net(h, a, hidden), net(h, a, hidden))
    net.eval()
    assert torch.equal(net(h, a, hidden), net(h, a, hidden))


def test_the_floor_of_a_bounded_energy():
    for n,want in ((8, .12), (24, .35), (64, .77)): assert abs(bounded_floor(n) - want) < .006
    best = torch.full((24, 24), 2.1).fill_diagonal_(.1)
    assert abs(info_nce(best, torch.arange(24), tau=.5).loss.mean().item() - bounded_floor(24)) < 1e-5


def test_a_context_alone_needs_local_negatives():
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match='expected at least two chunks'): info_nce(torch.zeros(1, 1), one)
    h,a,hidden,*_ = (x[:1] for x in batch())
    with pytest.raises(ValueError, match='local negatives'): energy_inbatch_swap_infonce(make(), h, a, hidden)
    c = info_nce(torch.zeros(1, 1), one, torch.zeros(1, 3))
    assert abs(c.loss.item() - math.log(4)) < 1e-6 and c.negative.item() == 0


def test_rows_with_nothing_to_see_are_refused():
    h,a,hidden,*_ = batch()
    hidden[4] = True
    with pytest.raises(ValueError, match='none in row 4; True means hidden'): make().swaps(h, a, hidden)


def test_contrast_against_the_slow_way():
    g = torch.Generator().manual_seed(3)
    swap, near, out = torch.randn(5, 9, generator=g), torch.randn(5, 4, generator=g), torch.rand(5, 9, generator=g) < .3
    at, tau = torch.tensor([2, 0, 8, 4, 4]), torch.tensor(.7)
    c = info_nce(swap, at, near, tau, out)
    for i in range(5):
        rest = [swap[i,j] for j in range(9) if j != at[i] and not out[i,j]]
        every = torch.stack([swap[i,at[i]], *rest, *near[i]])
        torch.testing.assert_close(c.loss[i], -(-every/tau).log_softmax(0)[0])
        torch.testing.assert_close(c.negative[i], torch.stack(rest).mean())
        p = (-every[1:]/tau).softmax(0)
        torch.testing.assert_close(c.effective[i], (-(p*p.log()).sum()).exp())
        assert c.candidates[i] == len(every) and bool(c.first[i]) == bool((every[0] < every[1:]).all())
    assert not any(v.requires_grad for v in c.summary().values())


def test_collapse_shows():
    good, flat = torch.full((8, 8), 5.).fill_diagonal_(0.), torch.full((8, 8), 1e-3)
    a, b = (info_nce(x, torch.arange(8)).summary() for x in (good, flat))
    assert a['learnt'] > .9 and a['gap'] == 5 and a['top1'] == 1
    assert abs(b['learnt']) < 1e-5 and abs(b['loss'] - math.log(8)) < 1e-5 and b['gap'] == 0 and b['top1'] == 0 and abs(b['effective']-7) < 1e-4


def test_negatives_nearby():
    a, seed = torch.rand(4, 6, 3), torch.tensor([5, 6, 7, 8])
    near = local_negatives(a, seed, 4, .1)
    assert torch.equal(near[2:3], local_negatives(a[2:3], seed[2:3], 4, .1)), 'whoever else is in the batch'
    assert not torch.equal(near, local_negatives(a, seed+1, 4, .1))
    scaled = local_negatives(torch.zeros(1000, 6, 3), torch.arange(1000), 2, torch.tensor([.1, .4]))
    assert abs(scaled[:,0].std() - .1) < 5e-3 and abs(scaled[:,1].std() - .4) < .02
    assert (scaled[:,0].mean(1).std() > .06), 'partly the same at all steps'


def test_the_field_term_makes_a_bowl():
    torch.manual_seed(0)
    h, a, hidden, seed, *_ = (x[:4] for x in batch())
    net = make(width=32)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for step in range(200):
        ctx = net.contexts(h, hidden)
        loss = gradient_field(lambda x: net.score(ctx, x, twice=True), a, local_negatives(a, seed+4*step, 4, .2), k=10., sigma=.2).mean()
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert abs(losses[0] - 1) < .3 and sum(losses[-20:])/20 < .5, 'a flat landscape costs 1'
    net.eval()
    ctx = net.contexts(h, hidden)
    off = local_negatives(a, seed+9999, 1, .15)[:,0]
    better,fell = refine(lambda x: net.score(ctx, x), off, radius=.3)
    assert (fell >= 0).all() and (better-a).square().mean() < .6*(off-a).square().mean()


def test_the_policys_own_chunk_is_always_a_candidate():
    chunks, E = torch.rand(3, 4, 2, 2), torch.tensor([[1., .95, 2., 3.], [1., torch.nan, torch.inf, .5], [torch.nan]*4])
    assert best_of(E, chunks, .1)[1].tolist() == [0, 3, 0]
    chunks[0,1] = torch.nan
    assert best_of(E, chunks)[1].tolist() == [0, 3, 0]


def test_same_chunk_and_same_moment():
    a = torch.rand(3, 4, 2)
    assert same_chunk(a, a, .01).equal(torch.eye(3, dtype=torch.bool))
    assert same_moment(torch.tensor([1]), torch.tensor([5]), torch.tensor([1, 1, 2]), torch.tensor([8, 10, 5]), 5).tolist() == [[True, False, False]]


def test_no_gradient_enters_the_contexts():
    h,a,hidden,*_ = batch()
    h.requires_grad_()
    energy_inbatch_swap_infonce(make(), h, a, hidden)[0].backward()
    assert h.grad is None


def test_one_switched_neighbour_leaves_no_field():
    "Its only neighbour is the switched one, at which no slope is asked for: contrast alone"
    from vla_nb.objectives.info_nce import energy_loss
    def score(a, valid=None, twice=False): return a.square().mean((-2, -1)).expand(4, -1) if len(a) == 1 else a.square().mean((-2, -1))
    each,_ = energy_loss(score, torch.rand(4, 3, 2), torch.arange(4), negatives=1, switches=(1,))
    assert each.shape == (4,) and each.isfinite().all()


if __name__ == '__main__': work(int(sys.argv[1]), Path(sys.argv[2]))
