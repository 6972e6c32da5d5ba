"Training: settings on the command line, precisions, stopping, trackers, and what the loop refuses"
import json, os, signal, subprocess, sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from toy_policy import Toy, ToyConfig, curve, deep, digest, loader, new, settings, windows
from vla_nb.core import Batch, ParamGroup
from vla_nb.train.checkpoint import checkpoints, is_whole, latest, load_checkpoint
from vla_nb.train.config import TrainConfig, load_config, parse_config
from vla_nb.train.ema import EMA
from vla_nb.train.loop import train
from vla_nb.train.optim import build_optimizer, lr_factor
from vla_nb.train.track import read_log


def test_every_setting_has_its_help_line(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    with pytest.raises(SystemExit) as e: parse_config(TrainConfig, ['--help'])
    assert e.value.code == 0
    text = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
    lines = Path(sys.modules[TrainConfig.__module__].__file__).read_text().splitlines()
    for name in asdict(settings()):
        comment = next(l.split('# ', 1)[1] for l in lines if l.startswith(f'    {name}:'))
        assert comment in text, name


@pytest.mark.parametrize('given, says', [
    ({'stepz': 1}, "did you mean 'steps'"), ({'steps': 0}, 'at least 1'), ({'steps': 1.5}, 'expected int'), ({'lr': True}, 'expected float'),
    ({'betas': [.9]}, 'expected 2 values'), ({'precision': 'fp8'}, "expected one of ['no', 'bf16', 'fp16']"), ({'progress': 'yes'}, 'expected bool')])
def test_a_wrong_setting_is_named(given, says):
    with pytest.raises(ValueError) as e: load_config(TrainConfig, None, given)
    assert says in str(e.value)


def test_command_line_mistakes_exit_2(tmp_path):
    with pytest.raises(SystemExit) as e: parse_config(TrainConfig, ['--steps', 'many'])
    assert e.value.code == 2
    with pytest.raises(FileNotFoundError): parse_config(TrainConfig, ['--config', str(tmp_path/'none.yaml')])
    with pytest.raises(ValueError): parse_config(TrainConfig, ['--config'])


def test_schedule_is_over_true_steps():
    c = TrainConfig(steps=100, warmup=10, min_lr=.1)
    assert lr_factor(0, c) == .1 and lr_factor(9, c) == 1. and lr_factor(10, c) == 1.
    assert abs(lr_factor(99, c)-.1) < .001 and abs(lr_factor(100, c)-.1) < 1e-12
    assert all(lr_factor(k, c) >= lr_factor(k+1, c) for k in range(10, 100))


def test_frozen_parts_stay_and_groups_have_their_rates(tmp_path):
    p = new()
    before = {k: v.clone() for k,v in p.state_dict().items()}
    train(p, loader(8), settings(steps=5), tmp_path)
    for k,v in p.state_dict().items(): assert torch.equal(v, before[k]) == k.startswith('frozen'), k
    assert all(q.grad is None for k,q in p.named_parameters() if k.startswith('frozen'))
    opt = build_optimizer(p, settings())
    assert {(g['name'], g['own'].lr, g['weight_decay']) for g in opt.param_groups} == {('net', .005, 1e-4), ('net', .005, 0.), ('out', .01, .01), ('out', .01, 0.)}


def test_half_precision_weights_and_empty_training_are_refused():
    with pytest.raises(ValueError, match='float32 weights'): build_optimizer(new().to(torch.bfloat16), settings())
    p = new()
    p.groups = lambda: [ParamGroup('all', dict(p.named_parameters()), trainable=False)]
    with pytest.raises(ValueError, match='nothing to train'): build_optimizer(p, settings())


def test_bf16_autocast_keeps_float32_weights(tmp_path):
    end = train(new(), loader(8), settings(steps=20, precision='bf16'), tmp_path/'bf16', [windows(16, seed=1)])
    full = train(new(), loader(8), settings(steps=20), tmp_path/'no', [windows(16, seed=1)])
    assert end['val/loss'] != full['val/loss'] and abs(end['val/loss']-full['val/loss']) < .05*full['val/loss']
    assert {v.dtype for v in Toy.from_pretrained(end['checkpoint']).state_dict().values()} == {torch.float32}


def test_bfloat16_weights_lose_what_float32_masters_learn(tmp_path):
    "At 2e-5 most of AdamW's steps are smaller than the distance between two bfloat16 numbers"
    def mse(p): return p.eval().loss(windows(96)).parts['mse'].item()
    ours = new()
    train(ours, loader(32), settings(steps=200, batch_size=32, lr=2e-5, warmup=0, schedule='constant', ema=0., precision='bf16'), tmp_path)
    pure, start, batches = new().to(torch.bfloat16), mse(new()), loader(32)(0, 0, 1)
    weights = [p for k,p in pure.named_parameters() if not k.startswith('frozen')]
    opt = torch.optim.AdamW([dict(params=weights[:4], lr=1e-5), dict(params=weights[4:], lr=2e-5)], weight_decay=0)
    for _ in range(200):
        opt.zero_grad()
        with torch.autocast('cpu', torch.bfloat16): loss = pure.loss(next(batches)).total
        loss.backward()
        opt.step()
    with torch.no_grad(): ours_fell, pure_fell = start-mse(ours), start-mse(pure.float())
    print(f'fell by {ours_fell:.5f} with float32 masters, {pure_fell:.5f} without')
    assert ours_fell > 0 and pure_fell < .5*ours_fell


def test_vectors_are_never_decayed():
    "Biases, LayerNorm and RMSNorm gains; told by shape"
    opt, name = build_optimizer(p := deep(), settings(weight_decay=.1)), {id(q): k for k,q in p.named_parameters()}
    decayed = {name[id(q)] for g in opt.param_groups if g['weight_decay'] for q in g['params']}
    assert decayed == {'net.0.weight', 'out.weight', 'embed.weight', 'blocks.0.mlp.weight', 'blocks.1.mlp.weight'}


def test_constant_keeps_its_warm_up(tmp_path):
    train(new(), loader(8), settings(steps=6, warmup=4, schedule='constant'), tmp_path)
    assert [r['lr'] for r in read_log(tmp_path/'log.jsonl')] == pytest.approx([.0025, .005, .0075, .01, .01, .01])


def test_what_trains_is_printed_first(tmp_path, capsys):
    train(new(), loader(8), settings(steps=2, warmup=0, progress=True), tmp_path)
    rows = [l.split() for l in capsys.readouterr().err.splitlines()]
    assert ['frozen', '12', '0', '-', '-'] in rows and ['net', '96', '96', '0.005', '0.0001'] in rows and ['out', '136', '136', '0.01', '0.01'] in rows and ['total', '244', '232'] in rows


def test_the_policy_is_left_as_it_came(tmp_path):
    "No autocast, wrapper or hook stays on it, and its checkpoint is the averaged policy"
    p = new()
    end = train(p, loader(8), settings(steps=10, precision='bf16'), tmp_path)
    assert 'forward' not in p.__dict__ and not p._state_dict_hooks
    q, ema = Toy.from_pretrained(end['checkpoint']), EMA(p, .9)
    load_checkpoint(end['checkpoint'], p, ema)
    for k,v in ema.shadow.items(): assert torch.equal(q.state_dict()[k], v) and not torch.equal(v, p.state_dict()[k])


def test_validation_changes_nothing(tmp_path):
    a, b = settings(eval_every=3), settings(eval_every=0)
    train(new(dropout=.3), loader(8), a, tmp_path/'a', [windows(16, seed=1)])
    train(new(dropout=.3), loader(8), b, tmp_path/'b')
    drop = lambda rows: [{k: v for k,v in r.items() if not k.startswith('val/')} for r in curve(rows)]
    assert drop(read_log(tmp_path/'a/log.jsonl')) == drop(read_log(tmp_path/'b/log.jsonl'))
    assert [r['step'] for r in read_log(tmp_path/'a/log.jsonl') if 'val/loss' in r] == list(range(3, 31, 3))


def test_parts_are_means_whatever_the_accumulation(tmp_path):
    "Logged parts are not multiplied by the number of micro-batches"
    for name,b,k in ('big', 32, 1), ('small', 8, 4): train(new(), loader(b), settings(steps=4, batch_size=b, accumulate=k), tmp_path/name)
    for x,y in zip(read_log(tmp_path/'big/log.jsonl'), read_log(tmp_path/'small/log.jsonl')):
        for k in ('loss', 'loss/mse', 'loss/size', 'grad_norm'): assert abs(x[k]-y[k]) < 1e-6


def test_stops_when_asked_and_continues(tmp_path):
    "SIGTERM in a process of its own: exit code, message, checkpoint; the continuation is the whole run"
    code = '''
import os, signal, sys
from pathlib import Path
from toy_policy import *
from vla_nb.train.loop import train
def asks(start, rank, world):
    for k,b in enumerate(loader(8)(start, rank, world), start):
        if k == 12: os.kill(os.getpid(), signal.SIGTERM)
        yield b
train(new(dropout=.2), asks, settings(), Path(sys.argv[1]))
'''
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parent))
    r = subprocess.run([sys.executable, '-c', code, str(tmp_path/'asked')], capture_output=True, text=True, env=env)
    assert r.returncode == 128+signal.SIGTERM, r.stderr
    assert 'stopped by SIGTERM after step 13 of 30' in r.stderr and 'Traceback' not in r.stderr
    assert latest(tmp_path/'asked').name == 'checkpoint-000013' and len(read_log(tmp_path/'asked/log.jsonl')) == 13
    for name in ('asked', 'whole'): train(new(dropout=.2), loader(8), settings(), tmp_path/name, resume=True)
    assert curve(read_log(tmp_path/'asked/log.jsonl')) == curve(read_log(tmp_path/'whole/log.jsonl'))
    assert digest(latest(tmp_path/'asked')) == digest(latest(tmp_path/'whole'))


