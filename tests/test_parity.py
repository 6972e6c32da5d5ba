"""Parity: recordings of the originals are replayed, and spoilt copies of them are refused.

`fixtures/film.pt` and `fixtures/dexvla_dataset.pt` are recordings as they are. In the `…_seeded.pt` the weights (up to 24 MB)
are replaced by the seed that made them: `seeded_weights` gives them back bit for bit. The recordings of other sizes are made
here, by our own modules: they show that parity follows a file's config and shapes, not that we equal the original at those sizes.
"""
from pathlib import Path

import pytest, torch
from einops import rearrange, reduce, repeat

from vla_nb import parity as P
from vla_nb.core import masked_mean
from vla_nb.heads.scaledp import PooledScaleDP, ScaleDP
from vla_nb.heads.unet1d import UNet1D, sin_cos_bf16
from vla_nb.layers.embed import sinusoid, sinusoid_bf16
from vla_nb.layers.film import FusionFiLM, windows_dexvla
from vla_nb.objectives.diffusion import ddim_path, squared_cosine
from vla_nb.replay import recording as R

fixtures = Path(__file__).parent/'fixtures'


@pytest.fixture
def original():
    "The original's recording, whole again"
    rec = torch.load(fixtures/'scaledp_seeded.pt', weights_only=True)
    for k in ('state_dict', 'state_dict_tinyvla'): rec[k] = R.seeded_weights(rec[k]['shapes'], rec[k]['seed'], std=.5)
    return rec


def saved(tmp_path, rec):
    torch.save(rec, tmp_path/'rec.pt')
    return tmp_path/'rec.pt'


def failed(path): return [r.name for r in P.check(path) if not r.ok]


def test_scaledp_equals_the_original(original, tmp_path, capsys):
    path = saved(tmp_path, original)
    rows = {r.name: r for r in P.check(path)}
    assert not [r for r in rows.values() if not r.ok]
    assert rows['sample/steps'].diff < 1e-5 and rows['y_fp32_bf16freq'].diff < 1e-5 and rows['y_tinyvla'].diff < 1e-5
    assert max(r.diff for n,r in rows.items() if 'grad' in n) < 1e-5 and rows['train/loss'].diff < 1e-6
    n = sum(n.startswith('train/grad_norms/') for n in rows)
    assert n == len(original['state_dict']), 'every parameter has its gradient compared'
    assert P.parity(path) and 'all within tolerance' in capsys.readouterr().out


def test_film_equals_the_original():
    rows = {r.name: r for r in P.check(fixtures/'film.pt')}
    assert not [r for r in rows.values() if not r.ok] and max(r.diff for r in rows.values()) < 1e-5
    for case in ('trap_no_answer_all_minus100', 'trap_evaluate_empty_reasoning', 'trap_pad_id_inside_prompt'):
        assert rows[f'{case}/y'].ok and rows[f'{case}: ours is finite'].ok


@pytest.mark.parametrize('name,at', [('pos_embed', 3), ('blocks.1.attn.qkv.weight', 0), ('blocks.2.mlp.fc2.bias', 5),
    ('t_embedder.mlp.0.weight', 7), ('final_layer.linear.weight', 1), ('blocks.0.adaLN_modulation.1.bias', 40)])
def test_one_changed_weight_fails(original, tmp_path, capsys, name, at):
    original['state_dict'][name].view(-1)[at] += .01
    path = saved(tmp_path, original)
    assert failed(path)
    assert not P.parity(path) and 'FAIL' in capsys.readouterr().out


def test_the_pooled_weights_count_too(original, tmp_path):
    original['state_dict_tinyvla']['norm_after_pool.bias'][0] += .01
    assert failed(saved(tmp_path, original)) == ['y_tinyvla']


def test_every_film_weight_counts(tmp_path):
    rec = torch.load(fixtures/'film.pt', weights_only=True)
    for w in rec['state_dict'].values():
        w.view(-1)[-1] += .01
        assert failed(saved(tmp_path, rec))
        w.view(-1)[-1] -= .01


