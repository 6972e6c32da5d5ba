"""OpenVLA: the recordings replayed, names and sizes of the released models, and the traps of spec and issue as tests.

`fixtures/openvla_parts.pt` is a recording without its energy models. In `fixtures/openvla_small.pt` the two tables of 32,064
words keep the words that the recording reads or says; the others come back as zeros, which never win. The loss over all words
is left out for that reason.
"""
from pathlib import Path

import pytest, torch
from torch import nn

from vla_nb import parity as P
from vla_nb.backbones import prismatic_io as IO
from vla_nb.backbones.dual_vit import tiny_eyes, two_views
from vla_nb.backbones.lora import attach, is_lora
from vla_nb.backbones.prismatic import Prismatic, before_slots, language_mean, language_mean_padded, see_all, tiny_llama
from vla_nb.core import write_json

fixtures = Path(__file__).parent/'fixtures'


@pytest.fixture(scope='module')
def whole():
    rec = torch.load(fixtures/'openvla_small.pt', weights_only=True)
    t = rec.pop('tables')
    for name,part in (('language_model.model.embed_tokens.weight', 'embed'), ('language_model.lm_head.weight', 'out')):
        table = torch.zeros(t['size'], t[part].shape[1], dtype=t[part].dtype)
        table[t[f'{part}_ids']] = t[part]
        rec['state_dict'][name] = table
    return rec


@pytest.fixture(scope='module')
def parts(): return torch.load(fixtures/'openvla_parts.pt', weights_only=True)


def saved(tmp_path, rec):
    torch.save(rec, tmp_path/'rec.pt')
    return tmp_path/'rec.pt'


def changed(rec, path, by=.05):
    "A copy of nested dicts, one number of one tensor changed"
    head,*rest = path
    if rest: return {**rec, head: changed(rec[head], rest, by)}
    w = rec[head].clone()
    w.view(-1)[0] = ~w.view(-1)[0] if w.dtype == torch.bool else w.view(-1)[0] + (by if w.is_floating_point() else 1)
    return {**rec, head: w}


def test_parts_equal_the_original(parts, tmp_path):
    rows = {r.name: r for r in P.check(saved(tmp_path, parts))}
    assert not [r for r in rows.values() if not r.ok]
    for k in ('film/dino/film_features', 'film/siglip/block_out', 'diffusion_head/ddim_50_end', 'l1_head/out', 'masks/next_mask'): assert rows[k].diff < 1e-5


@pytest.mark.parametrize('path', ['l1_head/state_dict/model.fc2.bias', 'masks/labels', 'film/dino/film_state_dict/blocks.1.scale.weight', 'diffusion_head/ddim_10_start',
    'film/siglip/film_state_dict/blocks.2.block.attn.qkv.bias'])
def test_one_changed_number_of_a_part_fails(parts, tmp_path, path):
    assert [r for r in P.check(saved(tmp_path, changed(parts, path.split('/'), .5))) if not r.ok]


def test_the_whole_equals_the_original(whole, tmp_path):
    with pytest.raises(ValueError, match='lm_loss'): P.check(saved(tmp_path, whole))
    rows = {r.name: r for r in P.check(saved(tmp_path, with_loss(whole)))}
    assert [n for n,r in rows.items() if not r.ok] == []
    for k in ('train_l1/last_hidden', 'train_l1/pred_unpadded', 'predict_l1/actions', 'train_diffusion/noise_pred', 'train_l1_film/pred_sample0_alone'): assert rows[k].diff < 1e-5
    assert rows['predict_discrete/actions'].diff < 1e-6 and rows['predict_diffusion_50/actions'].diff < 1e-3


def with_loss(rec):
    "The loss over the words that are left, computed from the recorded hidden states"
    b, h = rec['batch'], rec['train_l1']['last_hidden']
    logits = h[:,rec['train_l1']['num_patches']:-1]@rec['state_dict']['language_model.lm_head.weight'].float().T
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), b['labels'][:,1:].flatten(), ignore_index=-100)
    return {**rec, 'train_l1': {**rec['train_l1'], 'lm_loss': loss}}


