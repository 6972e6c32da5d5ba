"""Stage 1 and the stage presets: what is handed on, what is frozen, what is refused. Random images of 64 px, a few samples."""
import json
from dataclasses import replace
from pathlib import Path

import pytest, torch
from torch import nn

from vla_nb.core import Samples
from vla_nb.dexvla_stages import on_meta, presets, write_sizes
from vla_nb.policies.dexvla_config import tiny
from vla_nb.policies.dexvla_qwen import DexVLAQwen
from vla_nb.policies.divla_tinyvla import DiVLAQwen, TinyVLAQwen
from vla_nb.policies.dexvla_released import export_released, load_released
from vla_nb.run import begin
from vla_nb.policies.scaledp_stage1 import ScaleDPStage1, ScaleDPStage1Config, export_stage1_head, resnet50
from vla_nb.train.config import TrainConfig
from vla_nb.train.loop import train
from vla_nb.train.optim import build_optimizer, lr_factor

torch.set_num_threads(1)
small = dict(stem=8, stages=(8, 16), depths=(1, 2), text_width=16, text_depth=1, text_heads=2, points=4, head_width=32, head_depth=2, head_heads=2, combine_width=24)


def one(x): return dict(mean=x.mean(0).tolist(), std=x.std(0).tolist(), min=x.amin(0).tolist(), max=x.amax(0).tolist())


@pytest.fixture(scope='module')
def data():
    g = torch.Generator().manual_seed(0)
    return Samples(torch.randint(0, 256, (4, 1, 3, 64, 64), dtype=torch.uint8, generator=g), torch.randn(4, 3, generator=g), ['press red', 'press blue', 'go', 'press the red one'],
                   torch.randn(4, 6, 2, generator=g), torch.arange(6)[None] >= torch.tensor([6, 6, 4, 1])[:, None], torch.arange(4), ['up', 'down', 'up', 'left'])


@pytest.fixture(scope='module')
def stats(data): return dict(state=one(data.state), action=one(data.action.flatten(0, 1)))


def make(data, stats, seed=0, **kw):
    return ScaleDPStage1.from_data(ScaleDPStage1Config(**small | kw), [*data.instruction, *data.subtask], stats, seed)


def awake(p, seed=1):
    "The same policy with nothing at zero"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in p.parameters(): w.add_(.05*torch.randn(w.shape, generator=g))
    return p


def test_new_policies_are_a_function_of_their_seed(data, stats):
    a, b, c = make(data, stats), make(data, stats), make(data, stats, seed=1)
    assert all(torch.equal(x, y) for x,y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.encoder.project.weight, c.encoder.project.weight)


def test_padding_in_text_and_company_in_the_batch_do_not_matter(data, stats):
    p = awake(make(data, stats)).train()
    batch = p.prepare(data)
    z = p._fuse(data.images, batch['input_ids'], batch['mask'])
    for i in range(4):
        n = int(batch['mask'][i].sum())
        torch.testing.assert_close(p._fuse(data.images[i:i+1], batch['input_ids'][i:i+1,:n], batch['mask'][i:i+1,:n]), z[i:i+1], atol=1e-5, rtol=1e-5)


def test_no_words_are_no_nan(data, stats):
    p = awake(make(data, stats))
    assert p.act(data.say(''), seed=data.seed).action.isfinite().all()
    assert p.loss(p.prepare(data.say(''))).total.isfinite()


def test_batch_statistics_stay_in_training(data, stats):
    p = make(data, stats).train()
    before = {k: b.clone() for k,b in p.named_buffers()}
    p.loss(p.prepare(data)).total.backward()
    assert all(torch.equal(b, before[k]) for k,b in p.named_buffers())
    assert p.training and not any(m.training for m in p.modules() if isinstance(m, nn.BatchNorm2d))


