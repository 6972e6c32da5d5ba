"Returns beyond the page: the recorded ones of the original, flags through all formats, and the windows of a critic"
import json, subprocess, sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from vla_nb.data.convert import convert, hdf5
from vla_nb.data.dataset import open_source
from vla_nb.data.doctor import check
from vla_nb.data.episode import ArraySource, Episode, Subset
from vla_nb.data.folders import folders
from vla_nb.data.lerobot_write import lerobot
from vla_nb.data.loader import Loader
from vla_nb.data.mixture import MixedWindows
from vla_nb.data.parquet import parquet
from vla_nb.data.returns import ValueWindows, mc_returns, n_step, rewards
from vla_nb.data.rlds_write import rlds
from vla_nb.data.windows import Windows

recorded = torch.load(Path(__file__).parent/'fixtures'/'calql.pt', weights_only=True)


def numbered(e, l, success):
    a = 10.*e + np.arange(l)[:, None]*[1., .5]
    frames = np.broadcast_to((10*e + np.arange(l))[:, None, None, None], (l, 16, 16, 3)).astype(np.uint8)
    return Episode({'top': frames}, a, a, f'task {e}', success=success, fps=10., subtask=['go']*l)


def test_recorded_returns():
    "Rewards and masks are those that the original makes; its returns are the rewards (an error), and ours what it meant"
    meant, written, b = recorded['rewards_intended'], recorded['rewards_as_written'], np.array([0, 12])
    reward, mask = rewards(np.array([12]), np.array([True]))
    for r in (meant, written):
        assert torch.equal(torch.from_numpy(reward), r['reward'])
        assert torch.equal(torch.from_numpy(mask).float(), r['mask'])
    assert torch.equal(written['mc'], written['reward'])
    assert torch.allclose(torch.from_numpy(mc_returns(reward, mask, b, recorded['meta']['discount'])), meant['mc'], atol=1e-5)


@pytest.mark.parametrize('n', [1, 3, 50])
def test_identity_on_short_episodes(n):
    "Episodes of one frame, of fewer frames than the goal has, and failures: n steps and the return after them are the return"
    lengths, won = np.array([1, 2, 1, 9, 30]), np.array([True, True, False, False, True])
    b = np.cumsum([0, *lengths])
    r, m = rewards(lengths, won)
    G = mc_returns(r, m, b, .9)
    R, alive, after = n_step(r, m, b, .9, n)
    np.testing.assert_allclose(R + .9**n*alive*G[after], G, atol=1e-5)
    np.testing.assert_allclose(G[b[2]:b[4]], -10, atol=1e-5)    # both failures


@pytest.mark.parametrize('name, to', [('hdf5', hdf5), ('folders', folders), ('parquet', parquet), ('rlds', rlds), ('lerobot', lerobot)])
def test_flags_survive_every_format(tmp_path, name, to):
    "A success, a failure and an unknown come back as such from all five formats, and make the same returns; the unknown one is refused until somebody says how it ended"
    flags = [True, False, None]
    source = ArraySource([numbered(e, 12, f) for e, f in enumerate(flags)])
    convert(source, tmp_path/name, to(), progress=False)
    back = open_source(tmp_path/name)
    assert [back.episode(i).success for i in range(3)] == flags
    with pytest.raises(ValueError, match=r"success: expected true or false, .* 0 more of 3 episodes; .*'\?success=all'"): ValueWindows(Windows(back, 4))
    said = open_source(f'{tmp_path}/{name}?success=all')
    assert [said.episode(i).success for i in range(3)] == [True, False, True] and said.fingerprint != back.fingerprint and check(said) == check(back)
    a, b = (ValueWindows(Windows(s, 4), success=f) for s, f in ((source, [True, False, True]), (said, None)))
    assert np.array_equal(a.mc, b.mc) and (a.mc[12:24] < -49.9).all() and np.array_equal(a.mc[:12], a.mc[24:])


def test_weights_of_a_mixture_are_kept():
    "Value windows of weighted windows keep their order, and a subset its frames"
    source = Subset(ArraySource([numbered(e, 12, e < 2) for e in range(4)]), [3, 0, 2])
    mixed = MixedWindows(source, 4, np.array([0, 1, 1]), (.25, .75))
    value = ValueWindows(mixed)
    a, b = (Loader(w, 8, lambda s: s, size=(16, 16)).batch(2) for w in (mixed, value))
    assert torch.equal(a.images, b.images) and torch.equal(a.seed, b.seed)
    assert torch.equal(b.next_obs.images[:, 0, 0, 0, 0].float(), b.next_obs.state[:, 0])
    assert value.success.tolist() == [False, True, False]


def test_own_rewards():
    "Recorded rewards add up as they are; a wrong number of them is refused"
    w = Windows(ArraySource([numbered(0, 5, False)]), 2)
    v = ValueWindows(w, gamma=.5, reward=[1, 0, 2, 0, 0])
    np.testing.assert_allclose(v.mc, [1.5, 1, 2, 0, 0])
    with pytest.raises(ValueError, match='one for each step'): ValueWindows(w, reward=[1.])


outside = """
import sys
from pathlib import Path
from vla_nb.data.dataset import open_source
from vla_nb.data.doctor import check
for name in ('hdf5', 'folders'):
    try: open_source(Path(sys.argv[1])/name).episode(0)
    except ValueError as e: print(e)
"""


def test_a_flag_is_true_or_false(tmp_path):
    "A text 'False' is no flag: it would count as true. Readers (without the types that tests check) and the doctor refuse it by name"
    for name, to in (('hdf5', hdf5), ('folders', folders)): convert(ArraySource([numbered(0, 12, False)]), tmp_path/name, to(), progress=False)
    with h5py.File(next((tmp_path/'hdf5').rglob('*.hdf5')), 'r+') as f: f.attrs['success'] = 'False'
    said = next((tmp_path/'folders').rglob('episode.json'))
    said.write_text(json.dumps(json.loads(said.read_text()) | {'success': 'no'}))
    r = subprocess.run([sys.executable, '-c', outside, str(tmp_path)], capture_output=True, text=True)
    assert r.stdout.count('success: expected true, false or nothing') == 2 and "'False'" in r.stdout and "'no'" in r.stdout, r.stderr
    assert any(f.field == 'success' for f in check(open_source(tmp_path/'folders')))