def test_an_impossible_output_fails(tmp_path):
    "The case whose last hidden state is not recorded is checked all the same"
    rec = torch.load(fixtures/'film.pt', weights_only=True)
    rec['evaluate_if_last_hidden_kept']['y'][0,0,0] += .2
    assert failed(saved(tmp_path, rec)) == ['evaluate_if_last_hidden_kept/y']


def test_no_tensor_is_skipped(original, tmp_path):
    original['activations']['block7'] = torch.ones(2)
    original['more'] = {'y': torch.ones(1)}
    assert failed(saved(tmp_path, original)) == ['activations/block7: nothing read it', 'more/y: nothing read it']


def test_a_smaller_recording_is_enough(original, tmp_path):
    "A user's own dump may hold predictions alone; what it holds is compared"
    rec = {k: original[k] for k in ('kind', 'config', 'inputs', 'state_dict', 'y_fp32_bf16freq')}
    rec['inputs'] = {k: rec['inputs'][k] for k in ('x', 't', 'cond', 'states')}
    assert [r.name for r in P.check(saved(tmp_path, rec)) if r.ok] == ['y_fp32_bf16freq']
    del rec['y_fp32_bf16freq']
    with pytest.raises(ValueError, match='found none'): P.check(saved(tmp_path, rec))


def test_what_cannot_be_replayed_is_refused(original, tmp_path):
    del original['train']['noise']
    with pytest.raises(ValueError, match='train/noise'): P.check(saved(tmp_path, original))
    original['config']['n_emb'] = 52
    with pytest.raises(ValueError, match=r'pos_embed: expected \(1, 10, 52\), found \(1, 10, 48\)'): P.check(saved(tmp_path, original))
    with pytest.raises(ValueError, match='kind'): P.check(saved(tmp_path, {'state_dict': {}}))
    (tmp_path/'rec.pt').write_bytes(b'PK\3\4 cut off')
    with pytest.raises(ValueError, match='weights_only'): P.check(tmp_path/'rec.pt')
    with pytest.raises(FileNotFoundError): P.check(tmp_path/'none.pt')


