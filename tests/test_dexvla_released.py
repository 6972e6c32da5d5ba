"""Published layouts: names recorded from the original programs, files that are broken in every way, and round trips to the bit.

`fixtures/dexvla_names.json` holds the names and shapes of the original's small recorded models; weights come from seeds.
"""
import json
from dataclasses import replace
from pathlib import Path

import pytest, torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2VLConfig

from vla_nb.heads.scaledp import PooledScaleDP, ScaleDP, sizes
from vla_nb.heads.unet1d import UNet1D
from vla_nb.policies.dexvla_config import tiny
from vla_nb.policies.dexvla_files import dexvla_stats, layout_of, read_released
from vla_nb.policies.dexvla_qwen import DexVLAQwen
from vla_nb.policies.dexvla_released import Released, export_released, head_settings, load_released, released_name, report
from vla_nb.text.chat import small_chat_tokenizer

original = json.loads((Path(__file__).parent/'fixtures/dexvla_names.json').read_text())
texts = ['press the red button', 'it is on the left, move over it.']


def stats(a=7, p=6): return dict(action=dict(mean=[0.]*a, std=[1.]*a, min=[-1.]*a, max=[1.]*a), state=dict(mean=[0.]*p, std=[1.]*p))


def weights(shapes, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(tuple(s), generator=g).to(dtype) for k,s in shapes.items()}


def vlm(vocab=151936):
    "The language model of the recording `dexvla`"
    return json.loads(json.dumps(Qwen2VLConfig(tie_word_embeddings=True,
        text_config=dict(vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)).to_dict()))


def policy(vocab=400, head=None, horizon=10, **more):
    "The recorded model's sizes, with a smaller vocabulary unless one asks"
    c = replace(tiny(), vlm_config=vlm(vocab), horizon=horizon, head_width=32, head_depth=2, head_heads=2, combine_width=1024, guide=0., **more)
    p = DexVLAQwen(c, stats(), small_chat_tokenizer(texts, 300))
    if head is not None: p.policy_head = head
    return p


def names(vocab=400): return {k: [vocab, 32] if k == 'model.embed_tokens.weight' else s for k,s in original['dexvla'].items()}


def test_the_policy_has_the_original_models_names_and_shapes():
    with torch.device('meta'): p = policy(151936)
    assert {released_name(k): list(v.shape) for k,v in p.named_parameters()} == original['dexvla']


@pytest.mark.parametrize('kind,make', [('scaledp', lambda: ScaleDP(7, 6, 40, 10, 48, 3, 4)), ('scaledp_tinyvla', lambda: PooledScaleDP(7, 6, 40, 10, 48, 3, 4))])
def test_heads_have_the_original_names_and_shapes(kind, make):
    assert {k: list(v.shape) for k,v in make().named_parameters()} == original[kind]


def widths(shapes): return head_settings({f'policy_head.{k}': s for k,s in shapes.items()})


def test_shapes_say_what_a_head_is():
    s = widths(original['scaledp'])
    assert (s['head'], s['depth'], s['width'], s['horizon'], s['action_dim'], s['state_dim'], s['cond_dim'], s['pooled']) == ('ScaleDP-custom', 3, 48, 10, 7, 6, 40, False)
    assert widths(original['scaledp_tinyvla'])['pooled']
    u = widths(original['unet1d'])
    assert (u['head'], u['widths'], u['action_dim'], u['state_dim'], u['cond_dim']) == ('U-Net', (16, 32, 64), 14, 5, 24)
    with torch.device('meta'): h = {k: ScaleDP(14, 14, 1536, 50, **s) for k,s in sizes.items()}
    count = {k: round(sum(p.numel() for p in m.parameters())/1e6, 1) for k,m in h.items()}
    assert count == dict(Ti=14.4, S=37.3, B=135.0, L=462.6, H=955.9)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_folder_goes_in_and_out_bit_for_bit(tmp_path, dtype):
    w = weights(names(), dtype=dtype)
    (tmp_path/'in').mkdir()
    save_file(w, tmp_path/'in/model.safetensors')
    p = policy()
    assert load_released(p, tmp_path/'in').ok
    out = read_released(export_released(p, tmp_path/'out', 'dexvla', dtype))
    assert out.layout == 'dexvla' and out.tensors.keys() == w.keys()
    for k,v in w.items(): assert out.tensors[k].dtype == dtype and torch.equal(out.tensors[k], v), k
    config = json.loads((tmp_path/'out/config.json').read_text())
    assert config['model_type'] == 'qwen2_vla' and config['policy_head_type'] == 'scale_dp_policy' and config['hidden_size'] == 32 and config['vision_config']['embed_dim'] == 32