@pytest.mark.parametrize('path', ['head_state_dict/model.fc1.bias', 'film_state_dict/vision_backbone.fused_featurizer.blocks.0.shift.bias'])
def test_one_changed_number_of_the_whole_fails(whole, tmp_path, path):
    assert [r for r in P.check(saved(tmp_path, with_loss(changed(whole, path.split('/'), 1.)))) if not r.ok]


def test_a_tensor_that_nothing_reads_fails(parts, tmp_path):
    assert [r.name for r in P.check(saved(tmp_path, {**parts, 'more': torch.ones(2)})) if not r.ok] == ['more: nothing read it']


def test_names_lead_back_bit_for_bit(whole):
    for key in ('state_dict', 'film_state_dict'):
        w = whole[key]
        back = IO.to_released(IO.from_released(w))
        assert back.keys() == w.keys() and all(torch.equal(back[k], w[k]) for k in w)


def test_published_sizes():
    shapes, film = IO.openvla_shapes(), IO.openvla_shapes(film=True)
    count = lambda d: sum(torch.Size(s).numel() for s in d.values())
    assert count(shapes) == 7_541_237_184 and len(shapes) == 982
    assert count(film)-count(shapes) == 456_241_920
    assert IO.lora_size(shapes, 32) == 110_828_288
    expect = {'vision_backbone.featurizer.pos_embed': (1, 256, 1024), 'vision_backbone.featurizer.reg_token': (1, 4, 1024), 'vision_backbone.featurizer.blocks.23.ls2.scale_factor': (1024,),
        'vision_backbone.fused_featurizer.blocks.26.mlp.fc1.weight': (4304, 1152), 'vision_backbone.fused_featurizer.attn_pool.kv.weight': (2304, 1152),
        'vision_backbone.fused_featurizer.blocks.0.attn.qkv.weight': (3456, 1152), 'projector.fc1.weight': (8704, 2176), 'projector.fc3.weight': (4096, 4096),
        'language_model.model.embed_tokens.weight': (32064, 4096), 'language_model.model.layers.31.mlp.down_proj.weight': (4096, 11008), 'language_model.lm_head.weight': (32064, 4096)}
    assert {k: shapes[k] for k in expect} == expect
    assert film['vision_backbone.featurizer.blocks.0.scale.weight'] == (1024, 4096) and 'vision_backbone.featurizer.blocks.0.block.attn.qkv.weight' in film


def small(film=False): return Prismatic(*tiny_eyes(16, 3, 2, 8, 16), tiny_llama(60, 32, 2, 2, 48), film)


