"""Two processes are one process with twice the batch, under every engine: same losses, gradient norms and weights, and the same after a resume.

The chunks' padding differs from sample to sample, so an average of the processes' means would not pass. The policy has a frozen
part, blocks, and a last matrix tied to its embedding; its gradients are clipped. DeepSpeed is an extra: where it is installed, its ZeRO-2
takes part (`results/engines.json` holds a run with it).
"""
import importlib, importlib.util, json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch

from toy_policy import Deep, ToyConfig, curve, deep, loader, settings, several, windows

root = Path(__file__).resolve().parent.parent
engines = ['ddp', 'fsdp2'] + ['zero2']*(importlib.util.find_spec('deepspeed') is not None)
kw = dict(steps=8, save_every=4, eval_every=4, log_every=2, clip=.3)
val = [windows(32, seed=1), windows(16, seed=2)]


def runs(out, batch_size, accumulate, make=deep, **more):
    "A run; and the same run whose second half is a continuation"
    from vla_nb.train.loop import train
    cfg = settings(**{**kw, **more}, batch_size=batch_size, accumulate=accumulate)
    train(make(), loader(batch_size), cfg, out, val)
    continued(out, out.with_name(f'{out.name}_again'), batch_size, accumulate, make, **more)


def continued(out, again, batch_size, accumulate, make=deep, **more):
    from vla_nb.train.loop import train
    if int(os.environ.get('RANK', 0)) == 0:
        shutil.copytree(out, again)
        shutil.rmtree(again/'checkpoint-000008')
    if torch.distributed.is_initialized(): torch.distributed.barrier()
    train(make(seed=5), loader(batch_size), settings(**{**kw, **more}, batch_size=batch_size, accumulate=accumulate), again, val, resume=True)


def numbers(out):
    from vla_nb.train.track import read_log
    rows = curve(read_log(out/'log.jsonl'))
    assert [r['step'] for r in rows] == list(range(1, 9))
    return rows


def weights(out, kind='training/weights.safetensors'):
    from safetensors.torch import load_file
    return load_file(out/'checkpoint-000008'/kind)


def apart(a, b):
    "The largest difference in any logged number, and in any tensor of the last checkpoints"
    logs = max(abs(x[k]-y[k]) for x,y in zip(numbers(a), numbers(b), strict=True) for k in x.keys() | y.keys())
    tensors = 0.
    for kind in ('model.safetensors', 'training/weights.safetensors', 'training/ema.safetensors', 'training/optimizer.safetensors'):
        x,y = weights(a, kind), weights(b, kind)
        assert x.keys() == y.keys() and not any('module.' in k or 'policy.' in k or k == 'read.weight' for k in x)
        tensors = max(tensors, *((x[k]-y[k]).abs().max().item() for k in x))
    return dict(log=logs, tensors=tensors)


def launch(out, engine, *what):
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', DS_ACCELERATOR='cpu')
    cmd = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(root/'docs'/'accelerate'/f'{engine}.yaml'), __file__, str(out), engine, *what]
    r = subprocess.run(cmd, capture_output=True, text=True, env=env, timeout=500)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-6000:]
    return json.loads(r.stdout.split('KIND ')[1].splitlines()[0])


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp('one')
    runs(out/'one', 8, 4)
    return out/'one'


@pytest.mark.parametrize('engine', engines)
def test_two_processes_are_one_with_twice_the_batch(engine, one, tmp_path):
    "Two accumulation steps on two processes, against four accumulation steps on one"
    kind = launch(tmp_path, engine)
    assert kind['type'] == {'ddp': 'MULTI_CPU', 'fsdp2': 'FSDP', 'zero2': 'DEEPSPEED'}[engine]
    assert (kind['held'] < kind['all']) == (engine != 'ddp'), kind    # a process holds a part of the averages only
    assert max(apart(one, tmp_path/'run').values()) < 5e-6
    assert apart(tmp_path/'run', tmp_path/'run_again') == dict(log=0, tensors=0)    # continued on two processes: bit for bit
    norms = [r['grad_norm'] for r in numbers(one)]
    assert max(norms) > kw['clip'], 'nothing would have been clipped'
    state = json.loads((tmp_path/'run'/'checkpoint-000008'/'training'/'state.json').read_text())
    assert state['world'] == 2 and state['samples'] == 8*32
    p = Deep.from_pretrained(tmp_path/'run'/'checkpoint-000008')
    assert p.read.weight is p.embed.weight


@pytest.mark.parametrize('engine', engines[1:])
def test_a_run_may_change_its_engine(engine, one, tmp_path):
    "Begun by one process, continued by two that share"
    launch(tmp_path, engine, str(one))
    assert max(apart(one, tmp_path/'run_again').values()) < 5e-6


@pytest.mark.parametrize('engine', engines[:2])
def test_groups_with_settings_of_their_own(engine, tmp_path):
    "A group that is clipped alone, with its own memories, schedule and delay: two processes are one, and a resume goes on"
    runs(tmp_path/'one', 8, 4, several)
    launch(tmp_path, engine, 'several')
    assert max(apart(tmp_path/'one', tmp_path/'run').values()) < 5e-6
    assert apart(tmp_path/'run', tmp_path/'run_again') == dict(log=0, tensors=0)


def test_clipping_counts(one, tmp_path):
    "Without clipping it is another run: the comparison above would notice"
    runs(tmp_path/'free', 8, 4, clip=0.)
    assert apart(one, tmp_path/'free')['tensors'] > 1e-3