def test_shards_with_an_index(tmp_path):
    w, where = weights(names()), {}
    for i in range(3):
        part = list(w)[i::3]
        f = f'model-0000{i+1}-of-00003.safetensors'
        save_file({k: w[k] for k in part}, tmp_path/f)
        where |= dict.fromkeys(part, f)
    index = tmp_path/'model.safetensors.index.json'
    index.write_text(json.dumps({'metadata': {}, 'weight_map': where}))
    assert all(torch.equal(v, w[k]) for k,v in read_released(tmp_path).tensors.items())
    index.write_text(json.dumps({'weight_map': {**where, 'extra.weight': f}}))
    with pytest.raises(ValueError, match=r'extra.weight.*copy the file again'): read_released(tmp_path)
    (tmp_path/f).unlink()
    with pytest.raises(FileNotFoundError, match='00003-of-00003'): read_released(tmp_path)


def test_a_bin_folder_and_transformers_5_names(tmp_path):
    w = weights(names())
    new = {('model.' + k if k.startswith('visual.') else 'model.language_model.' + k.removeprefix('model.') if k.startswith('model.') else k): v for k,v in w.items()}
    torch.save(new, tmp_path/'pytorch_model.bin')
    r = read_released(tmp_path)
    assert r.layout == 'dexvla' and r.tensors.keys() == w.keys()


def stage1_file(path, head, **more):
    nets = {f'policy.noise_pred_net.{k}': v for k,v in head.items()} | {'policy.obs_encoder.conv.weight': torch.ones(2, 2)}
    torch.save({'nets': {'nets': nets | more, 'ema': None}, 'config': {'a': 1}}, path)
    return path


def test_stage_1_leaves_cond_obs_emb_as_it_was_and_says_so(tmp_path):
    head, p = weights({k: v.shape for k,v in policy().policy_head.named_parameters()}), policy()
    before = {k: v.clone() for k,v in p.state_dict().items()}
    r = load_released(p, stage1_file(tmp_path/'s.ckpt', head))
    for k,v in p.state_dict().items():
        n = k.removeprefix('policy_head.')
        assert torch.equal(v, head[n] if k != n and 'cond_obs_emb' not in k else before[k]), k
    said = str(r)
    assert 'cond_obs_emb' in said and 'Stage 1 read other features' in said and 'obs_encoder.*' in said


@pytest.mark.parametrize('change,message', [(lambda h: h.pop('x_embedder.weight'), 'missing: policy_head.x_embedder.weight'),
    (lambda h: h.update({'spare.weight': torch.ones(1)}), 'unexpected: policy_head.spare.weight'),
    (lambda h: h.update({'pos_embed': torch.ones(1, 50, 32)}), 'horizon=50'),
    (lambda h: h.update({'final_layer.linear.weight': torch.ones(14, 32)}), r'expected \(7, 32\), found \(14, 32\)')])
def test_a_head_that_does_not_fit_is_refused_and_nothing_changes(tmp_path, change, message):
    p = policy()
    head = weights({k: v.shape for k,v in p.policy_head.named_parameters()})
    change(head)
    save_file(head, tmp_path/'head.safetensors')
    before = {k: v.clone() for k,v in p.state_dict().items()}
    with pytest.raises(ValueError, match=message): load_released(p, tmp_path/'head.safetensors')
    assert all(torch.equal(v, before[k]) for k,v in p.state_dict().items())
    r = load_released(p, tmp_path/'head.safetensors', strict=False)
    assert not r.ok and torch.equal(p.policy_head.combine[0].weight, head['combine.0.weight'])


def test_a_size_of_another_name_is_named():
    with torch.device('meta'): mine, theirs = ScaleDP(14, 14, 1536, 50, **sizes['H']), ScaleDP(10, 7, 1536, 16, **sizes['L'])
    p = nn.Module()
    p.policy_head = mine
    said = str(report(p, Released('scaledp', {f'policy_head.{k}': v for k,v in theirs.named_parameters()})))
    assert 'this is ScaleDP-L' in said and 'yours is ScaleDP-H' in said and "head_size='L', horizon=16, data of 10 action dimensions, data of 7 state dimensions" in said, said


def test_settings_that_shapes_do_not_show(tmp_path):
    p = policy(prediction='epsilon')
    head = {k: v.detach().clone() for k,v in p.policy_head.named_parameters()}
    save_file(head, tmp_path/'head.safetensors', metadata={'prediction': 'sample', 'horizon': '10'})
    with pytest.raises(ValueError, match='prediction expected epsilon, found sample'): load_released(p, tmp_path/'head.safetensors')
    save_file(head, tmp_path/'head.safetensors', metadata={'prediction': 'epsilon', 'format': 'pt'})
    assert load_released(p, tmp_path/'head.safetensors').ok