@pytest.mark.parametrize('film', [False, True])
def test_a_run_with_all_its_files(tmp_path, film):
    "A base, an adapter under peft's names, components with and without `module.`: the model computes base plus adapter"
    torch.manual_seed(0)
    base = small()
    IO.write_openvla(base, tmp_path/'base')
    w = IO.to_released(base.state_dict())
    names = [k for k,s in w.items() if k.endswith('.weight') and s.ndim in (2, 4) and 'embed_tokens' not in k]
    def ab(s): return {'A': torch.randn(4, *s.shape[1:])*.1, 'B': torch.randn(len(s), 4, *[1]*(s.ndim-2))*.1}
    lora = {k: ab(w[k]) for k in names}
    adapter = {f'base_model.model.{k[:-7]}.lora_{x}.weight': v for k,d in lora.items() for x,v in d.items()}
    adapter['base_model.model.language_model.lm_head.base_layer.weight'] = w['language_model.lm_head.weight'].clone()
    run = tmp_path/'run'
    (run/'lora_adapter').mkdir(parents=True)
    from safetensors.torch import save_file
    write_json(run/'lora_adapter'/'adapter_config.json', dict(r=4, lora_alpha=2))
    torch.save({f'module.model.{k}': v for k,v in dict(a=torch.ones(2)).items()}, run/'action_head--latest_checkpoint.pt')
    torch.save({'module.fc1.bias': torch.ones(2)}, run/'proprio_projector--latest_checkpoint.pt')
    if film:    # the file of the eyes holds them with their adapters, wrapped
        def wrap(k): return k.replace('attn.', 'block.attn.').replace('norm1', 'block.norm1').replace('norm2', 'block.norm2').replace('mlp.', 'block.mlp.').replace('ls1', 'block.ls1').replace('ls2', 'block.ls2') if '.blocks.' in k else k
        eyes = {wrap(f'{k[:-7]}.base_layer.weight' if k in lora else k): v for k,v in w.items() if k.startswith('vision_backbone.')}
        eyes |= {wrap(f'{k[:-7]}.lora_{x}.default.weight'): v for k,d in lora.items() if k.startswith('vision_backbone.') for x,v in d.items()}
        eyes |= {f'vision_backbone.{e}.blocks.{i}.{n}.{p}': torch.randn(*((16, 32) if p == 'weight' else (16,)))*.1 for e in ('featurizer', 'fused_featurizer') for i in range(3) for n in ('scale', 'shift') for p in ('weight', 'bias')}
        torch.save(eyes, run/'vision_backbone--latest_checkpoint.pt')
        adapter = {k.replace('model.vision_backbone.', 'model.vision_backbone.vision_backbone.'): v for k,v in adapter.items()}
    save_file({k: v.contiguous() for k,v in adapter.items()}, run/'lora_adapter'/'adapter_model.safetensors')
    got = IO.read_openvla(run, tmp_path/'base')
    assert list(got.parts['action_head']) == ['model.a'] and list(got.parts['proprio_projector']) == ['fc1.bias'] and got.heads == (2, 2, 2)
    model = Prismatic(*IO.configs_of(got.weights, got.heads))
    r = IO.load_openvla(model, got.weights)
    assert r.ok and (model.vision.dino_film is not None) == film
    now = IO.to_released(model.state_dict())
    for k in names:
        a,b = lora[k]['A'].flatten(1), lora[k]['B'].flatten(1)
        assert torch.allclose(now[k if k in now else wrap(k)], w[k] + .5*(b@a).view(w[k].shape), atol=1e-6), k
    write_json(run/'lora_adapter'/'adapter_config.json', dict(r=4, lora_alpha=2, use_rslora=True))    # its scale would be alpha/sqrt(r)
    with pytest.raises(ValueError, match='adapter_config.json: use_rslora: expected none, found True; .* merge it with peft first'): IO.read_openvla(run, tmp_path/'base')


def test_merging_twice_and_strange_files_are_refused(tmp_path):
    IO.write_openvla(small(), tmp_path/'run')
    (tmp_path/'run'/'lora_adapter').mkdir()
    with pytest.raises(ValueError, match='twice'): IO.read_openvla(tmp_path/'run', tmp_path/'run')
    w = IO.to_released(small().state_dict())
    with pytest.raises(ValueError, match='another one'): IO.merge_adapter(w, {'base_model.model.x.lora_A.weight': torch.ones(1, 2), 'base_model.model.x.lora_B.weight': torch.ones(2, 1)}, 1.)
    with pytest.raises(ValueError, match='not the one that was trained'): IO.merge_adapter(w, {'base_model.model.language_model.lm_head.base_layer.weight': torch.ones(60, 32)}, 1.)
    torch.save({'a': Path('x')}, tmp_path/'head.pt')
    with pytest.raises(ValueError, match='tensors by name'): IO.read_component(tmp_path/'head.pt')


