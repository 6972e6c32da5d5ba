"""Kill -9 at any moment: the continued run is, bit for bit, the run that was never killed.

A driver imports torch once and forks the training processes, so that a kill costs milliseconds and not an import. Two ways
to die: after a random time (anywhere), and at the n-th system call that makes something durable (fsync, rename, write of a
tensor file), which walks through every stage of writing a checkpoint, cutting the log and pruning.
"""
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

seed = 7
cfg_kw = dict(steps=40, save_every=4, log_every=3, eval_every=10, keep=2)


def child(out, die_at=None):
    "One training process; never returns"
    from toy_policy import loader, new, settings, windows
    from vla_nb.train.loop import train
    if die_at is not None:
        import safetensors.torch
        left = [die_at]
        def deadly(f):
            def g(*a, **kw):
                left[0] -= 1
                if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
                return f(*a, **kw)
            return g
        os.fsync, os.replace, os.unlink, os.rmdir = map(deadly, (os.fsync, os.replace, os.unlink, os.rmdir))
        save = safetensors.torch.save_file
        def half(tensors, path, *a, **kw):    # the file's name exists, half its bytes are there
            save(tensors, path, *a, **kw)
            left[0] -= 1
            if left[0] == 0:
                os.truncate(path, Path(path).stat().st_size//2)
                os.kill(os.getpid(), signal.SIGKILL)
        safetensors.torch.save_file = half
    try:
        train(new(dropout=.2), loader(8), settings(**cfg_kw), out, [windows(32, seed=1)], resume=True)
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(3)


def run(out, die_at=None, kill_after=None):
    "'done', 'killed', or 'failed'"
    pid = os.fork()
    if pid == 0: child(out, die_at)
    if kill_after is not None:
        end = time.monotonic()+kill_after
        while time.monotonic() < end:
            time.sleep(min(.005, max(0., end-time.monotonic())))
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    _,status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status): return 'killed'
    return 'done' if os.WEXITSTATUS(status) == 0 else 'failed'


def main(tmp):
    import torch
    from accelerate import Accelerator
    from toy_policy import curve, digest, new, settings
    from vla_nb.train.checkpoint import checkpoints, latest
    from vla_nb.train.optim import build_optimizer
    from vla_nb.train.track import read_log
    torch.set_num_threads(1)
    Accelerator(cpu=True)    # these two import a good part of torch, once for all children; no backward pass runs in this process
    build_optimizer(new(), settings())
    rng, tmp = random.Random(seed), Path(tmp)
    began = time.monotonic()
    assert run(tmp/'whole') == 'done'
    once = time.monotonic()-began
    want, bits = curve(read_log(tmp/'whole'/'log.jsonl')), digest(latest(tmp/'whole'))
    assert [r['step'] for r in want] == list(range(1, cfg_kw['steps']+1))

    def check(out, where):
        got = curve(read_log(out/'log.jsonl'))
        assert got == want, f'{where}: the curve differs at {next(i for i,(a,b) in enumerate(zip(got, want)) if a != b) if len(got) == len(want) else len(got)}'
        assert digest(latest(out)) == bits, f'{where}: the weights differ'
        assert [p.name for p in checkpoints(out)] == [p.name for p in checkpoints(tmp/'whole')]
        assert not list(out.glob('.*')), f'{where}: litter {list(out.glob(".*"))}'

    # anywhere in time: several kills a run, the last start is left alone
    kills, k = dict(random=0, call=0), 0
    while kills['random'] < 12:
        out, k = tmp/f'random{k}', k+1
        for _ in range(4):
            end = run(out, kill_after=rng.uniform(0, once))
            assert end != 'failed', out
            kills['random'] += end == 'killed'
            if end == 'done': break
        if end != 'done': assert run(out) == 'done', out
        check(out, out.name)
    # at the n-th durable call, one after the other: every stage of a checkpoint
    out = tmp/'calls'
    for n in range(2, 44):
        end = run(out, die_at=n)
        assert end != 'failed', f'call {n}'
        if end == 'done': check(out, f'call {n}'); shutil.rmtree(out)
        kills['call'] += end == 'killed'
    if run(out) == 'done': check(out, 'calls')
    else: raise AssertionError('calls')
    print(json.dumps(dict(kills, once=round(once, 2), seconds=round(time.monotonic()-began, 1))))


def test_killed_and_continued(tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    r = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, env=env, timeout=600)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-4000:]
    kills = json.loads(r.stdout.splitlines()[-1])
    print(kills)
    assert kills['random'] >= 10 and kills['call'] >= 10 and kills['random']+kills['call'] >= 20, kills


if __name__ == '__main__': main(sys.argv[1])