def test_signal_handlers_are_put_back(tmp_path):
    was = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train(new(), loader(8), settings(steps=4), tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == was


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_loss_that_is_not_finite_names_its_step(tmp_path, bad):
    def poisoned(start, rank, world):
        for k,b in enumerate(loader(8)(start, rank, world), start): yield Batch(b, action=b['action']*bad) if k == 12 else b
    with pytest.raises(FloatingPointError, match='step 13: loss is'): train(new(), poisoned, settings(), tmp_path)
    assert latest(tmp_path).name == 'checkpoint-000010'
    assert all(v.isfinite().all() for v in Toy.from_pretrained(latest(tmp_path)).state_dict().values())
    train(new(), loader(8), settings(), tmp_path, resume=True)
    assert [r['step'] for r in read_log(tmp_path/'log.jsonl')] == list(range(1, 31))


def test_refusals(tmp_path):
    cfg = settings(steps=10)
    with pytest.raises(ValueError, match='loader: ended at step 3 of 10'): train(new(), lambda *a: [windows(8)]*3, cfg, tmp_path/'short')
    train(new(), loader(8), cfg, tmp_path/'run')
    with pytest.raises(ValueError, match='expected a new folder, found checkpoint-000010'): train(new(), loader(8), cfg, tmp_path/'run')
    for change,says in (dict(lr=.5), 'lr was 0.01, now 0.5'), (dict(accumulate=2), 'samples a step were 8, now 16'), (dict(ema=0.), 'ema was 0.9'):
        with pytest.raises(ValueError, match=says): train(new(), loader(8), replace(cfg, **change), tmp_path/'run', resume=True)
    with pytest.raises(ValueError, match='expected shape'): train(new(width=8), loader(8), cfg, tmp_path/'run', resume=True)


def test_a_run_may_be_lengthened_and_a_finished_one_stays(tmp_path):
    cfg = settings(steps=10, schedule='constant')
    first = train(new(), loader(8), cfg, tmp_path/'run')
    again = train(new(), loader(8), cfg, tmp_path/'run', resume=True)
    assert (again['steps'], again['checkpoint'], again['loss']) == (10, first['checkpoint'], first['loss'])
    train(new(), loader(8), replace(cfg, steps=15), tmp_path/'run', resume=True)
    train(new(), loader(8), replace(cfg, steps=15), tmp_path/'straight')
    assert curve(read_log(tmp_path/'run/log.jsonl')) == curve(read_log(tmp_path/'straight/log.jsonl'))


def test_only_the_newest_checkpoints_stay(tmp_path):
    train(new(), loader(8), settings(steps=30, save_every=5, keep=3), tmp_path/'three')
    assert [p.name[-2:] for p in checkpoints(tmp_path/'three')] == ['20', '25', '30']
    train(new(), loader(8), settings(steps=30, save_every=10, keep=0), tmp_path/'all')
    assert [p.name[-2:] for p in checkpoints(tmp_path/'all')] == ['10', '20', '30']


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    cfg = settings(steps=20, keep=0)
    train(new(), loader(8), cfg, tmp_path)
    want = digest(tmp_path/'checkpoint-000020')
    for f in ('model.safetensors', 'training/state.json'):
        (tmp_path/'checkpoint-000020'/f).write_bytes(b'{')
        assert not is_whole(tmp_path/'checkpoint-000020') and latest(tmp_path).name == 'checkpoint-000015'
        train(new(seed=3), loader(8), cfg, tmp_path, resume=True)
        assert digest(tmp_path/'checkpoint-000020') == want


def test_no_pickle_in_a_checkpoint(tmp_path):
    end = train(new(), loader(8), settings(steps=5), tmp_path)
    assert {p.suffix for p in Path(end['checkpoint']).rglob('*') if p.is_file()} == {'.json', '.safetensors'}


def test_trackers_need_no_account(tmp_path, monkeypatch):
    for k in ('WANDB_API_KEY', 'WANDB_MODE'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('NETRC', str(tmp_path/'none'))
    monkeypatch.setenv('WANDB_SILENT', 'true')
    for name in ('WANDB_CACHE_DIR', 'WANDB_CONFIG_DIR', 'WANDB_DATA_DIR'): monkeypatch.setenv(name, str(tmp_path/'wandb_home'))
    train(new(), loader(8), settings(steps=6, track='wandb'), tmp_path/'run', run={'policy': {'name': 'toy'}})
    assert list((tmp_path/'run'/'wandb').glob('offline-run-*/*.wandb'))
    assert [r['step'] for r in read_log(tmp_path/'run/log.jsonl')] == list(range(1, 7))


def test_overhead_of_the_loop_is_small(tmp_path):
    "CPU time a step beyond forward, backward, AdamW and EMA themselves; generous, since other work shares the machine"
    import time
    p, n = new(), 300
    opt, ema, it = build_optimizer(p, settings()), EMA(p, .9), loader(8)(0, 0, 1)
    def bare():
        for _ in range(n):
            p(next(it)).total.backward(); opt.step(); opt.zero_grad(); ema.update()
    def full(k): train(new(), loader(8), settings(steps=n, save_every=0, log_every=50), tmp_path/str(k))
    def cost(f, *a):
        t = time.process_time(); f(*a); return (time.process_time()-t)/n*1e3
    full('warm'); bare()
    over = min(cost(full, k)-cost(bare) for k in range(3))
    print(f'{over:.2f} ms a step')
    assert over < 2


def test_sweeping_brings_back_a_folder_caught_between_two_names(tmp_path):
    "A kill between the renames that replace a folder leaves only the old one, under a hidden name; a nested write leaves other names"
    from vla_nb.train.checkpoint import sweep
    for name in ('.checkpoint-000004.77.old', 'checkpoint-000008', '.checkpoint-000008.77.old', '..checkpoint-000004.77.tmp.77.tmp', '.checkpoint-000002.deleted'):
        (tmp_path/name).mkdir()
        (tmp_path/name/'mark').write_text(name)
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint-000004', 'checkpoint-000008']
    assert (tmp_path/'checkpoint-000004'/'mark').read_text() == '.checkpoint-000004.77.old'


def test_a_validation_ends_when_its_time_is_over(tmp_path, monkeypatch):
    "At the same batches each time, and it says how many it read; with time enough it is the whole"
    from vla_nb.train import loop
    val, now = [windows(16, seed=i) for i in range(5)], [0.]
    def run(name, **kw):
        train(new(), loader(8), settings(steps=4, eval_every=2, **kw), tmp_path/name, val)
        return [{k: v for k,v in r.items() if k.startswith('val/')} for r in read_log(tmp_path/name/'log.jsonl') if 'val/loss' in r]
    whole, long = run('whole'), run('long', val_seconds=1e6)
    assert whole == long and 'val/batches_of_a_part' not in whole[0]
    class Clock:
        def perf_counter(self): now[0] += 1.; return now[0]
    monkeypatch.setattr(loop, 'time', Clock())
    part = run('part', val_seconds=2.5)
    assert [r.pop('val/batches_of_a_part') for r in part] == [3, 3]
    monkeypatch.undo()
    val[3:] = []
    assert part == run('three')


def test_after_each_step_the_policy_is_asked(tmp_path):
    p, seen = new(), []
    p.after_step = lambda step: seen.append((step, torch.is_grad_enabled()))
    train(p, loader(8), settings(steps=3, accumulate=2, warmup=0), tmp_path)
    assert seen == [(1, False), (2, False), (3, False)]
