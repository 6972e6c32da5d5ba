"""Hume: released names at their real sizes, the recorded value head, and what the pages say in prose about clocks, gradients and memory."""
import json
from dataclasses import replace
from pathlib import Path

import pytest, torch

from vla_nb.any_source import small_demonstrations
from vla_nb.core import Observation
from vla_nb.data.loader import Loader
from vla_nb.data.stats import compute_stats
from vla_nb.data.windows import Windows
from vla_nb.objectives.candidates import hume_sample, ramp, ramp_hume, tempered_sample
from vla_nb.policies.hume import Hume, HumeSystem2, start_hume
from vla_nb.policies.hume_config import FAST, SLOW, HumeConfig, check_ages, hume_base
from vla_nb.policies.hume_released import FastSize, System1, account, bare, load_value_policy, value_policy_weights
from vla_nb.policies.pi_released import Pi, PiSize
from vla_nb.policies.value_head import ValueHead, ValueSettings
from vla_nb.replay.recording import Recording
from vla_nb.replay.value_head import head_like, value_head

fixtures = Path(__file__).parent/'fixtures'
keys = json.loads((fixtures/'openpi_keys.json').read_text())
UNUSED = 'value_query_head.vqh_backbone.gemma_expert.'


# --- names

def linear(name, o, i, bias=True): return {f'{name}.weight': (o, i)} | ({f'{name}.bias': (o,)} if bias else {})

def gemma(name, depth, width, hidden, heads, head_dim):
    out = {f'{name}.norm.weight': (width,)}
    for i in range(depth):
        l = f'{name}.layers.{i}.'
        for k,(o,n) in dict(q=(heads*head_dim, width), k=(head_dim, width), v=(head_dim, width), o=(width, heads*head_dim)).items(): out |= linear(f'{l}self_attn.{k}_proj', o, n, False)
        for k,(o,n) in dict(gate=(hidden, width), up=(hidden, width), down=(width, hidden)).items(): out |= linear(f'{l}mlp.{k}_proj', o, n, False)
        out |= {f'{l}{k}_layernorm.weight': (width,) for k in ('input', 'post_attention')}
    return out

