"π0.5's ways to be trained: which tensors learn, rows with gaps, adapters, averages of the weights."
from dataclasses import replace

import pytest, torch

from test_pi import awake, data, grads, look, stats  # noqa: F401
from vla_nb.core import Samples
from vla_nb.policies.pi05 import Pi05
from vla_nb.policies.pi_config import Pi05Config
from vla_nb.policies.pi_lora import lora_layers
from vla_nb.policies.pi_modes import Pi05Expert, Pi05Flat, Pi05High, Pi05HighFast
from vla_nb.text.pi_prompt import SAID, SPOKEN
from vla_nb.train.config import TrainConfig
from vla_nb.train.ema import EMA
from vla_nb.train.optim import build_optimizer, check_groups

torch.set_num_threads(1)
classes = [Pi05, Pi05High, Pi05HighFast, Pi05Flat, Pi05Expert]


@pytest.fixture(scope='module')
def make(data, stats):
    "Policies of one tokenizer, with an expert that is not the identity"
    first = awake(data, stats)
    def make(cls=Pi05, **kw):
        p = cls(replace(first.config, **kw), stats, first.tokenizer).eval()
        own = dict(p.named_parameters())
        with torch.no_grad():
            for k,v in first.named_parameters():
                w = own[k if k in own else k.replace('.weight', '.base_layer.weight').replace('.bias', '.base_layer.bias')]
                if w.shape == v.shape: w.copy_(v)
        return p
    return make


def some(s, rows):
    "Rows of samples"
    pick = lambda x: None if x is None else x[rows] if isinstance(x, torch.Tensor) else [x[i] for i in rows]
    return Samples(*(pick(getattr(s, k)) for k in ('images', 'state', 'instruction', 'action', 'action_is_pad', 'seed', 'subtask')))


def learn(p, batch, steps=3, lr=1e-2):
    "A few optimiser steps as the trainer takes them; the averages of the weights"
    opt, ema = build_optimizer(p, TrainConfig(steps=steps, lr=lr, warmup=0)), EMA(p, .9)
    p.train()
    for _ in range(steps):
        p.loss(batch).total.backward()
        opt.step(); opt.zero_grad(); ema.update()
    return ema


@pytest.mark.parametrize('rank', [0, 2], ids=['full', 'lora'])
@pytest.mark.parametrize('cls', classes, ids=[c.name for c in classes])
def test_only_what_the_mode_names_moves(cls, rank, make, data, stats):
    p = make(cls, lora_rank=rank)
    before = {k: v.clone() for k,v in p.named_parameters()}
    ema = learn(p, p.prepare(data))
    moved = {k for k,v in p.named_parameters() if not torch.equal(v, before[k])}
    free = {k for g in p.groups() if g.trainable for k in g.params}
    assert moved and moved <= free and ema.shadow.keys() == free, 'averages cover what learns, and nothing else'
    assert all(('.lora_' in k) == bool(rank) for k in free)
    rests = [g.name for g in p.groups() if not any(k in moved for k in g.params)]
    assert set(p.still) <= set(rests)
    if rank: assert {'vision', 'language', 'expert'} <= set(rests)
    with ema.swapped(): assert any(not torch.equal(v, before[k]) for k,v in p.named_parameters() if k in free)


def test_the_expert_alone_keeps_no_graph_of_the_language_model(make, data, stats):
    p = make(Pi05Expert)
    check_groups(p, p.groups())
    b = p.prepare(data)
    hidden,kvs,valid,_ = p._read(b['images'], b['ids'], b['part'])
    assert hidden is None and not any(x.requires_grad for kv in kvs for x in kv)
    _,whole,_,_ = Pi05._read(p, b['images'], b['ids'], b['part'])
    assert all(torch.allclose(x.transpose(1, 2)[valid], y.transpose(1, 2)[valid], atol=1e-6) for kv,kw in zip(kvs, whole) for x,y in zip(kv, kw))
    joint = Pi05Flat(replace(p.config, fast_weight=0.), stats, p.tokenizer).eval()
    joint.load_state_dict(p.state_dict())
    assert torch.allclose(p.loss(b).total, joint.loss(joint.prepare(data)).total, atol=1e-6)


