"""Two processes are one process with twice the batch: same losses, gradient norms and weights, and the same after a resume.

The chunks' padding differs from sample to sample, so an average of the processes' means would not pass.
"""
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch

from toy_policy import curve, loader, new, settings, windows

kw = dict(steps=12, save_every=6, eval_every=6, log_every=4)
val = [windows(32, seed=1), windows(16, seed=2)]


def runs(out, batch_size, accumulate):
    "A run; and the same run whose second half is a continuation"
    from vla_nb.train.loop import train
    cfg = settings(**kw, batch_size=batch_size, accumulate=accumulate)
    train(new(), loader(batch_size), cfg, out, val)
    rank = int(os.environ.get('RANK', 0))
    again = out.with_name(f'{out.name}_again')
    if rank == 0:
        shutil.copytree(out, again)
        shutil.rmtree(again/'checkpoint-000012')
    if torch.distributed.is_initialized(): torch.distributed.barrier()
    train(new(seed=5), loader(batch_size), cfg, again, val, resume=True)


def numbers(out):
    from vla_nb.train.track import read_log
    rows = curve(read_log(out/'log.jsonl'))
    assert [r['step'] for r in rows] == list(range(1, 13))
    return rows


def weights(out, kind):
    from safetensors.torch import load_file
    return load_file(out/'checkpoint-000012'/kind)


def same(a, b, tol=1e-6):
    for x,y in zip(numbers(a), numbers(b), strict=True):
        assert x.keys() == y.keys()
        for k in x: assert abs(x[k]-y[k]) < tol, f'step {x["step"]}: {k}: {x[k]} and {y[k]}'
    for kind in ('model.safetensors', 'training/weights.safetensors'):
        x,y = weights(a, kind), weights(b, kind)
        assert x.keys() == y.keys() and not any('module.' in k for k in x)
        for k in x: torch.testing.assert_close(x[k], y[k], atol=5e-6, rtol=0)


def launch(tmp_path, *options):
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    # --cpu would start a single process unless MPI is configured; --multi_gpu is torch's launcher, which needs no GPU
    cmd = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
        '--dynamo_backend', 'no', '--main_process_port', '0', *options, __file__, str(tmp_path)]
    r = subprocess.run(cmd, capture_output=True, text=True, env=env, timeout=300)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-4000:]


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp('one')
    runs(out/'one', 8, 4)
    return out/'one'


def test_two_processes_are_one_with_twice_the_batch(one, tmp_path):
    "DDP over gloo, two accumulation steps on two processes, against four accumulation steps on one"
    launch(tmp_path)
    same(one, tmp_path/'run')
    assert numbers(tmp_path/'run_again') == numbers(tmp_path/'run')    # continued on two processes: bit for bit
    for k,v in weights(tmp_path/'run', 'training/weights.safetensors').items():
        assert torch.equal(v, weights(tmp_path/'run_again', 'training/weights.safetensors')[k])
    state = json.loads((tmp_path/'run'/'checkpoint-000012'/'training'/'state.json').read_text())
    assert state['world'] == 2 and state['samples'] == 12*32


def test_one_batch_is_its_micro_batches(one, tmp_path):
    "One batch of 32 against four micro-batches of 8, on the same windows"
    runs(tmp_path/'big', 32, 1)
    same(one, tmp_path/'big')


if __name__ == '__main__':
    torch.set_num_threads(1)
    runs(Path(sys.argv[1])/'run', 8, 2)
    torch.distributed.destroy_process_group()