def dino(name, depth, width, patch, side):
    out = {f'{name}.embeddings.cls_token': (1, 1, width), f'{name}.embeddings.mask_token': (1, width), f'{name}.embeddings.position_embeddings': (1, (side//patch)**2+1, width),
        f'{name}.embeddings.patch_embeddings.projection.weight': (width, 3, patch, patch), f'{name}.embeddings.patch_embeddings.projection.bias': (width,)}
    norm = lambda n: {f'{n}.weight': (width,), f'{n}.bias': (width,)}
    for i in range(depth):
        l = f'{name}.encoder.layer.{i}.'
        for k in ('attention.attention.query', 'attention.attention.key', 'attention.attention.value', 'attention.output.dense'): out |= linear(l+k, width, width)
        out |= linear(f'{l}mlp.fc1', 4*width, width) | linear(f'{l}mlp.fc2', width, 4*width) | norm(f'{l}norm1') | norm(f'{l}norm2')
        out |= {f'{l}layer_scale{j}.lambda1': (width,) for j in (1, 2)}
    return out | norm(f'{name}.layernorm')

def value(dims, actor, critic, layer_norm):
    v = 'value_query_head.'
    out = {f'{v}query_embedding': (2048,), f'{v}calql.temperature.multiplier': ()} | gemma(f'{v}vqh_backbone.gemma_expert.model', 4, 2048, 4096, 8, 256)
    def mlp(name, sizes):
        d = {}
        for i,(a,b) in enumerate(zip(sizes, sizes[1:])):
            at = i*(3 if layer_norm else 2)
            d |= linear(f'{name}.layers.{at}', b, a)
            if layer_norm: d |= {f'{name}.layers.{at+1}.{k}': (b,) for k in ('weight', 'bias')}
        return d
    out |= mlp(f'{v}calql.policy.network', (2048, *actor)) | linear(f'{v}calql.policy.mean_layer', dims, actor[-1]) | linear(f'{v}calql.policy.std_layer', dims, actor[-1])
    for c in ('critics', 'target_critics'):
        for e in (0, 1): out |= mlp(f'{v}calql.{c}.networks.{e}', (2048+dims, *critic))
        out |= linear(f'{v}calql.{c}.output_layer', 1, critic[-1])
    return out

def older(k): # A name of openpi's in the layout of transformers before 4.52
    k = k.replace('paligemma.lm_head', 'paligemma.language_model.lm_head').replace('paligemma.model.language_model.', 'paligemma.language_model.model.')
    return k.replace('paligemma.model.', 'paligemma.')

def flow_policy(which, prefix, old): # Names and shapes of openpi's own checkpoint, without the expert's vocabulary
    return {prefix + (older(k) if old else k): tuple(s) for k,s in keys[which].items() if 'gemma_expert.lm_head' not in k and 'embed_tokens' not in k}

def shapes(w): return {k: tuple(v.shape) for k,v in w.items()}


def test_released_hume_has_these_names_and_shapes():
    with torch.device('meta'): parts = dict(pi=Pi(PiSize(False)), fast=System1(FastSize()), value=ValueHead(2048, 7, 32, hume_base().value))
    f, s = 's1_model.fast_visuo_expert.', 's1_model.'
    want = flow_policy('pi0', 's2_model.', True) | dino(f'{f}vision_tower', 12, 384, 14, 518) | linear(f'{f}multi_modal_projector', 512, 384) | gemma(f'{f}gemma_expert.model', 13, 512, 2048, 8, 128)
    want |= linear(f'{s}state_proj', 512, 32) | linear(f'{s}action_in_proj', 512, 32) | linear(f'{s}action_out_proj', 32, 512) | linear(f'{s}action_time_mlp_in', 512, 1024) | linear(f'{s}action_time_mlp_out', 512, 512)
    want |= value(7, (256, 256), (256, 256), False)
    w = value_policy_weights(parts)
    assert shapes(w) == want
    assert account(parts, w | {f'{UNUSED}lm_head.weight': torch.empty(257_152, 2048, device='meta')}).ok
    count = {k: sum(p.numel() for p in m.parameters()) for k,m in parts.items()}
    assert count['pi'] == sum(torch.Size(v).numel() for v in flow_policy('pi0', '', False).values())
    assert sum(p.numel() for p in parts['fast'].eyes.parameters()) == 22_056_576 and 138e6 < sum(p.numel() for p in parts['value'].trunk.parameters()) < 139e6
    half = {k for k,v in w.items() if v.dtype == torch.bfloat16}
    assert 'value_query_head.query_embedding' in half and 's2_model.action_in_proj.weight' not in half and 'value_query_head.vqh_backbone.gemma_expert.model.norm.weight' not in half


def test_released_comet_has_these_names_and_shapes():
    c = ValueSettings(depth=4, hidden=4096, heads=8, head_dim=256, hume=True, state_token=False, shared_head=True, actor_hidden=(512, 512, 256), critic_hidden=(1024, 512, 256))
    with torch.device('meta'): parts = dict(pi=Pi(PiSize()), value=ValueHead(2048, 736, 32, c))
    w = value_policy_weights(parts, 'Comet')
    assert shapes(w) == flow_policy('pi05', 'pi0_model.', False) | value(736, (512, 512, 256), (1024, 512, 256), True)
    assert account(parts, w).layout.name == 'Comet'


def test_the_recorded_list_of_names_is_ours_to_the_type():
    rec = Recording(fixtures/'value_head.pt')
    want = {}
    for line in rec['meta/hume_state_dict_keys'].splitlines():
        name, shape, dtype = line.split(' ')[0], line[line.index('('):line.rindex(')')+1], line.split(' ')[-1]
        want[name] = eval(shape), getattr(torch, dtype.removeprefix('torch.'))
    head = head_like(rec.under('head_fp32/state_dict'), dict(head_dim=8, n_actions=3))
    ours = {k.removeprefix('value_query_head.'): (tuple(v.shape), v.dtype) for k,v in value_policy_weights(dict(value=head)).items()}
    aside = {'paligemma_with_expert.emb', 'vqh_backbone.gemma_expert.model.embed_tokens.weight', 'vqh_backbone.gemma_expert.lm_head.weight'}
    assert {k: v for k,v in want.items() if k not in aside} == ours


@pytest.mark.parametrize('run', ['head_fp32', 'head_bf16'])
def test_the_recorded_head_is_replayed(run):
    rows = list(value_head(Recording(fixtures/'value_head.pt'), run))
    assert len(rows) > 50 and not [r for r in rows if not r.ok]


# --- the policy

LITTLE = HumeConfig(replace(SLOW, width=32, hidden=48, expert_width=24, expert_hidden=32, depth=2, head_dim=16, vision_width=24, vision_depth=1, vision_hidden=32, patch=8, image=16),
    replace(FAST, width=32, hidden=48, eyes_width=24, eyes_depth=1, patch=8, eyes_image=16), ValueSettings(2, depth=1, hidden=32, head_dim=16, actor_hidden=(16,), critic_hidden=(16,), value_warmup=0),
    horizon=4, fast_horizon=2, replan=2, slow_replan=4)
source = small_demonstrations(2)
windows = Windows(source, 4)
stats, texts, seed = compute_stats(windows), ['go left', 'go right'], torch.tensor([3, 4])

def make(cls=Hume, **kw): return cls.from_data(replace(LITTLE, **kw), texts, stats).eval()
def looks(cameras=1): return Observation(torch.randint(0, 255, (2, cameras, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 2), texts)


def test_a_prefix_before_all_names_and_a_partial_file():
    a = make()
    parts = dict(pi=a.pi, value=a.value)
    with pytest.raises(ValueError, match='state_token=False'): load_value_policy(parts, {})
    w = value_policy_weights(dict(pi=a.pi, fast=a.fast))
    assert bare({f'module.policy.{k}': v for k,v in w.items()}).keys() == w.keys() == bare(w).keys()


def test_both_stages_go_through_the_ordinary_loop(tmp_path):
    from vla_nb.train.config import TrainConfig
    from vla_nb.train.loop import train
    cfg = TrainConfig(steps=2, batch_size=4, warmup=1, progress=False, ema=0.)
    for cls in (HumeSystem2, Hume):
        policy = make(cls, candidates=2)
        if cls is Hume: assert '174 tensors' in start_hume(policy, HumeSystem2.from_pretrained(last))
        w, before = policy.windows(windows), {k: v.clone() for k,v in policy.state_dict().items()}
        train(policy, lambda start, rank, world: Loader(w, 4, policy.prepare, size=(16, 16), start_step=start), cfg, tmp_path/cls.name)
        last = max((tmp_path/cls.name).glob('*/config.json')).parent
        moved = {k.split('.')[0] for k,v in cls.from_pretrained(last).state_dict().items() if not torch.equal(v, before[k])}
        assert moved == ({'pi'} if cls is HumeSystem2 else {'fast', 'value'})


def test_the_slow_critics_follow_and_are_in_no_optimiser():
    policy = make()
    targets = [g for g in policy.groups() if g.name == 'targets'][0]
    assert not targets.trainable and all(not p.requires_grad for p in targets.params.values())
    with torch.no_grad(): policy.value.critics.heads[0].bias += 1
    gap = lambda: (policy.value.critics.heads[0].bias-policy.value.target_critics.heads[0].bias).item()
    before = gap()
    policy.after_step(1)
    assert 0 < gap() < before


def test_a_camera_that_is_missing_changes_nothing_but_itself():
    policy = make(cameras=2)
    two = looks(2)
    lacks = replace(two, seen=torch.tensor([[True, False], [True, False]]))
    other = replace(lacks, images=lacks.images.clone())
    other.images[:,1] = 7
    assert torch.allclose(policy.act(lacks, seed=seed).action, policy.act(other, seed=seed).action, atol=1e-5)
    assert not torch.allclose(policy.act(two, seed=seed).action, policy.act(lacks, seed=seed).action, atol=1e-3)


def test_system1_looks_again_while_the_plan_stays():
    policy = make(history=2)
    a, b = looks(), looks()
    b.images[:] = 255-b.images
    policy.act(a, seed=seed, robots=['x', 'y'])
    plan = policy.memory['x'].chunk.clone()
    second = policy.act(b, seed=seed, robots=['x', 'y']).action
    assert torch.equal(policy.memory['x'].chunk, plan)
    policy.forget()
    policy.act(a, seed=seed, robots=['x', 'y'])
    assert not torch.allclose(second, policy.act(a, seed=seed, robots=['x', 'y']).action, atol=1e-4)


def test_softmax_choice_belongs_to_the_seed():
    policy = make(value=replace(LITTLE.value, beta=1.))
    obs = looks()
    assert torch.equal(policy.act(obs, seed=seed).action, policy.act(obs, seed=seed).action)
    other = make(value=replace(LITTLE.value, beta=100.))
    picks = {tuple(other.act(obs, seed=torch.tensor([i, i])).action[0].flatten().tolist()) for i in range(4)}
    assert len(picks) == 4


def test_the_callers_noise_and_the_upper_bound():
    model, noise = (lambda x, tau: x), torch.randn(3, 2, 2)
    kept = noise.clone()
    for f in (hume_sample, tempered_sample): f(model, noise, torch.tensor([1., .96, .92]), torch.ones(3), 5)
    assert torch.equal(noise, kept)
    assert ramp_hume(5, 0., 1.).max() < 1 and ramp(5, 0., 1.).tolist()[-1] == 1 and ramp(1, .3, 1.).tolist() == pytest.approx([.3])


@pytest.mark.parametrize('bad, why', [(dict(slow_replan=3), 'multiple of replan=2'), (dict(fast_horizon=1), 'at least replan=2'), (dict(fast_horizon=3), 'expected at least 5'),
    (dict(history=0), '1 or 2'), (dict(theta1=0.), 'theta1'), (dict(candidates=0), 'candidates'), (dict(slow=PiSize()), 'slow.pi05')])
def test_settings_that_cannot_be_carried_out(bad, why):
    with pytest.raises(ValueError, match=why): replace(LITTLE, **bad)


def test_ages_that_training_never_shows():
    with pytest.raises(ValueError, match=r'would meet \[4\]'): check_ages(replace(LITTLE, horizon=6, slow_replan=6))
    with pytest.raises(ValueError, match='cut them with policy.windows'): make().loss(next(iter(Loader(windows, 4, make().prepare, size=(16, 16)))))


def test_another_run_is_refused():
    with pytest.raises(ValueError, match='hume_system2 or hume'): start_hume(make(), Path('released'))
    with pytest.raises(ValueError, match='same sizes'): start_hume(make(), make(fast=replace(LITTLE.fast, hidden=64)))
