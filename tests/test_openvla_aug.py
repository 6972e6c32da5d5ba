"TensorFlow's pictures replayed by the command's own path, and spoilt copies of the recording refused"
from pathlib import Path

import numpy as np
import pytest

from vla_nb import parity as P

recorded = Path(__file__).parent/'fixtures'/'openvla_aug.npz'


def spoilt(tmp_path, **change):
    with np.load(recorded) as f: arrays = {k: f[k] for k in f.files}
    for k, v in change.items(): arrays[k] = v(arrays[k]) if k in arrays else v
    np.savez(tmp_path/'openvla_aug.npz', **arrays)
    return [r.name for r in P.check(tmp_path/'openvla_aug.npz') if not r.ok]


def test_pictures_equal_tensorflows(capsys):
    assert P.parity(recorded) and 'all within tolerance' in capsys.readouterr().out


def test_a_spoilt_picture_a_wrong_strength_and_a_stranger_fail(tmp_path):
    bright = spoilt(tmp_path, hue_param=lambda x: x+.01, lanczos3_30=lambda x: x ^ 1, stranger=np.ones(3), aug_out=lambda x: np.concatenate([x[:1, ::-1], x[1:2]]))
    assert bright == ['hue', 'lanczos3_30', 'aug_out/0 (five numbers found)', 'stranger: nothing read it']


def test_a_file_that_is_no_recording_is_refused(tmp_path):
    (tmp_path/'openvla_aug.npz').write_bytes(recorded.read_bytes()[:1000])
    with pytest.raises(ValueError, match='allow_pickle=False'): P.check(tmp_path/'openvla_aug.npz')
    np.savez(tmp_path/'mine.npz', image=np.ones(3))
    with pytest.raises(ValueError, match="found 'mine'"): P.check(tmp_path/'mine.npz')
    np.savez(tmp_path/'mine.npz', x=np.array([None, {}], dtype=object))
    with pytest.raises(ValueError, match='allow_pickle=False'): P.check(tmp_path/'mine.npz')