def test_padded_steps_do_not_count(data, stats):
    p = awake(make(data, stats)).eval()
    other = replace(data, action=torch.where(data.action_is_pad[...,None], torch.tensor(9.), data.action))
    assert torch.equal(p.loss(p.prepare(data)).total, p.loss(p.prepare(other)).total)
    assert p.loss(p.prepare(data)).count == (~data.action_is_pad).sum()


@pytest.mark.parametrize('frozen', [(), ('text',), ('image', 'text')])
def test_frozen_parts_get_no_gradient(data, stats, frozen):
    p = awake(make(data, stats, frozen=frozen)).train()
    build_optimizer(p, TrainConfig(steps=10, warmup=1))
    p.loss(p.prepare(data)).total.backward()
    for g in p.groups():
        for k,w in g.params.items(): assert (w.grad is not None and bool(w.grad.any())) == (g.name not in frozen), k


def test_several_cameras_and_the_wrong_number(data, stats):
    two = replace(data, images=data.images.expand(-1, 2, -1, -1, -1).contiguous())
    p = make(data, stats, cameras=2)
    assert p.act(two, seed=data.seed).action.shape == (4, 6, 2)
    with pytest.raises((ValueError, RuntimeError)): p.act(data, seed=data.seed)


def test_sub_steps(data, stats):
    p = make(data, stats, substeps=True)
    assert [t.strip() for t in p.tokenizer.batch_decode(p.prepare(data)['input_ids'], skip_special_tokens=True)] == data.subtask
    with pytest.raises(ValueError, match='subtask: expected'): p.prepare(replace(data, subtask=None))


