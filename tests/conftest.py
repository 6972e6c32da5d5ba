"Under pytest every public function's shapes and types are checked as it is called; in training nothing is"
import os
from contextlib import nullcontext

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('WANDB_MODE', 'disabled')

from jaxtyping import install_import_hook

install_import_hook('vla_nb', 'beartype.beartype')


@pytest.fixture
def assert_resumes(tmp_path):
    "Two steps and two more in another process's place are four: every weight, moment and average, bit for bit, and the last log row"
    def check(make, batch): # A new policy; `batch(policy, k)` of micro-step k
        from vla_nb.train.checkpoint import latest
        from vla_nb.train.config import TrainConfig
        from vla_nb.train.loop import train
        from vla_nb.train.track import read_log
        def run(out, *stops):
            for stop in stops:
                p = make()
                first = batch(p, 0)
                cfg = TrainConfig(steps=4, batch_size=len(first['seed']), lr=1e-3, warmup=1, ema=.9, save_every=1, eval_every=0, log_every=1, cpu=True, progress=False)
                with nullcontext() if stop == 4 else pytest.raises(ValueError, match='loader: ended'):
                    train(p, lambda start, rank, world: (batch(p, k) for k in range(start, stop)), cfg, out, [first], resume=stop != stops[0])
            files = {f.relative_to(latest(out)).as_posix(): f.read_bytes() for f in sorted(latest(out).rglob('*.safetensors'))}
            return type(p).from_pretrained(latest(out)), files, {k: v for k,v in read_log(out/'log.jsonl')[-1].items() if k != 'samples_per_s'}
        (a, files, row), (b, again, same) = run(tmp_path/'whole', 4), run(tmp_path/'parts', 2, 4)
        assert len(files) >= 4 and files.keys() == again.keys() and not [k for k in files if files[k] != again[k]]
        assert row == same and row['step'] == 4 and any(k.startswith('val/') for k in row)
        assert all((v == b.state_dict()[k]).all() for k,v in a.state_dict().items())
        return b, row
    return check


def pytest_collection_modifyitems(config, items):
    "Tests that need a browser run only when they are asked for, with `-m browser`"
    if 'browser' in (config.option.markexpr or ''): return
    left = [i for i in items if i.get_closest_marker('browser')]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [i for i in items if i not in left]