def test_tied_output_layer():
    w = weights(names())
    same, other = w | {'lm_head.weight': w['model.embed_tokens.weight'].clone()}, w | {'lm_head.weight': w['model.embed_tokens.weight'] + 1}
    p = policy()
    assert report(p, Released('dexvla', same)).ok
    assert list(report(p, Released('dexvla', other)).unexpected) == ['lm_head.weight']


def test_the_language_model_alone():
    w = {k: v for k,v in weights(names()).items() if k.startswith(('visual.', 'model.'))}
    p = policy()
    before = p.policy_head.pos_embed.clone()
    r = load_released(p, Released(layout_of(w), w))
    assert (r.layout, r.ok, len(r.loaded)) == ('qwen2vl', True, len(w)) and torch.equal(p.policy_head.pos_embed, before)
    assert torch.equal(p.backbone.vlm.lm_head.weight, w['model.embed_tokens.weight'])


def test_divla_and_tinyvla_heads(tmp_path):
    for head,layout in (UNet1D(7, 6, 32, 12, widths=(16, 32)), 'divla'), (PooledScaleDP(7, 6, 32, 10, 32, 2, 2, combine_width=1024), 'tinyvla'):
        p = policy(head=head)
        if layout == 'tinyvla': del p.fusion
        w = weights({released_name(k): v.shape for k,v in p.named_parameters()})
        file = w | ({k: torch.ones(s) for k,s in original['dexvla'].items() if k.startswith('input_action_proj.')} if layout == 'tinyvla' else {})
        assert layout_of(file) == layout
        r = load_released(p, Released(layout, file))
        assert ('its own program never uses it' in str(r)) == (layout == 'tinyvla')
        out = read_released(export_released(p, tmp_path/layout, layout))
        assert out.layout == layout and all(torch.equal(out.tensors[k], v) for k,v in w.items()) and out.tensors.keys() == w.keys()
        bare = {'divla': 'unet1d', 'tinyvla': 'scaledp'}[layout]
        assert read_released(export_released(p, tmp_path/bare, bare)).layout == bare
        with pytest.raises(ValueError, match='does not fit'): load_released(policy(), Released(layout, file))
        with pytest.raises(ValueError, match=f"expected '{layout}'"): export_released(p, tmp_path/'no', 'dexvla')
        assert not (tmp_path/'no').exists()


def adapter(folder, full=True, **change):
    "A LoRA folder as the original leaves it: adapter, and all other weights beside"
    w = weights(names())
    low = {}
    for i,(k,n) in enumerate({'model.layers.0.self_attn.q_proj': (32, 32), 'visual.blocks.1.mlp.fc1': (64, 32)}.items()):
        low |= {f'base_model.model.{k}.lora_A.weight': torch.randn(4, n[1]), f'base_model.model.{k}.lora_B.weight': torch.randn(n[0], 4)}
    folder.mkdir()
    (folder/'adapter_config.json').write_text(json.dumps(dict(r=4, lora_alpha=16, bias='none') | change))
    torch.save(low, folder/'adapter_model.bin')
    rest = {k: v for k,v in w.items() if full or not k.startswith(('visual.', 'model.'))}
    torch.save({f'base_model.model.{k}': v for k,v in rest.items()}, folder/'non_lora_trainables.bin')
    return w, low


@pytest.mark.parametrize('full', [True, False])
def test_a_lora_folder_is_merged(tmp_path, full):
    w,low = adapter(tmp_path/'lora', full)
    base = tmp_path/'base'
    base.mkdir()
    save_file({k: v for k,v in w.items() if k.startswith(('visual.', 'model.'))}, base/'model.safetensors')
    if not full:
        with pytest.raises(ValueError, match='give the base model'): read_released(tmp_path/'lora')
    r = read_released(tmp_path/'lora', None if full else base)
    assert r.layout == 'dexvla' and r.tensors.keys() == w.keys()
    for k,v in w.items():
        a = low.get(f"base_model.model.{k.removesuffix('.weight')}.lora_A.weight")
        if a is not None: v = v + 4*low[f"base_model.model.{k.removesuffix('.weight')}.lora_B.weight"] @ a
        assert torch.equal(r.tensors[k], v), k
    assert load_released(policy(), r).ok


@pytest.mark.parametrize('odd', [dict(use_dora=True), dict(rank_pattern={'a': 2}), dict(modules_to_save=['policy_head'])])
def test_other_kinds_of_adapters_are_refused(tmp_path, odd):
    adapter(tmp_path/'lora', **odd)
    with pytest.raises(ValueError, match=f'{next(iter(odd))}: expected plain LoRA'): read_released(tmp_path/'lora')


