"OpenVLA's training recipe: merged checkpoints, recomputed activations, augmentation, metrics, presets, and files that lead in and out"
import shutil, subprocess, sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from test_openvla import IO, data, make, seen, stats, tiny    # the small policy and its four samples
from vla_nb.backbones.dual_vit import stretch, two_views
from vla_nb.backbones.lora import is_lora
from vla_nb.backbones.prismatic import Prismatic
from vla_nb.core import Batch, write_json
from vla_nb.data.openvla_images import augment_openvla, center_crop
from vla_nb.openvla_recipes import on_meta, presets
from vla_nb.policies.openvla import OpenVLA
from vla_nb.policies.openvla_files import export_openvla, released_statistics, start_openvla
from vla_nb.policies.openvla_released import from_released, released_stats
from vla_nb.train.checkpoint import latest
from vla_nb.train.config import TrainConfig, parse_config
from vla_nb.train.loop import train
from vla_nb.train.optim import lr_factor
from vla_nb.train.track import read_log


def awake(p, std=.05):
    "No weight at zero, where differences would hide"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for k,q in p.named_parameters(): nn.init.normal_(q, std=std) if 'lora_B' in k or '_film.' in k else None
    return p


def fit(p, data, out, steps=4, resume=False, **kw):
    batch = p.prepare(data)
    loader = lambda start, rank, world: (Batch({**batch, 'seed': batch['seed']+100*k}) for k in range(start, steps))
    cfg = TrainConfig(**{**dict(steps=steps, batch_size=4, lr=1e-2, warmup=1, save_every=2, keep=0, eval_every=2, log_every=1, progress=False, cpu=True), **kw})
    return train(p, loader, cfg, out, [p.prepare(data)], resume=resume)