def test_strict_loading_changes_nothing_when_it_fails():
    torch.manual_seed(0)
    a, b = small(), small()
    before = {k: v.clone() for k,v in b.state_dict().items()}
    w = IO.to_released(a.state_dict())
    del w['projector.fc2.weight']
    with pytest.raises(ValueError, match='projector.fc2.weight'): IO.load_openvla(b, w)
    assert all(torch.equal(v, before[k]) for k,v in b.state_dict().items())
    told = small(film=True)    # a base model begins without FiLM, and sees as before
    IO.load_openvla(told, IO.to_released(a.state_dict()))
    x = two_views(torch.randint(0, 256, (1, 2, 3, 16, 16), dtype=torch.uint8))
    assert torch.allclose(told.look(x, torch.randn(1, 32)), a.look(x), atol=1e-5)


@pytest.mark.parametrize('words', [False, True])
def test_lora_stands_where_a_gradient_comes(words):
    torch.manual_seed(0)
    m = small()
    attach(m, IO.lora_targets(m, words), 2, 1)
    x = two_views(torch.randint(0, 256, (1, 1, 3, 16, 16), dtype=torch.uint8))
    slots = torch.tensor([[False, False, True, True, False]])
    for k,p in m.named_parameters():
        if 'lora_B' in k: nn.init.normal_(p)
    hidden = m(m.embed(torch.arange(5)[None], slots), torch.ones_like(slots), m.look(x))
    (m.fill_slots(hidden, slots) if words else before_slots(hidden, slots)).square().sum().backward()
    assert any('lm_head' in k for k,_ in m.named_parameters() if is_lora(k)) == words
    silent = [k for k,p in m.named_parameters() if is_lora(k) and (p.grad is None or not p.grad.any())]
    assert not silent and all(p.grad is None for k,p in m.named_parameters() if not is_lora(k))


def test_every_kernel_sees_alike():
    "The mask is right in both kernels of transformers; a Boolean one would not be"
    torch.manual_seed(0)
    m = small().eval()
    text, real, before = torch.randn(2, 6, 32), torch.arange(6)[None] < torch.tensor([[4], [6]]), torch.randn(2, 3, 32)
    with torch.no_grad():
        a = m(text, real, before)
        m.language_model.set_attn_implementation('eager')
        b = m(text, real, before)
    on = torch.cat([torch.ones(2, 3).bool(), real], 1)
    assert torch.allclose(a[on], b[on], atol=1e-5)
    assert see_all(real).dtype == torch.float32 and see_all(real, torch.bfloat16).dtype == torch.bfloat16


def test_the_mean_of_words_without_padding():
    text, slots = torch.randn(2, 7, 4), torch.zeros(2, 7, dtype=torch.bool)
    real = torch.arange(7)[None] < torch.tensor([[5], [7]])
    slots[:,3] = True
    assert torch.allclose(language_mean(text, real, slots)[0], text[0][[0, 1, 2, 4]].mean(0), atol=1e-6)
    assert torch.allclose(language_mean_padded(text, real, slots)[0], text[0][[0, 1, 2, 4, 5, 6]].mean(0), atol=1e-6)


def test_eyes_refuse_what_does_not_fit():
    with torch.device('meta'):
        eyes = small().vision
        with pytest.raises(ValueError, match='six channels of 16 pixels'): eyes(torch.zeros(1, 6, 8, 8))
        with pytest.raises(ValueError, match='words'): eyes(torch.zeros(1, 6, 16, 16), torch.zeros(1, 32))
        with pytest.raises(ValueError, match='same patches'): Prismatic(tiny_eyes(16, 3, 2, 8, 16)[0], tiny_eyes(16, 3, 2, 8, 32)[1], tiny_llama(60, 32, 2, 2, 48))


# The policy: frames of 32 px, a language model of width 32, four samples of unequal length

from dataclasses import replace

from vla_nb.core import Observation, Samples
from vla_nb.policies.openvla import OpenVLA
from vla_nb.policies.openvla_config import OpenVLAConfig
from vla_nb.text.action_bins import ActionBins
from vla_nb.text.openvla_prompt import openvla_prompt
from vla_nb.text.pi_prompt import small_gemma_tokenizer