def test_a_policy_with_lora_loads_the_base_and_must_merge_before_export(tmp_path):
    w = weights(names())
    p = policy(lora_rank=2, lora_alpha=4.)
    r = load_released(p, Released('dexvla', w))
    assert r.ok and any('lora_A' in k for k in r.kept)
    with pytest.raises(ValueError, match='merge_lora'): export_released(p, tmp_path/'x', 'dexvla')
    out = read_released(export_released(p.merge_lora(), tmp_path/'x', 'dexvla'))    # B starts at zero: nothing was learnt
    assert all(torch.equal(out.tensors[k], v) for k,v in w.items())


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match='expected a file of weights'): read_released(tmp_path/'none.pt')
    with pytest.raises(FileNotFoundError, match='zero_to_fp32'): read_released(tmp_path)
    (tmp_path/'bad.safetensors').write_bytes(b'not weights')
    with pytest.raises(ValueError, match='expected weights alone'): read_released(tmp_path/'bad.safetensors')
    torch.save({'a': nn.Linear(1, 1)}, tmp_path/'code.pt')
    with pytest.raises(ValueError, match='expected weights alone'): read_released(tmp_path/'code.pt')
    torch.save({'nets': torch.ones(1), 'step': 3}, tmp_path/'odd.pt')
    with pytest.raises(ValueError, match='step: expected a tensor, found int'): read_released(tmp_path/'odd.pt')
    torch.save({'weight': torch.ones(1)}, tmp_path/'other.pt')
    with pytest.raises(ValueError, match='or a head, found'): read_released(tmp_path/'other.pt')
    torch.save({'nets': {'nets': {'policy.obs_encoder.w': torch.ones(1)}}}, tmp_path/'nohead.pt')
    with pytest.raises(ValueError, match=r'noise_pred_net\.\*'): read_released(tmp_path/'nohead.pt')


def test_nothing_is_loaded_into_shapes_without_memory():
    with torch.device('meta'): p = policy()
    with pytest.raises(ValueError, match='meta device'): load_released(p, Released('dexvla', weights(names())))


def test_stats(tmp_path):
    d = {f'{n}_{k}': [1., 2.] for n in ('action', 'qpos') for k in ('mean', 'std')} | {'action_min': [0., 0.], 'action_max': [2., 4.]}
    f = tmp_path/'dataset_stats.json'
    f.write_text(json.dumps(d))
    s = dexvla_stats(f)
    assert s['action']['max'] == [2., 4.] and s['state']['std'] == [1., 2.]
    del d['action_max']
    f.write_text(json.dumps(d))
    with pytest.raises(ValueError, match='action_max: expected'): dexvla_stats(f)


def test_the_original_model_through_our_door_computes_what_it_computed(tmp_path):
    "The recorded original, written as it is published, loaded into the policy: hidden states, fused vector, both losses"
    from vla_nb.layers.film import windows_dexvla
    from vla_nb.replay.dexvla import action_loss, image_id
    from vla_nb.replay.recording import Recording, seeded_weights
    rec = torch.load(Path(__file__).parent/'fixtures/dexvla_seeded.pt', weights_only=True)
    made = rec['seeds']
    w = seeded_weights(made['shapes'], made['all'])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(made['embedding'])
        w['model.embed_tokens.weight'] = .3*torch.randn(made['shapes']['model.embed_tokens.weight'])
    save_file(w, tmp_path/'model.safetensors')
    config = vlm()
    config['text_config'].update(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_parameters=dict(rope_type='default', rope_theta=1e6, mrope_section=[2, 1, 1]))
    config['image_token_id'] = image_id
    with torch.device('meta'): p = policy(151936, time_embed='bf16', prediction='epsilon', noise_shift=1.)
    p = DexVLAQwen(replace(p.config, vlm_config=config, head_heads=4), p.stats, p.tokenizer).eval()    # no shape tells the number of heads
    assert load_released(p, tmp_path).ok
    i = rec['inputs']
    with torch.no_grad():
        hidden = p.backbone(i['input_ids'], i['attention_mask'], (i['input_ids'] == image_id).long(), i['pixel_values'], i['image_grid_thw'])
        z = p.fusion(hidden, *windows_dexvla(i['input_ids'], i['labels']))
        torch.testing.assert_close(hidden[i['attention_mask']], rec['hidden_states'][i['attention_mask']], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(z[:,None], rec['action_hidden_states'], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(p.backbone.answer_loss(hidden, i['labels'])[0], rec['llm_loss'], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(action_loss(Recording(Path(__file__).parent/'fixtures/dexvla_seeded.pt'), p.policy_head, z), rec['action_loss'], atol=1e-4, rtol=1e-5)