def test_one_batch_is_its_micro_batches(one, tmp_path):
    "One batch of 32 against four micro-batches of 8, on the same windows"
    runs(tmp_path/'big', 32, 1)
    assert max(apart(one, tmp_path/'big').values()) < 5e-6


runs_of_dexvla = ('full', 'no'), ('lora', 'bf16')


def dexvla(out, accumulate, toy='toy_dexvla'):
    run = importlib.import_module(toy).run
    for kind,precision in runs_of_dexvla: run(out/f'{kind}_{precision}', kind, precision, accumulate)


def dexvla_apart(a, b):
    "Of DexVLA's runs: relative, in the log; absolute, in the tensors"
    from safetensors.torch import load_file
    from vla_nb.train.track import read_log
    out = {}
    for kind,precision in runs_of_dexvla:
        x,y = a/f'{kind}_{precision}', b/f'{kind}_{precision}'
        logs = max(abs(r[k]-s[k])/abs(r[k]) for r,s in zip(read_log(x/'log.jsonl'), read_log(y/'log.jsonl'), strict=True) for k in r if k.startswith('loss') or k == 'grad_norm')
        pairs = [[load_file(d/'checkpoint-000002'/f) for d in (x, y)] for f in ('model.safetensors', 'training/weights.safetensors', 'training/optimizer.safetensors')]
        assert all(p.keys() == q.keys() for p,q in pairs)
        out[f'{kind}, precision {precision}'] = dict(log=logs, tensors=max((p[k]-q[k]).abs().max().item() for p,q in pairs for k in p))
    return out


def test_dexvla_is_the_same_on_two_processes(tmp_path):
    "Stock Qwen2-VL with its tied embedding and gradient checkpointing, and LoRA over frozen weights in bfloat16"
    dexvla(tmp_path/'one', 4)
    launch(tmp_path/'two', engines[-1], 'dexvla')
    for kind,d in dexvla_apart(tmp_path/'one', tmp_path/'two').items(): assert max(d.values()) < 1e-5, (kind, d)


@pytest.mark.parametrize('engine', engines[:2])
def test_openvla_is_the_same_on_two_processes(engine, tmp_path):
    "Eyes whose blocks are walked through from outside are gathered whole; with FiLM, LoRA and recomputed activations"
    dexvla(tmp_path/'one', 4, 'toy_openvla')
    launch(tmp_path/'two', engine, 'openvla')
    for kind,d in dexvla_apart(tmp_path/'one', tmp_path/'two').items(): assert max(d.values()) < 1e-5, (kind, d)


def worker(out, engine, start=None, name='run_again'):
    "What each of the two processes does"
    torch.set_num_threads(1)
    if engine == 'zero2':
        import deepspeed
        deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False    # a C++ extension for CPU clusters, minutes to compile
    from vla_nb.train import loop
    first, seen = loop.open_engine, {}
    def watched(policy, cfg):
        e = first(policy, cfg)
        step = e.step
        def measured(scale):
            norm = step(scale)
            states = (e.zero.optimizer if engine == 'zero2' else e.opt).state
            local = lambda t: t.to_local() if hasattr(t, 'to_local') else t
            seen.update(type=e.acc.distributed_type.value, held=sum(local(s['exp_avg']).numel() for s in states.values()), all=sum(p.numel() for p in policy.parameters() if p.requires_grad))
            return norm
        e.step = measured
        return e
    loop.open_engine = watched
    out = Path(out)
    if start in ('dexvla', 'openvla'): dexvla(out, 2, f'toy_{start}')
    elif start == 'several': runs(out/'run', 8, 2, several)
    elif start: continued(Path(start), out/name, 8, 2)
    else: runs(out/'run', 8, 2)
    if int(os.environ['RANK']) == 0: print('KIND '+json.dumps(seen), flush=True)
    torch.distributed.destroy_process_group()


def record(file):
    "Run every engine that is installed and write how far each is from one process"
    import platform, tempfile
    from vla_nb.bench import where
    from vla_nb.core import write_json
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        one = Path(tmp)/'one'
        runs(one, 8, 4)
        runs(Path(tmp)/'free', 8, 4, clip=0.)
        dexvla(Path(tmp)/'dexvla', 4)
        rows = []
        for e in engines:
            kind = launch(Path(tmp)/e, e)
            launch(Path(tmp)/e, e, str(one), 'moved')
            launch(Path(tmp)/f'{e}_dexvla', e, 'dexvla')
            rows.append(dict(engine=e, dexvla=dexvla_apart(Path(tmp)/'dexvla', Path(tmp)/f'{e}_dexvla'), **kind, apart=apart(one, Path(tmp)/e/'run'), resumed=apart(Path(tmp)/e/'run', Path(tmp)/e/'run_again'), moved=apart(one, Path(tmp)/e/'moved')))
        found = importlib.util.find_spec('deepspeed')
        write_json(file, dict(rows=rows, unclipped=apart(one, Path(tmp)/'free'), clip=kw['clip'], norms=[r['grad_norm'] for r in numbers(one)],
            deepspeed=__import__('importlib.metadata').metadata.version('deepspeed') if found else None, accelerate=__import__('accelerate').__version__, **where()))


if __name__ == '__main__': record(sys.argv[2]) if sys.argv[1] == 'record' else worker(*sys.argv[1:])
