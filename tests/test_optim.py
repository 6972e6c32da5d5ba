"Groups of parameters with settings of their own: one AdamW that is several optimisers"
import shutil
from dataclasses import replace

import pytest
import torch

from toy_policy import curve, deep, digest, loader, settings, several
from vla_nb.core import ParamGroup
from vla_nb.train.config import TrainConfig, load_config
from vla_nb.train.engine import check_deepspeed, clipped_together, scale_and_clip
from vla_nb.train.loop import train
from vla_nb.train.optim import build_optimizer, group_table, lr_factor, own_settings, set_lr
from vla_nb.train.track import read_log


def test_defaults_are_the_runs():
    "A group that says nothing gives the optimiser that there always was"
    cfg = settings(betas=(.8, .9), eps=1e-5, weight_decay=.3)
    for g in build_optimizer(deep(), cfg).param_groups:
        assert (g['betas'], g['eps'], g['alone'], g['delay']) == (cfg.betas, cfg.eps, False, 0)
        assert replace(g['own'], lr=cfg.lr, weight_decay=cfg.weight_decay) == cfg
    assert len(clipped_together(build_optimizer(deep(), cfg), cfg.clip)) == 1


def test_two_optimisers_in_one(tmp_path):
    "The group ends where an AdamW of its own ends, on the same gradients with the same clipping; it stands still first"
    cfg = settings(steps=12, ema=0., clip=.3)
    one, two = several(), several()
    theirs = [p for p in (two.embed.weight, *two.blocks.parameters())]
    decays = [dict(params=[p for p in theirs if (p.ndim > 1) == m], weight_decay=w) for m,w in ((True, .1), (False, 0.))]
    opt, own, rest = build_optimizer(one, cfg), torch.optim.AdamW(decays, lr=1., betas=(.9, .999), eps=1e-6), build_optimizer(two, cfg)
    rest.param_groups = [g for g in rest.param_groups if g['name'] != 'words']
    start = one.embed.weight.detach().clone()
    for k,b in zip(range(12), loader(8)(0, 0, 1)):
        for p in (one, two): p.zero_grad(); p.loss(b).total.backward()
        for ps,clip in clipped_together(opt, cfg.clip): scale_and_clip(ps, torch.ones(()), clip)
        torch.nn.utils.clip_grad_norm_(theirs, .05)
        torch.nn.utils.clip_grad_norm_([p for g in rest.param_groups for p in g['params']], .3)
        set_lr(opt, k, cfg), set_lr(rest, k, cfg)
        for g in own.param_groups: g['lr'] = 0. if k < 2 else 2*cfg.lr*min(1., (k-1)/2)
        opt.step(), own.step(), rest.step()
        assert torch.equal(one.embed.weight, start) == (k < 2)
    for (k,p),q in zip(one.named_parameters(), two.parameters()): assert (p-q).abs().max() < 1e-6, k


def test_a_run_with_several_goes_on_bit_for_bit(tmp_path):
    whole, part, cfg = tmp_path/'whole', tmp_path/'part', settings(clip=.3, keep=0)
    train(several(), loader(8), cfg, whole)
    shutil.copytree(whole, part)
    for s in (20, 25, 30): shutil.rmtree(part/f'checkpoint-{s:06d}')
    train(several(seed=3), loader(8), cfg, part, resume=True)
    assert curve(read_log(whole/'log.jsonl')) == curve(read_log(part/'log.jsonl'))
    assert digest(whole/'checkpoint-000030') == digest(part/'checkpoint-000030')


def test_the_logged_norm_is_of_all(tmp_path):
    "Whichever way they are clipped: the first step's norm is the same"
    for make in (several, deep): train(make(), loader(8), settings(steps=5), tmp_path/make.__name__)
    a,b = (read_log(tmp_path/d/'log.jsonl')[0]['grad_norm'] for d in ('several', 'deep'))
    assert abs(a-b) < 1e-5*b


def test_what_is_a_groups_own_is_in_the_table():
    rows = group_table(several(), settings()).splitlines()
    assert [r for r in rows if 'words' in r][0].endswith("betas (0.9, 0.999), eps 1e-06, schedule constant, warmup 2, clip 0.05, delay 2")
    assert group_table(deep(), settings()).splitlines()[0].endswith('weight decay')


@pytest.mark.parametrize('kw, says', [(dict(warmup=90), 'groups: x: warmup: expected fewer than steps=80'), (dict(delay=200), 'groups: x: steps'), (dict(clip=-1.), 'groups: x: clip')])
def test_nonsense_names_its_group(kw, says):
    with pytest.raises(ValueError, match=says): own_settings(ParamGroup('x', {}, **dict(delay=20) | kw), TrainConfig(steps=100, warmup=0))


def test_deepspeed_refuses_a_clip_of_a_groups_own():
    with pytest.raises(ValueError, match='groups: words: clip: expected None under DeepSpeed'):
        check_deepspeed(dict(zero_optimization=dict(stage=2)), build_optimizer(several(), settings()), 1.)


def test_milestones_and_a_warm_up_from_a_tenth():
    "OpenVLA-OFT's schedule; its decay survives the warm-up"
    c = load_config(TrainConfig, None, dict(steps=150_000, warmup=1000, warmup_from=.1, schedule='multistep', milestones=[100_000, 120_000]))
    assert [lr_factor(k, c) for k in (-1, 0, 499, 999, 1000, 99_999, 100_000, 119_999)] == pytest.approx([0, .1009, .55, 1, 1, 1, .1, .1], rel=1e-12)
    assert lr_factor(120_000, c) == pytest.approx(.01)