tiny = OpenVLAConfig(horizon=3, cameras=2, image=16, patch=8, vision_width=16, vision_heads=2, vision_depth=2, width=32, depth=1, heads=2, mlp=48, head_width=32, diffusion_steps=4, sample_steps=2)


def one(x): return dict(mean=x.mean(0).tolist(), std=x.std(0).tolist(), min=x.amin(0).tolist(), max=x.amax(0).tolist(), q01=x.quantile(.01, 0).tolist(), q99=x.quantile(.99, 0).tolist())


@pytest.fixture(scope='module')
def data():
    g = torch.Generator().manual_seed(0)
    return Samples(torch.randint(0, 256, (4, 2, 3, 24, 32), dtype=torch.uint8, generator=g), torch.randn(4, 3, generator=g), ['press red', 'press the blue one', 'go', 'press red'],
                   torch.randn(4, 3, 2, generator=g), torch.arange(3)[None] >= torch.tensor([3, 2, 1, 3])[:, None], torch.arange(4), subtask=['red is left', '', 'go', 'red is right'])


@pytest.fixture(scope='module')
def stats(data): return dict(state=one(data.state), action=one(data.action.flatten(0, 1)))


def make(data, stats, **kw): return OpenVLA.from_data(replace(tiny, **kw), [*data.instruction, *data.subtask], stats)
def seen(data, rows=slice(None)): return Observation(data.images[rows], data.state[rows], data.instruction[rows])


@pytest.mark.parametrize('kw', [dict(), dict(head='diffusion'), dict(head='discrete'), dict(film=True), dict(lora_rank=2, film=True), dict(state_token=False, name_words=0.)], ids=str)
def test_what_stands_still_is_what_gets_no_gradient(data, stats, kw):
    p = make(data, stats, **kw).train()
    p.loss(p.prepare(data)).total.backward()
    groups = p.groups()
    assert sorted(k for g in groups for k in g.params) == sorted(k for k,_ in p.named_parameters())
    got = {k for k,q in p.named_parameters() if q.grad is not None}
    assert got == {k for g in groups if g.trainable for k in g.params}


@pytest.mark.parametrize('kw', [dict(), dict(head='diffusion'), dict(head='discrete'), dict(film=True)], ids=str)
def test_neighbours_padding_and_folders_change_nothing(data, stats, kw, tmp_path):
    p = make(data, stats, **kw).eval()
    for f in (*(p.vlm.vision.dino_film or ()), *(p.vlm.vision.siglip_film or ())): nn.init.normal_(f.scale_fc.weight, std=.1)
    a = p.act(seen(data), seed=data.seed).action
    assert a.shape == (4, 3, 2) and torch.allclose(p.act(seen(data, slice(2, 3)), seed=data.seed[2:3]).action, a[2:3], atol=1e-4)
    again = OpenVLA.from_pretrained(p.save_pretrained(tmp_path/'p'))
    assert torch.equal(again.act(seen(data), seed=data.seed).action, a)
    batch = p.prepare(data)
    junk = replace(data, action=torch.where(data.action_is_pad[..., None], 99., data.action))
    assert torch.equal(p.loss(batch).total, p.loss(p.prepare(junk)).total)
    assert p.loss(batch).count == (~data.action_is_pad).sum()


def test_padded_mean_depends_on_the_batch(data, stats):
    "As released: the longest prompt of the batch changes what a short one sees"
    p = make(data, stats, film=True, padded_mean=True).eval()
    for f in (*p.vlm.vision.dino_film, *p.vlm.vision.siglip_film): nn.init.normal_(f.scale_fc.weight, std=.3)
    assert not torch.allclose(p.act(seen(data, slice(2, 3))).action, p.act(seen(data)).action[2:3], atol=1e-4)


def test_images_are_encoded_once(data, stats, monkeypatch):
    p, calls = make(data, stats, head='diffusion').eval(), []
    look = p.vlm.look
    monkeypatch.setattr(p.vlm, 'look', lambda *a: (calls.append(1), look(*a))[1])
    p.act(seen(data))
    assert len(calls) == 1