def test_a_checkpoint_is_merged_while_training_goes_on_beside_the_adapters(data, stats, tmp_path):
    "It loads where there is no peft, acts as the adapted policy does, and the run continues from it bit for bit"
    lora = dict(lora_rank=2, lora_merge=True, film=True)
    p = awake(make(data, stats, **lora))
    fit(p, data, tmp_path/'run')
    at = latest(tmp_path/'run')
    code = f'''
import sys
sys.modules['peft'] = None
from vla_nb.policies.openvla import OpenVLA
p = OpenVLA.from_pretrained({str(at)!r})
assert p.config.lora_rank == 0 and not [k for k in p.state_dict() if 'lora_' in k or 'base_layer' in k]
'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    q = OpenVLA.from_pretrained(at)
    assert torch.allclose(q.act(seen(data)).action, p.eval().act(seen(data)).action, atol=1e-5)
    by_hand = p.merge_lora().state_dict()
    assert by_hand.keys() == q.state_dict().keys() and all(torch.equal(v, by_hand[k]) for k,v in q.state_dict().items())
    shutil.copytree(tmp_path/'run', tmp_path/'again')
    shutil.rmtree(tmp_path/'again'/'checkpoint-000004')
    fit(make(data, stats, **lora), data, tmp_path/'again', resume=True)
    for f in ('model.safetensors', 'training/weights.safetensors', 'training/optimizer.safetensors'):
        assert (tmp_path/'run'/'checkpoint-000004'/f).read_bytes() == (tmp_path/'again'/'checkpoint-000004'/f).read_bytes()


@pytest.mark.parametrize('kw', [dict(), dict(lora_rank=2, lora_dropout=.1, film=True), dict(head='diffusion', image_aug=True)], ids=str)
def test_recomputed_activations_change_no_number(data, stats, kw):
    def grads(on):
        p = awake(make(data, stats, checkpointing=on, **kw)).train()
        torch.manual_seed(3)
        l = p.loss(p.prepare(data)).total
        l.backward()
        return l.detach(), {k: q.grad for k,q in p.named_parameters() if q.grad is not None}
    (a, ga), (b, gb) = grads(False), grads(True)
    assert torch.equal(a, b) and ga.keys() == gb.keys() and max((ga[k]-gb[k]).abs().max() for k in ga) < 1e-6


def test_augmented_when_training_and_cropped_when_acting(data, stats, monkeypatch):
    p, views = make(data, stats, image_aug=True, shift=0, brightness=0.), []
    look = p.vlm.look
    monkeypatch.setattr(p.vlm, 'look', lambda v, words=None: (views.append(v), look(v, words))[1])
    batch, small = p.prepare(data), stretch(data.images, 16)
    p.train().loss(batch), p.loss(batch), p.eval().loss(batch), p.act(seen(data)), p.train().loss(Batch({**batch, 'seed': batch['seed']+1}))
    want = two_views(augment_openvla(small, data.seed)), two_views(center_crop(small))
    assert all(torch.equal(v, want[i]) for v,i in zip(views, (0, 0, 1, 1))) and not torch.allclose(views[4], want[0])
    plain = make(data, stats)
    assert not torch.equal(plain.eval().act(seen(data)).action, p.eval().act(seen(data)).action)


def test_the_command_switches_it_on(tmp_path):
    from vla_nb.run import train_settings
    words = ['--policy', 'openvla', '--data', 'd', '--out', 'o', '--model.image-aug', '--model.checkpointing', '--schedule', 'multistep', '--milestones', '10', '20', '--val-seconds', '5']
    c = parse_config(train_settings(words), words)
    assert c.model.image_aug and c.model.checkpointing and (c.train.schedule, c.train.milestones, c.train.val_seconds) == ('multistep', (10, 20), 5.)


@pytest.mark.parametrize('head, says', [('l1', {'l1', 'current_l1', 'next_l1'}), ('diffusion', {'diffusion', 'current_l1', 'next_l1'}), ('discrete', {'words', 'current_accuracy', 'next_accuracy', 'current_l1', 'next_l1'})])
def test_what_a_validation_logs(data, stats, tmp_path, head, says):
    p = make(data, stats, head=head)
    fit(p, data, tmp_path, steps=2)
    row = [r for r in read_log(tmp_path/'log.jsonl') if 'val/loss' in r][-1]
    assert {k.removeprefix('val/') for k in row if k.startswith('val/')} == {*says, 'loss', 'naming'}
    if head == 'l1': return
    parts, batch = p.eval().loss(p.prepare(data)).parts, p.prepare(data)
    if head == 'discrete':
        row = p._row(data.images, batch, batch['state'])
        off = (p.way.act(row, batch['action'])-p.way.bins.decode(batch['ids'][batch['slots']]).unflatten(0, batch['action'].shape)).abs()
        on = batch['valid'][..., None].expand_as(off)
        assert all(abs(parts[f'{k}_l1'] - off[:, s][on[:, s]].mean()) < 1e-6 for k,s in (('current', slice(1)), ('next', slice(1, None))))
    else: assert 0 < parts['current_l1'] < 2 and torch.equal(parts['next_l1'], p.loss(p.prepare(data)).parts['next_l1'])


def test_presets_at_full_size():
    "Rank 32 on the linear layers, the published rate, decay, head and sizes"
    sizes = {}
    for name,preset in presets.items():
        c,t = preset()
        assert (c.lora_rank, c.lora_alpha, c.lora_dropout, c.lora_merge, c.image_aug, c.head) == (32, 16., 0., True, True, 'l1')
        assert (t.lr, t.betas, t.weight_decay, t.clip, t.val_seconds, t.eval_every, t.save_every, t.steps) == (5e-4, (.9, .999), .01, 0., 180., 10_000, 10_000, 200_000)
        assert [lr_factor(k, t) for k in (0, 99_999, 100_000, 199_999)] == pytest.approx([1, 1, .1, .1])
        assert lr_factor(0, replace(t, warmup=10)) == pytest.approx(.19)
        p = on_meta(c)
        head = sum(q.numel() for q in p.way.parameters())
        assert head == 2*7*4096 + (7*4096+1)*4096 + 2*(2*4096 + 4096*4097) + 2*4096 + 4097*7
        model = {k for k,q in p.vlm.named_parameters() if not is_lora(k)}
        sizes[name] = sum(q.numel() for k,q in p.vlm.named_parameters() if k in model and not k.endswith('mask_token')) - 1024
    film = sum(torch.Size(s).numel() for s in IO.openvla_shapes(film=True).values())
    assert sizes == dict(openvla=7_541_237_184, openvla_oft=7_541_237_184, openvla_oft_film=film)


# Files: a base model, and a run with an adapter, a head and a projector

def base_model(data, stats, path, **kw):
    p = make(data, stats, **kw)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for k,q in p.named_parameters(): nn.init.normal_(q, std=.1)
    p.vlm.vision.dino.embeddings.position_embeddings.data[:, :1] = 0.    # released files have none of the class token
    IO.write_openvla(p.vlm, path)
    p.tokenizer.save_pretrained(path)
    return p.eval()


def oft_run(base, path):
    "An adapter beside every linear layer, under peft's names; head and projector as distributed training saves them"
    torch.manual_seed(7)
    adapter = {}
    for k,w in IO.to_released(base.vlm.state_dict()).items():
        if k.endswith('.weight') and w.ndim == 2 and 'embed' not in k: adapter |= {f'base_model.model.{k[:-7]}.lora_{x}.weight': torch.randn(s)*.1 for x,s in (('A', (2, w.shape[1])), ('B', (len(w), 2)))}
    (path/'lora_adapter').mkdir(parents=True)
    save_file(adapter, path/'lora_adapter'/'adapter_model.safetensors')
    write_json(path/'lora_adapter'/'adapter_config.json', dict(r=2, lora_alpha=1))
    for part,m in (('action_head', base.way.head), ('proprio_projector', base.state_token)): torch.save({f'module.{k}': v for k,v in m.state_dict().items()}, path/f'{part}--latest_checkpoint.pt')
    write_json(path/'dataset_statistics.json', dict(made=released_statistics(base.stats)))


@pytest.mark.parametrize('rank', [0, 2])
def test_a_run_with_an_adapter_begins_a_policy(data, stats, tmp_path, rank):
    "Base and adapter merged on the way, `module.` taken away, under a fresh adapter or none: it acts as the released run does"
    base = base_model(data, stats, tmp_path/'base')
    oft_run(base, tmp_path/'run')
    want = from_released(tmp_path/"run", tmp_path/"base", horizon=3, cameras=2, image_aug=False)
    want.rows = base.rows    # of the small vocabulary
    p = make(data, stats, lora_rank=rank, bounds='oft').eval()
    started = start_openvla(p, tmp_path/'run', tmp_path/'base')
    assert started.fresh == {'naming': 2} and started.source == 'a run of OpenVLA-OFT' and 'normalised by the statistics' in str(started)
    assert torch.allclose(p.act(seen(data)).action, want.act(seen(data)).action, atol=1e-5)
    alone = make(data, stats).eval()
    r = start_openvla(alone, tmp_path/'base')
    assert r.source == 'OpenVLA' and set(r.fresh) == {'way', 'state_token', 'naming'}
    assert torch.equal(alone.vlm.projector.fc1.weight, base.vlm.projector.fc1.weight)


def test_what_does_not_fit_is_refused_and_changes_nothing(data, stats, tmp_path):
    base = base_model(data, stats, tmp_path/'base')
    oft_run(base, tmp_path/'run')
    def refused(says, folder=tmp_path/'run', base=tmp_path/'base', **kw):
        p = make(data, stats, **kw)
        before = {k: v.clone() for k,v in p.state_dict().items()}
        with pytest.raises(ValueError, match=says): start_openvla(p, folder, base)
        assert all(torch.equal(v, before[k]) for k,v in p.state_dict().items())
    refused('name the model that it was trained beside with --model.vlm', base=None)
    refused('set --model.head l1', head='discrete')
    refused('set --model.head-width 32', head_width=16)
    refused('head and state_token', state_token=False)
    refused('name the model with --model.vlm', width=64, mlp=64, folder=tmp_path/'base', base=None)
    refused('name the model with --model.vlm', folder=tmp_path/'base', base=None, depth=2)
    torch.save({'fc1.weight': torch.ones(32, 3)}, tmp_path/'run'/'proprio_projector--latest_checkpoint.pt')
    refused('belong together')
    other = make(replace(data, instruction=['a', 'b', 'c', 'd']), stats)
    with pytest.raises(ValueError, match='tokenizer'): start_openvla(other, tmp_path/'base')
    class Other(OpenVLA): name = 'other'
    with pytest.raises(ValueError, match='adapters beside them'): start_openvla(make(data, stats), make(data, stats, lora_rank=2))


def test_from_another_run(data, stats):
    "What only one of the two has stays away, whole; a run under LoRA begins with the weights of a plain one"
    a = awake(make(data, stats, name_words=0.)).eval()
    nn.init.normal_(a.way.head.model.fc1.weight)
    b = make(data, stats, lora_rank=2).eval()
    r = start_openvla(b, a)
    assert r.fresh == {'naming': 2} and r.aside == () and torch.allclose(b.act(seen(data)).action, a.act(seen(data)).action, atol=1e-6)
    c = make(data, stats, name_words=0., state_token=False)
    assert start_openvla(c, make(data, stats)).aside == ('naming', 'state_token')
    with pytest.raises(ValueError, match='nothing was loaded'): start_openvla(make(data, stats, head_width=64), a)


@pytest.mark.parametrize('kw', [dict(), dict(head='diffusion', state_token=False), dict(film=True)], ids=str)
def test_export_reads_back_bit_for_bit(data, stats, tmp_path, kw):
    p = awake(make(data, stats, name_words=0., **kw)).eval()
    nn.init.normal_(p.vlm.vision.dino.embeddings.position_embeddings, std=.1)
    out = export_openvla(p, tmp_path/'oft')
    q = from_released(out, horizon=3, cameras=2, sample_steps=p.config.sample_steps, image_aug=p.config.image_aug)
    assert q.config.head == p.config.head and (q.state_token is None) == (p.state_token is None)
    for m in ('way', 'state_token'):
        if getattr(p, m): assert all(torch.equal(v, getattr(q, m).state_dict()[k]) for k,v in getattr(p, m).state_dict().items())
    a,b = (IO.to_released(x.vlm.state_dict()) for x in (p, q))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert {k: {n: q.stats[k][n] for n in ('q01', 'q99', 'mean', 'std')} for k in q.stats} == {k: {n: stats[k][n] for n in ('q01', 'q99', 'mean', 'std')} for k in stats}
    with pytest.raises(ValueError, match='no place'): export_openvla(p, tmp_path/'x', 'openvla')
    assert not (tmp_path/'x').exists()


def test_words_go_out_only_where_they_mean_the_same(data, stats, tmp_path):
    with pytest.raises(ValueError, match='below 32000'): export_openvla(make(data, stats, head='discrete', state_token=False), tmp_path/'x', 'openvla')
    with pytest.raises(ValueError, match='merge_lora'): export_openvla(make(data, stats, lora_rank=2), tmp_path/'x')
    from vla_nb.backbones.dual_vit import tiny_eyes
    from vla_nb.backbones.prismatic import tiny_llama
    torch.manual_seed(0)
    IO.write_openvla(Prismatic(*tiny_eyes(16, 3, 2, 8, 16), tiny_llama(32_064, 32, 1, 2, 48)), tmp_path/'base')
    make(data, stats).tokenizer.save_pretrained(tmp_path/'base')
    p = OpenVLA.from_data(replace(tiny, vlm=str(tmp_path/'base'), head='discrete', state_token=False, lora_rank=2, name_words=0.), [], stats)
    out = export_openvla(awake(p).merge_lora(), tmp_path/'out', 'openvla')
    again = OpenVLA.from_data(replace(tiny, vlm=str(out), head='discrete', state_token=False, name_words=0.), [], stats).eval()
    assert torch.equal(again.act(seen(data)).action, p.eval().act(seen(data)).action)
    assert released_stats(__import__('json').loads((out/'config.json').read_text())['norm_stats'])['action']['q99'] == stats['action']['q99']