def test_published_encoders_are_read_whole(data, stats, tmp_path):
    q = awake(make(data, stats))
    q.encoder.image.save_pretrained(tmp_path/'resnet')
    q.encoder.text.save_pretrained(tmp_path/'bert')
    q.tokenizer.save_pretrained(tmp_path/'bert')
    p = make(data, stats, seed=5, resnet=str(tmp_path/'resnet'), bert=str(tmp_path/'bert'))
    for part in ('image', 'text'):
        for (k,a),b in zip(getattr(p.encoder, part).named_parameters(), getattr(q.encoder, part).parameters()): assert torch.equal(a, b), k
    assert p.config.resnet == '' and p.config.resnet_config['hidden_sizes'] == [8, 16]
    again = ScaleDPStage1.from_pretrained(p.save_pretrained(tmp_path/'policy'))    # needs neither folder
    assert torch.equal(again.act(data, seed=data.seed).action, p.eval().act(data, seed=data.seed).action)
    from safetensors.torch import load_file, save_file
    w = load_file(tmp_path/'resnet/model.safetensors')
    del w[next(iter(w))]
    save_file(w, tmp_path/'resnet/model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='copy the whole model'): make(data, stats, resnet=str(tmp_path/'resnet'))


def second(data, stats, **kw):
    c = replace(tiny(), vocab=300, width=32, depth=1, heads=2, kv_heads=1, mlp=48, vision_width=32, vision_depth=1, vision_heads=2, head_width=32, head_depth=2, head_heads=2, combine_width=24)
    return DexVLAQwen.from_data(replace(c, **kw), data.instruction + data.subtask, stats)


def test_stage_2_starts_with_stage_1s_head_bit_for_bit(data, stats, tmp_path):
    first, p = awake(make(data, stats, cond_dim=32)), second(data, stats)
    before = {k: v.clone() for k,v in p.state_dict().items()}
    r = load_released(p, export_stage1_head(first, tmp_path))
    assert r.ok and 'Stage 1 read other features' in str(r)
    for k,v in p.state_dict().items():
        mine = k.startswith('policy_head.') and 'cond_obs_emb' not in k
        assert torch.equal(v, first.state_dict()[k] if mine else before[k]), k
    # the original's own layout carries the same weights
    q = second(data, stats)
    load_released(q, export_released(first, tmp_path/'theirs', 'stage1'))
    assert all(torch.equal(a, b) for a,b in zip(p.parameters(), q.parameters()))


@pytest.mark.parametrize('change,message', [(dict(prediction='epsilon'), 'prediction expected epsilon, found sample'), (dict(noise_shift=1.), r'noise_shift expected 1\.0, found 0\.1'),
    (dict(horizon=8), 'horizon=6'), (dict(head_depth=3), 'head_depth=2'), (dict(head_heads=4), 'head_heads expected 4, found 2'), (dict(width=64), 'a language model of width 32')])
def test_a_head_that_would_mean_something_else_is_refused(data, stats, tmp_path, change, message):
    f = export_stage1_head(make(data, stats, cond_dim=32), tmp_path)
    with pytest.raises(ValueError, match=message): load_released(second(data, stats, **change), f)


def test_stage_follows_stage_from_run_to_run(data, stats, tmp_path):
    "`vla-nb train --init RUN`: Stage 1's head into Stage 2, Stage 2 whole into Stage 3"
    first, p = awake(make(data, stats, cond_dim=32)), second(data, stats)
    fresh = p.policy_head.cond_obs_emb.weight.clone()
    r = begin(p, first.save_pretrained(tmp_path/'first'))
    assert r.layout == 'stage1' and torch.equal(p.policy_head.cond_obs_emb.weight, fresh)
    assert all(torch.equal(v, first.policy_head.state_dict()[k]) for k,v in p.policy_head.state_dict().items() if 'cond_obs_emb' not in k)
    third = second(data, stats, swap_instruction=0.)
    assert begin(third, awake(p).save_pretrained(tmp_path/'second')).ok
    assert all(torch.equal(a, b) for (k,a),b in zip(third.named_parameters(), p.parameters()) if not k.startswith('guide.'))
    with pytest.raises(ValueError, match='tokenizer: expected that of this data'): begin(second(replace(data, subtask=['other words']*4), stats), tmp_path/'second')
    with pytest.raises(ValueError, match='noise_shift expected 1.0, found 0.1'): begin(second(data, stats, noise_shift=1.), tmp_path/'second')


def test_a_file_that_does_not_say_how_it_computes_is_taken_for_a_released_one(data, stats, tmp_path):
    p = second(data, stats)
    torch.save({k: v.detach().clone() for k,v in p.policy_head.named_parameters()}, tmp_path/'head.pt')
    assert load_released(p, tmp_path/'head.pt').assumed.keys() == {'time_embed', 'prediction', 'noise_shift'}
    with pytest.raises(ValueError, match='--model.time-embed bf16 --model.prediction epsilon --model.noise-shift 1.0'): begin(p, tmp_path/'head.pt')
    assert begin(second(data, stats, time_embed='bf16', prediction='epsilon', noise_shift=1.), tmp_path/'head.pt').ok


def test_the_loop_trains_it(data, stats, tmp_path):
    p = make(data, stats)
    def loader(first, rank, world):
        for i in range(first, 100): yield p.prepare(replace(data, seed=data.seed + 10*i))
    done = train(p, loader, TrainConfig(steps=6, batch_size=4, warmup=1, lr=1e-3, save_every=0, eval_every=0, cpu=True, progress=False), tmp_path)
    assert done['steps'] == 6 and done['loss'] < 10


def test_the_published_sizes_need_no_folder_on_the_meta_device():
    c = resnet50()
    assert (c.cond_dim, c.head_size, c.horizon, c.frozen) == (1536, 'H', 50, ('text',))


# ---- presets, at full size on the meta device


@pytest.fixture(scope='module')
def counted(tmp_path_factory):
    path = tmp_path_factory.mktemp('sizes')/'sizes.json'
    write_sizes(path)
    return json.loads(path.read_text())


def test_the_committed_table_is_what_the_code_counts(counted):
    assert json.loads((Path(__file__).parent.parent/'results/dexvla_sizes.json').read_text()) == counted


def test_what_each_stage_trains(counted):
    trained = {name: {r['group'] for r in f['groups'] if r['trained']} for name,f in counted.items()}
    whole = {'vision', 'merger', 'language', 'fusion', 'head'}
    assert trained == dict(stage1={'image', 'head'}, stage2=whole, stage2_paper=whole - {'vision'}, stage3=whole,
        divla={'vision_lora', 'language_lora', 'fusion', 'head'}, lora_debug={'vision_lora', 'language_lora', 'fusion', 'head'})
    assert {r['lr'] for r in counted['divla']['groups'] if r['group'] in ('fusion', 'head')} == {2e-4}
    assert {r['lr'] for r in counted['divla']['groups'] if r['group'].endswith('lora')} == {2e-5}


def test_counts_are_the_published_ones(counted):
    n = {name: {r['group']: r['parameters'] for r in f['groups']} for name,f in counted.items()}
    assert (n['stage1']['image'], n['stage1']['text']) == (23_508_032, 66_362_880)
    for name in ('stage2', 'divla', 'lora_debug'): assert sum(n[name][g] for g in ('vision', 'merger', 'language')) == 2_208_985_600
    assert [round(n[k]['head']/1e6, 1) for k in ('stage2', 'lora_debug', 'divla')] == [955.9, 462.6, 89.6]
    layers = {k: v for k,v in counted['stage2']['tensors'].items() if 'layers.*.self_attn.q_proj.weight' in k}
    assert layers == {'backbone.vlm.model.language_model.layers.*.self_attn.q_proj.weight [1536 x 1536]': '28 in language'}


def test_the_runs_are_those_of_the_scripts():
    t = {k: f()[1] for k,f in presets.items()}
    assert {(c.betas, c.eps, c.weight_decay, c.precision) for c in t.values()} == {((.9, .98), 1e-7, 0., 'bf16')}
    assert {k: (c.steps, c.batch_size, c.lr, c.schedule, c.warmup) for k,c in t.items()} == dict(stage1=(40_000, 32, 1e-4, 'cosine', 400), stage2=(100_000, 12, 2e-5, 'constant', 1000),
        stage2_paper=(100_000, 12, 2e-5, 'constant', 1000), stage3=(80_000, 12, 2e-5, 'cosine', 80), divla=(60_000, 12, 2e-5, 'cosine', 600), lora_debug=(80_000, 2, 2e-5, 'cosine', 80))
    assert [lr_factor(k, t['stage2']) for k in (0, 499, 999, 99_999)] == [.001, .5, 1., 1.]
    assert {k: f()[0].horizon for k,f in presets.items()} == dict(stage1=50, stage2=50, stage2_paper=50, stage3=50, divla=16, lora_debug=50)
    assert all(f()[0].use_reasoning for k,f in presets.items() if k != 'stage1')


def test_stage_1s_head_fits_stage_2_at_full_size():
    first, second = (on_meta(presets[k]()[0]) for k in ('stage1', 'stage2'))
    a, b = ({k: p.shape for k,p in m.policy_head.named_parameters()} for m in (first, second))
    assert a == b and first.config.prediction == second.config.prediction and first.config.noise_shift == second.config.noise_shift


@pytest.mark.parametrize('cls,layout', [(DiVLAQwen, 'divla'), (TinyVLAQwen, 'tinyvla')])
def test_relatives_go_out_and_come_back(data, stats, tmp_path, cls, layout):
    c = cls.Config(vocab=300, width=32, depth=1, heads=2, kv_heads=1, mlp=48, vision_width=32, vision_depth=1, vision_heads=2)
    one, two = (cls.from_data(c, data.instruction + data.subtask, stats, seed) for seed in (0, 1))
    one = awake(one)
    r = load_released(two, export_released(one, tmp_path/'out', layout))
    assert r.ok and r.layout == layout
    for (k,a),b in zip(one.named_parameters(), two.parameters()): assert k.startswith('guide.') or torch.equal(a, b), k
    q = second(data, stats)
    with pytest.raises(ValueError, match='does not fit'): load_released(q, tmp_path/'out')