def test_an_energy_sees_no_action(data, stats):
    "Contexts end before the state that foretells the first slot"
    p = make(data, stats).eval()
    b = p.prepare(data)
    row = p._row(data.images, b, b['state'])
    acting = row.acting()
    n = row.before.shape[1]
    asked = (b['real'] & ~b['slots']).sum(1) - 2    # without the space before the slots and the stop
    assert torch.equal((~acting).sum(1), n + asked) and not acting[:, 0].any()
    assert torch.equal(acting, torch.arange(acting.shape[1])[None] >= (n + asked)[:, None])


def test_cameras_and_settings_are_checked(data, stats):
    p = make(data, stats)
    with pytest.raises(ValueError, match='expected 2 cameras'): p.act(replace(seen(data), images=data.images[:, :1]))
    with pytest.raises(ValueError, match='divisor'): OpenVLAConfig(sample_steps=7)
    with pytest.raises(ValueError, match='frozen'): OpenVLAConfig(frozen=('eyes',))


@pytest.mark.parametrize('rank', [0, 2])
def test_a_released_folder_becomes_a_policy(tmp_path, data, stats, rank):
    torch.manual_seed(0)
    model = Prismatic(*tiny_eyes(16, 3, 2, 8, 16), tiny_llama(32_064, 32, 1, 2, 48))
    IO.write_openvla(model, tmp_path)
    small_gemma_tokenizer([*data.instruction, *map(openvla_prompt, data.instruction)]).save_pretrained(tmp_path)
    p = OpenVLA.from_data(OpenVLAConfig(horizon=3, cameras=2, vlm=str(tmp_path), head='discrete', head_width=32, lora_rank=rank, name_words=0.), [], stats).eval()
    assert p.config.vlm == '' and p.config.top == 32_000 and p.config.image == 16
    x = two_views(torch.randint(0, 256, (1, 2, 3, 16, 16), dtype=torch.uint8))
    assert torch.allclose(p.vlm.look(x), model.look(x), atol=1e-6)
    batch = p.prepare(data)
    assert torch.equal(ActionBins().encode(batch['action']).flatten(1), batch['ids'][batch['slots']].unflatten(0, (4, -1)))
    again = OpenVLA.from_pretrained(p.save_pretrained(tmp_path/'p'))
    assert torch.equal(again.act(seen(data)).action, p.act(seen(data)).action)


def test_a_recorded_run_acts_as_it_did(whole, tmp_path, data):
    "The original's own weights as files of a run: the policy made of them predicts what the original predicted"
    from vla_nb.core import write_json, write_weights
    from vla_nb.policies.openvla_heads import Row
    from vla_nb.policies.openvla_released import from_released
    base, run = tmp_path/'base', tmp_path/'run'
    base.mkdir(), (run/'lora_adapter').mkdir(parents=True)
    write_weights(base, {k: v.float() for k,v in whole['state_dict'].items()})
    write_json(base/'config.json', dict(vla_nb=dict(heads=[2, 2, 4])))
    small_gemma_tokenizer([*data.instruction, *map(openvla_prompt, data.instruction)]).save_pretrained(base)
    from safetensors.torch import save_file
    zero = {f'base_model.model.projector.fc1.lora_{x}.weight': v for x,v in (('A', torch.ones(2, 40)), ('B', torch.zeros(160, 2)))}
    save_file(zero, run/'lora_adapter'/'adapter_model.safetensors')
    write_json(run/'lora_adapter'/'adapter_config.json', dict(r=2, lora_alpha=1))
    a, p = dict(q01=whole['norm_stats_q01'].tolist(), q99=whole['norm_stats_q99'].tolist(), mask=[True]*6 + [False]), dict(q01=[-1.]*8, q99=[1.]*8)
    write_json(run/'dataset_statistics.json', dict(made=dict(action=dict(a, mean=[0.]*7, std=[1.]*7, min=[-1.]*7, max=[1.]*7), proprio=dict(p, mean=[0.]*8, std=[1.]*8, min=[-1.]*8, max=[1.]*8))))
    for part,key in (('action_head', 'head_state_dict'), ('proprio_projector', 'proprio_projector_state_dict')):
        torch.save({f'module.{k}': v.float() for k,v in whole[key].items()}, run/f'{part}--150000_checkpoint.pt')
    policy = from_released(run, base, cameras=2)
    b = whole['batch']
    slots, views = b['labels'] >= 31_744, b['pixel_values'].unflatten(1, (2, 6))
    before = torch.cat([policy.vlm.look(views), policy.state_token(b['proprio'])[:, None]], 1)
    said = policy.way.act(Row(policy.vlm, policy.vlm.embed(b['input_ids'], slots), b['attention_mask'], slots, before, int(slots[0].sum())), None)
    assert torch.allclose(said, whole['train_l1']['pred'], atol=1e-5)
    at = [i for i in range(2) if torch.equal(b['input_ids'][i, :whole['predict_l1']['prompt_ids'].shape[1]], whole['predict_l1']['prompt_ids'][0])][0]
    assert torch.allclose(policy.action_norm.inverse(said[at]).double(), whole['predict_l1']['actions'], atol=1e-4)