def test_rows_go_where_their_labels_lead(make, data, stats):
    p = make(swap_instruction=1., state_noise=0.)
    gaps = replace(data, subtask=['it is left, move.', '', 'press it.', 'stop.'], action_is_pad=data.action_is_pad | torch.tensor([[False], [False], [False], [True]]))
    b = p.prepare(gaps)
    assert [(b['part'][i] == SAID).any().item() for i in range(4)] == [True, False, True, True]
    assert [(b['part'][i] == SPOKEN).any().item() for i in range(4)] == [True, True, False, False]
    assert b['learn'].tolist() == [False, True, False, False], 'a row without a subtask keeps its task, or its actions would come from nowhere'
    whole = [f() for f in p._terms(b)[:3]]
    parts = [[f() for f in p._terms(p.prepare(some(gaps, r)))[:3]] for r in ([0, 2], [1], [3])]
    for i,(mean,n) in enumerate(whole):
        ns = [q[i][1] for q in parts]
        assert sum(ns) == n and torch.allclose(sum(q[i][0]*k for q,k in zip(parts, ns))/n, mean, rtol=1e-5)
    assert not grads(p, 0, p.prepare(some(gaps, [1]))) and not grads(p, 2, p.prepare(some(gaps, [3])))
    p.train()
    assert p.loss(p.prepare(some(gaps, [1]))).total.isfinite() and p.loss(p.prepare(some(gaps, [3]))).total.isfinite()


def test_flat_is_the_joint_policy_without_subtasks(make, data, stats):
    flat, joint = make(Pi05Flat), make()
    a, b = flat.prepare(replace(data, subtask=None)), joint.prepare(replace(data, subtask=['']*4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(flat.loss(a).parts['flow'], joint.loss(b).parts['flow'])
    seed = torch.arange(4)
    assert flat.act(look(data), seed=seed).text is None
    given = flat.act(look(data), seed=seed, reasoning=['go']*4).action
    assert torch.equal(given, flat.act(look(data).say('go'), seed=seed).action), 'a subtask stands in the place of the task'


@pytest.mark.parametrize('cls', [Pi05, Pi05Expert], ids=['pi05', 'pi05_expert'])
def test_adapters_merge_and_are_saved(cls, make, data, stats, tmp_path):
    p, seed = make(cls, lora_rank=3, lora_alpha=6.), torch.arange(4)
    learn(p, p.prepare(data))
    p.eval()
    p.save_pretrained(tmp_path/'p')
    q = cls.from_pretrained(tmp_path/'p')
    go = ['go']*4
    a, b = (x.act(look(data), seed=seed, reasoning=go) for x in (p, q))
    assert torch.equal(a.action, b.action)
    c = q.merge_lora().act(look(data), seed=seed, reasoning=go)
    assert (c.action - a.action).abs().max() < 1e-5 and not any('lora' in k or 'base_layer' in k for k in q.state_dict())
    q.save_pretrained(tmp_path/'q')
    assert torch.equal(cls.from_pretrained(tmp_path/'q').act(look(data), seed=seed, reasoning=go).action, c.action)


def test_adapters_of_some_groups(make, data, stats):
    p = make(lora_rank=2, lora=('language',), frozen=('vision',))
    assert {g.name: g.trainable for g in p.groups()} == dict(vision=False, language=False, language_lora=True, expert=True)
    names = lora_layers(make().pi, ('expert',))
    assert {f'expert.time_mlp_{k}' for k in ('in', 'out')} <= set(names) and 'expert.gemma.layers.0.input_layernorm.dense' in names and 'expert.gemma.norm.dense' in names
    with pytest.raises(ValueError, match='lora'): make(lora_rank=2, lora=('eyes',))


def test_a_policy_that_does_not_act_by_flow_has_no_candidates(make, data, stats):
    with pytest.raises(ValueError, match='flow'): make(Pi05High).candidates(look(data), 2)
    with pytest.raises(ValueError, match='n: expected at least 1'): make().candidates(look(data), 0)


def test_a_policy_that_does_not_speak_takes_one_subtask_a_robot_and_no_list(make, data):
    for cls in (Pi05Flat, Pi05Expert):
        with pytest.raises(ValueError, match='reasoning: expected 4'): make(cls).act(look(data), reasoning=['go']*3)
        with pytest.raises(ValueError, match='among: expected None'): make(cls).act(look(data), among=['go'])


@pytest.mark.parametrize('wrong', [dict(draws=0), dict(sample_steps=0), dict(fast_weight=-.1), dict(alpha=-1.), dict(kv_heads=0), dict(heads=4, kv_heads=3), dict(patch=0), dict(image=30)], ids=str)
def test_settings_that_cannot_be_are_named(wrong):
    with pytest.raises(ValueError, match='|'.join(wrong)): Pi05Config(**wrong)
