"Every policy learns from every format of demonstrations, and where nothing was lost in writing the losses are equal"
from pathlib import Path

import numpy as np, pytest

from vla_nb.any_source import FORMATS, SMALL, every_format, read_smoke, small_demonstrations, smoke

root = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def data(tmp_path_factory): return every_format(small_demonstrations(), tmp_path_factory.mktemp('smoke'))


@pytest.mark.parametrize('policy', SMALL)
def test_every_format_trains_every_policy_alike(policy, data, tmp_path):
    rows = [smoke(p, policy, tmp_path/k, k) for k,p in data.items()]
    assert [r.source for r in rows] == list(FORMATS)
    for r in rows: assert len(r.losses) == 2 and np.isfinite(r.losses).all() and np.isfinite(r.moves)
    for r in rows[1:]: np.testing.assert_allclose(r.losses, rows[0].losses, rtol=1e-6)
    assert rows[0].losses[0] != rows[0].losses[1]
    kept = read_smoke(root/'results'/'smoke.json')
    assert {(r.source, r.policy) for r in kept} >= {(r.source, r.policy) for r in rows}, 'write results/smoke.json again'