def test_a_run_goes_on_where_it_stopped(data, stats, assert_resumes):
    from vla_nb.core import Batch
    assert_resumes(lambda: make(data, stats), lambda p, k: Batch({**(b := p.prepare(data)), 'seed': b['seed']+100*k}))

def test_released_units_are_the_originals():
    "A small range stays small, a state beyond what was seen is cut off, and ALOHA's runs use extremes"
    from vla_nb.policies.openvla import NORMS
    s = dict(mean=[0.], std=[.002], min=[-.02], max=[.02], q01=[-.003], q99=[.003])
    one = torch.ones(1, 1)
    assert NORMS['oft'](s).inverse(one).item() == pytest.approx(.003, rel=1e-3) and NORMS['quantile'](s).inverse(one).item() == pytest.approx(.005)
    assert NORMS['oft_minmax'](s).inverse(one).item() == pytest.approx(.02, rel=1e-3)
    assert NORMS['oft'](s)(one).item() == 1 and NORMS['quantile'](s)(one).item() > 100

def test_states_before_slots_need_no_count():
    from vla_nb.backbones.prismatic import before_slots
    slots, hidden = torch.zeros(2, 7, dtype=torch.bool), torch.arange(2*10*3.).reshape(2, 10, 3)
    slots[0, 3:5] = slots[1, 4:6] = True
    assert torch.equal(before_slots(hidden, slots, 2), torch.stack([hidden[0, 5:7], hidden[1, 6:8]])) and torch.equal(before_slots(hidden, slots), before_slots(hidden, slots, 2))


def test_lora_begins_as_published():
    "Normal numbers of deviation 1/rank in the first matrix, zero in the second"
    net = torch.nn.Sequential(nn.Linear(400, 300))
    attach(net, ['0'], 8, 8, gaussian=True)
    p = dict(net.named_parameters())
    a = p['0.lora_A.default.weight']
    assert abs(a.std().item()*8 - 1) < .05 and a.abs().max() > 3/8 and not p['0.lora_B.default.weight'].any()    # a uniform draw would end at sqrt(3) deviations


@pytest.mark.parametrize('head', ['l1', 'discrete'])
def test_a_policy_that_says_words_adapts_their_table(data, stats, head):
    p = make(data, stats, head=head, lora_rank=2).train()
    p.loss(p.prepare(data)).total.backward()
    table = {k: q for k,q in p.named_parameters() if 'lm_head' in k and is_lora(k)}
    assert len(table) == 2*(head == 'discrete') and all(q.grad is not None for q in table.values())
    assert {k for g in p.groups() if g.trainable for k in g.params} >= set(table)