def record_scaledp(seed, b, a, p, d, horizon, n, depth, heads, mlp_ratio, draws, train_steps, steps, combine=32):
    "A recording of our own head, at any size"
    args = dict(action_dim=a, state_dim=p, cond_dim=d, horizon=horizon, width=n, depth=depth, heads=heads, mlp_ratio=mlp_ratio, combine_width=combine)
    head, pooled, f32 = ScaleDP(**args, encode_time=sinusoid_bf16), PooledScaleDP(**args, encode_time=sinusoid_bf16), ScaleDP(**args)
    ws = [R.seeded_weights({k: v.shape for k,v in m.named_parameters()}, seed+i, std=.5) for i,m in enumerate((head, pooled))]
    for m,w in zip((head, pooled, f32), (*ws, ws[0])): m.load_state_dict(w)
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)
    i = dict(x=r(b, horizon, a), t=torch.randint(0, train_steps, (b,), generator=g), cond=r(b, 1, d), states=r(b, p), tokens=r(b, 5, d),
        actions=r(b, horizon+3, a).clamp(-1, 1), noise0=r(2, horizon, a), is_pad=torch.arange(horizon+3).expand(b, -1) > horizon-2)
    cond, c2 = i['cond'][:,0], (i['cond'][:2,0], i['states'][:2])
    sch, out, parts = squared_cosine(train_steps), {}, {'combine': head.combine, 't_emb': head.t_embedder, 'block0': head.blocks[0]}
    hooks = [m.register_forward_hook(lambda m, x, y, k=k: out.__setitem__(k, y.detach())) for k,m in parts.items()]
    with torch.no_grad():
        rec = dict(kind='scaledp', inputs=i, state_dict=ws[0], state_dict_tinyvla=ws[1], y_fp32_bf16freq=head(i['x'], i['t'], cond, i['states']), activations=dict(out))
        for h in hooks: h.remove()
        rec |= dict(y_fp32_fp32freq=f32(i['x'], i['t'], cond, i['states']), y_scalar_t42=head(i['x'], torch.full((b,), 42), cond, i['states']),
            y_tinyvla=pooled(i['x'], i['t'], i['tokens'], i['states']), sinusoid_bf16=sinusoid_bf16(torch.arange(train_steps), 64), sinusoid_fp32=sinusoid(torch.arange(train_steps), 64))
        path = list(ddim_path(lambda x,t: head(x, t, *c2), sch, i['noise0'], steps))
        ab = sch.alpha_bar
        rec['sample'] = dict(actions=path[-1], steps=torch.stack(path), timesteps=torch.arange(train_steps-train_steps//steps, -1, -(train_steps//steps)),
            alphas_cumprod=ab, betas=1 - ab/torch.cat([torch.ones(1), ab[:-1]]))
    rec['config'] = dict(depth=depth, n_emb=n, num_heads=heads, mlp_ratio=mlp_ratio, action_dim=a, state_dim=p, cond_dim=d, prediction_horizon=horizon,
        noise_samples=draws, num_train_timesteps=train_steps, num_inference_timesteps=steps)
    noise, t, x0, ok = r(draws, b, horizon, a), i['t'], i['actions'][:,:horizon], ~i['is_pad'][:,:horizon]
    noisy = torch.cat([sch.add_noise(x0, e, t) for e in noise])    # the original's order: noise by noise
    pred = head(noisy, t.repeat(draws), cond.repeat(draws, 1), i['states'].repeat(draws, 1))
    sq = reduce((pred - rearrange(noise, 'k b t a -> (k b) t a'))**2, '(k b) t a -> b t a', 'mean', k=draws)
    loss = (sq*ok[...,None]).mean()
    loss.backward()
    grad = {k: v.grad for k,v in head.named_parameters()}
    rec['train'] = dict(noise=noise, timesteps=t, noisy_actions=noisy, loss=loss.detach(), loss_valid_mean=masked_mean(sq, ok)[0].detach(),
        grad_norms={k: v.norm() for k,v in grad.items()}, grad_final=grad['final_layer.linear.weight'], grad_qkv0=grad['blocks.0.attn.qkv.weight'])
    i16 = [v.bfloat16() for v in (i['x'], cond, i['states'])]
    with torch.no_grad(): rec['y_bf16'] = head.bfloat16()(i16[0], i['t'], *i16[1:])
    return rec


@pytest.mark.parametrize('sizes', [dict(seed=7, b=3, a=4, p=9, d=20, horizon=6, n=24, depth=2, heads=3, mlp_ratio=2., draws=1, train_steps=50, steps=5),
    dict(seed=8, b=5, a=14, p=14, d=64, horizon=16, n=64, depth=4, heads=8, mlp_ratio=4., draws=4, train_steps=100, steps=10, combine=128)])
def test_other_sizes_are_followed(sizes, tmp_path):
    rec = record_scaledp(**sizes)
    assert not failed(saved(tmp_path, rec))
    rec['state_dict']['cond_obs_emb.bias'][0] += .01
    assert failed(saved(tmp_path, rec))


@pytest.mark.parametrize('d', [8, 40])
def test_film_of_other_widths(d, tmp_path):
    fuse, g = FusionFiLM(d), torch.Generator().manual_seed(d)
    w = R.seeded_weights({k: v.shape for k,v in fuse.named_parameters()}, d)
    fuse.load_state_dict(w)
    ids, hidden = torch.arange(100, 111).repeat(4, 1), torch.randn(4, 11, d, generator=g, requires_grad=True)
    ids[1,:3] = 151643
    labels = torch.where(torch.arange(11) < torch.tensor([[4], [7], [10], [11]]), -100, ids)
    y = torch.stack([FusionFiLM.forward(fuse, hidden[i:i+1], *(m[i:i+1] for m in windows_dexvla(ids, labels)))[0] for i in range(3)])
    y.square().sum().backward()
    case = dict(input_ids=ids[:3], labels=labels[:3], hidden_states=hidden[:3].detach(), y=y[:,None].detach(), grad_hidden=hidden.grad[:3],
        grads={k: v.grad for k,v in fuse.named_parameters()})
    rec = dict(kind='film', init_state_dict_film_is_zero=torch.tensor(True), state_dict=w, train=case)
    assert not failed(saved(tmp_path, rec))
    rec['init_state_dict_film_is_zero'] = torch.tensor(False)
    assert failed(saved(tmp_path, rec)) == ['init_state_dict_film_is_zero']


@pytest.fixture
def unet():
    "The original's recording, whole again"
    rec = torch.load(fixtures/'unet1d_seeded.pt', weights_only=True)
    rec['state_dict'] = R.seeded_weights(rec['state_dict']['shapes'], rec['state_dict']['seed'])
    return rec


def test_unet_equals_the_original(unet, tmp_path):
    rows = {r.name: r for r in P.check(saved(tmp_path, unet))}
    assert not [r for r in rows.values() if not r.ok] and max(r.diff for r in rows.values()) < 1e-5
    assert {'y', 'sample', 'sinusoid_bf16'} <= set(rows)


@pytest.mark.parametrize('name', ['norm_after_pool.bias', 'combine.weight', 'mid_modules.1.cond_encoder.1.bias', 'diffusion_step_encoder.3.weight',
    'up_modules.1.0.residual_conv.weight', 'up_modules.0.2.conv.weight', 'down_modules.0.2.conv.bias', 'final_conv.0.block.1.weight'])
def test_one_changed_unet_weight_fails(unet, tmp_path, name):
    unet['state_dict'][name].view(-1)[0] += .01
    assert 'y' in failed(saved(tmp_path, unet))


@pytest.mark.parametrize('widths,kernel,time_dim,horizon,a', [((8, 16), 3, 8, 6, 3), ((8, 8, 24, 16), 5, 12, 16, 9), ((16,), 5, 4, 5, 2)])
def test_unets_of_other_sizes(tmp_path, widths, kernel, time_dim, horizon, a):
    head = UNet1D(a, 4, 12, horizon, widths, time_dim, kernel, encode_time=sin_cos_bf16)
    w = R.seeded_weights({k: v.shape for k,v in head.named_parameters()}, 3)
    head.load_state_dict(w)
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    i = dict(x=r(3, horizon, a), t=torch.tensor([0, 5, 49]), cond=r(3, 1, 12), states=r(3, 4), noise0=r(2, horizon, a))
    with torch.no_grad():
        c = head.condition(i['cond'][:2,0], i['states'][:2])
        *_,sample = ddim_path(lambda x,t: head.denoise(x, t, c), squared_cosine(50), i['noise0'], 10)
        rec = dict(kind='unet1d', state_dict=w, inputs=i, y=head(i['x'], i['t'], i['cond'][:,0], i['states']), sample=sample, sinusoid_bf16=sin_cos_bf16(torch.arange(50), time_dim))
    assert not failed(saved(tmp_path, rec))
    rec['inputs']['noise0'][0,0,0] += .1
    assert failed(saved(tmp_path, rec)) == ['sample']


@pytest.fixture
def dataset(): return torch.load(fixtures/'dexvla_dataset.pt', weights_only=True)


def test_dataset_equals_the_original(dataset):
    rows = {r.name: r for r in P.check(fixtures/'dexvla_dataset.pt')}
    assert not [r for r in rows.values() if not r.ok] and max(r.diff for r in rows.values()) < 1e-6
    assert {f'sim{s}_delta{d}/{k}' for s in (0, 1) for d in (0, 1) for k in ('action', 'is_pad', 'state', 'image')} | {'stats/action_std'} <= set(rows)


@pytest.mark.parametrize('case,key,at', [('sim0_delta0', 'action', (3, 2, 0)), ('sim1_delta1', 'action', (20, 4, 3)), ('sim0_delta1', 'is_pad', (0, 0)),
    ('sim1_delta0', 'state', (5, 2)), ('sim0_delta0', 'image', (7, 1, 2, 3, 4)), ('sim1_delta1', 'reasoning', 4)])
def test_every_field_of_a_sample_counts(dataset, tmp_path, case, key, at):
    v = dataset[case][key]
    if key == 'reasoning': v[at] = 'another step'
    else: v[at] = v[at] + 1 if v.dtype == torch.uint8 else ~v[at] if v.dtype == torch.bool else v[at]*1.001 + .001
    assert failed(saved(tmp_path, dataset)) == [f'{case}/{key}']


def test_a_changed_episode_or_statistic_fails(dataset, tmp_path):
    dataset['stats']['action_min'][0] -= 1e-4    # the margin, forgotten
    assert failed(saved(tmp_path, dataset)) == ['stats/action_min']
    dataset['raw'][1]['qpos'][2,1] += .01
    assert {'stats/qpos_mean', 'stats/example_qpos', 'sim0_delta0/state'} <= set(failed(saved(tmp_path, dataset)))


def test_datasets_of_other_sizes(dataset, tmp_path):
    "Three episodes of other lengths and dimensions, by a loop over samples as the original's reader works"
    g = torch.Generator().manual_seed(0)
    raw = [dict(action=torch.randn(n, 3, generator=g).double(), qpos=torch.randn(n, 2, generator=g).double(),
        images={'top': torch.randint(0, 256, (n, 8, 10, 3), generator=g, dtype=torch.uint8)}) for n in (4, 7, 5)]
    a, q = torch.cat([e['action'] for e in raw]), torch.cat([e['qpos'] for e in raw])
    lo, hi, std = a.amin(0)-1e-4, a.amax(0)+1e-4, q.std(0).clamp(min=1e-2)
    rec = dict(kind='dexvla_dataset', raw=raw, stats=dict(action_min=lo.float(), action_max=hi.float(), qpos_mean=q.mean(0).float(), qpos_std=std.float()))
    for sim in (0, 1):
        for delta in (0, 1):
            items = [sample(e, t, sim, delta, 3) for e in raw for t in range(len(e['action']))]
            act, pad, state, image, said = zip(*items)
            rec[f'sim{sim}_delta{delta}'] = dict(action=((torch.stack(act)-lo)/(hi-lo)*2-1).float(), is_pad=torch.stack(pad), state=((torch.stack(state)-q.mean(0))/std).float(),
                image=torch.stack(image)[:,None], reasoning=list(said), raw_lang='go')
    assert not failed(saved(tmp_path, rec))


def sample(e, t, sim, delta, chunk):
    a, buffer, pad = e['action'][t if sim else max(0, t-1):], torch.zeros(20, e['action'].shape[1]).double(), torch.zeros(20, dtype=torch.bool)
    pad[len(a):] = True
    rows = a.diff(dim=0) if delta else a
    buffer[:len(rows)] = rows
    x = e['images']['top'][t].float()
    half = ((x[::2,::2] + x[1::2,::2] + x[::2,1::2] + x[1::2,1::2])/4 + .5).floor().to(torch.uint8)
    return buffer[:chunk], pad[:chunk], e['qpos'][t], rearrange(half, 'h w c -> c h w'), f'step {t}'


@pytest.fixture(scope='session')
def whole_once():
    "The recording of the whole model, its 25 MB of weights from two seeds"
    rec = torch.load(fixtures/'dexvla_seeded.pt', weights_only=True)
    made = rec.pop('seeds')
    w = R.seeded_weights(made['shapes'], made['all'])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(made['embedding'])
        w['model.embed_tokens.weight'] = .3*torch.randn(made['shapes']['model.embed_tokens.weight'])
    return rec | {'state_dict': w}


@pytest.fixture
def whole(whole_once): return {k: dict(v) if isinstance(v, dict) else v for k,v in whole_once.items()}


def test_dexvla_equals_the_original(whole, tmp_path):
    rows = {r.name: r for r in P.check(saved(tmp_path, whole))}
    assert not [r for r in rows.values() if not r.ok]
    assert max(r.diff for n,r in rows.items() if not n.startswith('init/')) < 1e-5
    assert sum(n.startswith('grad_norms/') for n in rows) == len(whole['state_dict']), 'every parameter has its gradient compared'
    assert whole['evaluate_1']['actions'].isnan().all() and rows['evaluate_1: ours is finite'].ok and rows['evaluate_1/actions'].ok
    assert {'position_ids', 'rope_deltas', 'image_embeds', 'hidden_states', 'logits_at_answer', 'loss', 'llm_loss', 'action_loss', 'evaluate_5/actions'} <= set(rows)


@pytest.mark.parametrize('name,at', [('visual.patch_embed.proj.weight', 5), ('visual.blocks.1.attn.qkv.weight', 0), ('visual.merger.mlp.2.bias', 3),
    ('model.layers.0.self_attn.v_proj.bias', 1), ('model.layers.1.mlp.down_proj.weight', -1), ('model.norm.weight', 0), ('policy_head.blocks.0.mlp.fc1.weight', 7),
    ('policy_head.pos_embed', 0), ('input_action_proj.mlps.0.weight', 2), ('reasoning_film.shift_fc.bias', 4)])
def test_one_changed_weight_of_the_whole_fails(whole, tmp_path, name, at):
    w = whole['state_dict'][name] = whole['state_dict'][name].clone()
    w.view(-1)[at] += .02
    assert failed(saved(tmp_path, whole))


@pytest.mark.parametrize('key', ['position_ids', 'image_embeds', 'logits_at_answer', 'llm_loss', 'evaluate_5/actions', 'evaluate_1/hidden_states', 'grad_norms/model.norm.weight'])
def test_one_changed_output_of_the_whole_fails(whole, tmp_path, key):
    at, *rest = key.split('/', 1)
    tree, k = (whole[at], rest[0]) if rest else (whole, at)
    v = tree[k] = tree[k].clone()
    v.view(-1)[-1] += 1 if not v.is_floating_point() else .02
    assert key in failed(saved(tmp_path, whole))


def test_an_action_where_the_original_had_none_fails(whole, tmp_path):
    whole['evaluate_1']['actions'] = torch.zeros(1, 10, 7)
    assert failed(saved(tmp_path, whole)) == ['evaluate_1/actions']


def record_dexvla(seed, width, heads, kv, mlp, vision, vision_heads, patch, merge, depth, head_width, head_heads, horizon, a, p, grids, prompts, answers):
    "A recording of our own composition, at any size: rows with `prompts` and `answers` words around the images of `grids`"
    from transformers import Qwen2VLConfig
    from vla_nb.backbones.qwen2vl import Qwen2VL
    from vla_nb.backbones.qwen2vl_io import to_fork
    from vla_nb.backbones.patches import mrope_positions
    half = width//heads//2
    config = Qwen2VLConfig(image_token_id=151655, tie_word_embeddings=True, vision_config=dict(depth=1, embed_dim=vision, num_heads=vision_heads, hidden_size=width, mlp_ratio=3, patch_size=patch, spatial_merge_size=merge),
        text_config=dict(vocab_size=151700, hidden_size=width, intermediate_size=mlp, num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=kv, rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type='default', rope_theta=1e4, mrope_section=[half//2, half//4, half-half//2-half//4]), bos_token_id=None, eos_token_id=None))
    model = torch.nn.ModuleDict(dict(vlm=Qwen2VL(config), fuse=FusionFiLM(width), head=ScaleDP(a, p, width, horizon, head_width, 1, head_heads, 2., 16, sinusoid_bf16)))
    names = [n for n,_ in model.named_parameters()]
    model.load_state_dict(R.seeded_weights({n: v.shape for n,v in model.named_parameters()}, seed))
    vlm, fuse, head = model['vlm'], model['fuse'], model['head']
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)
    ids, labels = zip(*[row(g, grids, merge, n, m) for n,m in zip(prompts, answers)])
    s = max(map(len, ids))
    pad = lambda rows, v: torch.stack([torch.cat([torch.full((s-len(x),), v), x]) for x in rows])
    grid = torch.tensor(grids).repeat(len(ids), 1)
    i = dict(input_ids=pad(ids, 151643), labels=pad(labels, -100), image_grid_thw=grid, pixel_values=r(grid.prod(1).sum(), 3*2*patch**2), actions=r(len(ids), horizon, a),
        states=r(len(ids), p), is_pad=torch.arange(horizon).expand(len(ids), -1) > torch.tensor([[horizon], [horizon//2]]))
    i['attention_mask'] = mask = i['input_ids'] != 151643
    types = (i['input_ids'] == 151655).long()
    hidden = vlm(i['input_ids'], mask, types, i['pixel_values'], grid)
    place, delta = mrope_positions(types == 1, mask, grid, merge, len(i['pixel_values'])//merge**2)
    cond, noise, t = fuse(hidden, *windows_dexvla(i['input_ids'], i['labels'])), r(1, len(ids), horizon, a), torch.tensor([3, 71])
    error = (head(squared_cosine(100).add_noise(i['actions'], noise[0], t), t, cond, i['states'])-noise[0])**2
    said, action = vlm.answer_loss(hidden, i['labels'])[0], (error*~i['is_pad'][...,None]).mean()
    (said+action).backward()
    def fork(d):
        own = to_fork({n.removeprefix('vlm.vlm.'): v for n,v in d.items() if n.startswith('vlm.')})
        return own | {n.removeprefix('fuse.') if n.startswith('fuse.') else n.replace('head.', 'policy_head.', 1): v for n,v in d.items() if not n.startswith('vlm.')}
    rec = dict(kind='dexvla', inputs=i, noise=noise, timesteps=t, position_ids=place.masked_fill(~mask, 1), rope_deltas=delta-(~mask).sum(1, keepdim=True), hidden_states=hidden,
        image_embeds=vlm.vlm.model.visual(i['pixel_values'], grid_thw=grid).pooler_output, action_hidden_states=cond[:,None], loss=said+action, llm_loss=said, action_loss=action)
    rec = {k: v.detach() if torch.is_tensor(v) else v for k,v in rec.items()}
    rec['state_dict'] = fork({n: v.detach() for n,v in model.named_parameters()})
    rec['grad_norms'] = {k: v.norm() for k,v in fork({n: v.grad for n,v in model.named_parameters()}).items()}
    assert len(rec['grad_norms']) == len(names)
    return rec


def row(g, grids, merge, n, m):
    "Ids and labels of a row: images, `n` words, an answer of `m` words and <|im_end|>"
    images = [x for t,h,w in grids for x in [151652, *[151655]*(t*h*w//merge**2), 151653]]
    said = [*torch.randint(100, 20000, (m,), generator=g).tolist(), 151645]
    ids = [151644, *images, *torch.randint(100, 20000, (n,), generator=g).tolist(), *said]
    return torch.tensor(ids), torch.tensor([-100]*(len(ids)-len(said)) + said)


@pytest.mark.parametrize('sizes', [dict(seed=3, width=48, heads=3, kv=1, mlp=40, vision=24, vision_heads=3, patch=4, merge=2, depth=3, head_width=24, head_heads=3, horizon=6, a=3, p=5,
        grids=[[1, 4, 4]], prompts=(4, 9), answers=(3, 1)),
    dict(seed=4, width=16, heads=1, kv=1, mlp=24, vision=16, vision_heads=4, patch=6, merge=1, depth=1, head_width=8, head_heads=1, horizon=4, a=2, p=2,
        grids=[[1, 2, 3], [1, 1, 2], [1, 2, 2]], prompts=(7, 2), answers=(2, 6))])
def test_dexvla_of_other_sizes(sizes, tmp_path):
    rec = record_dexvla(**sizes)
    assert not failed(saved(tmp_path, rec))
    rec['state_dict']['visual.merger.mlp.0.weight'][0,0] += .05
    assert failed(saved(tmp_path, rec))
