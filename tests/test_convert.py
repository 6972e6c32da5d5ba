"Converting, truncating and turning: nothing is lost that can be kept, what is lost is said, and a killed run goes on"
import os, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import h5py, numpy as np, pytest, torch
from scipy.spatial.transform import Rotation

from test_data import wander
from vla_nb.data.convert import Format, claim, compare, convert, hdf5, psnr
from vla_nb.data.doctor import check, declare
from vla_nb.data.episode import ArraySource, Episode, JpegFrames, encode_frame
from vla_nb.data.hdf5 import Hdf5Source, find_episodes, write_episode
from vla_nb.data.rotation import (axis_angle_to_matrix, euler_to_matrix, matrix_to_axis_angle, matrix_to_euler, matrix_to_quaternion, matrix_to_rot6d, matrix_to_rpy,
    pose_to_ten, quaternion_to_matrix, rot6d_to_matrix, rpy_to_matrix, ten_to_pose)
from vla_nb.data.truncate import truncate, truncate_file

root = Path(__file__).resolve().parent.parent


def jpegs(seed, l=12, **kw):
    e = wander(seed, l=l, **kw)
    e.cameras = {c: JpegFrames([encode_frame(f[i]) for i in range(len(f))]) for c,f in e.cameras.items()}
    return e


def full(seed, l=12): return jpegs(seed, l, subtask=[f'do {i//4}' for i in range(l)], reward=np.linspace(0, 1, l), success=bool(seed%2), fps=20., velocity=np.ones((l, 3))*seed, action_shift=seed%2, may_rest=('action 3',))


# conversion

@pytest.mark.parametrize('to', [hdf5(), hdf5(None), hdf5('lzf')], ids=['jpeg', 'raw', 'lzf'])
def test_every_field_survives(tmp_path, to):
    src = ArraySource([full(0), full(1), jpegs(2), full(3, l=1)])
    assert convert(src, tmp_path, to, progress=False) == dict(episodes=4, written=4, psnr=None)
    for i,e in enumerate(src.episodes): assert compare(e, Hdf5Source(tmp_path).episode(i)) == float('inf')


def test_stored_bytes_are_carried_over(tmp_path):
    src = ArraySource([full(i) for i in range(3)])
    convert(src, tmp_path/'a', progress=False)
    convert(Hdf5Source(tmp_path/'a'), tmp_path/'b', progress=False)
    b = Hdf5Source(tmp_path/'b')
    for i,e in enumerate(src.episodes):
        for c,f in e.cameras.items(): assert f.data == [b.episode(i).cameras[c].jpeg(t) for t in range(12)]


def test_raw_frames_in_jpeg_are_measured(tmp_path):
    src = ArraySource([wander(0, size=(48, 64))])
    db = convert(src, tmp_path/'a', hdf5(quality=95), progress=False)['psnr']
    assert 30 < convert(src, tmp_path/'b', hdf5(quality=60), progress=False)['psnr'] < db < 60
    with pytest.raises(ValueError, match='episode 0: camera top, frame 0: expected the same picture'): convert(src, tmp_path/'c', hdf5(quality=1), progress=False)
    assert [p.name for p in (tmp_path/'c').iterdir()] == ['made.json']


def test_psnr_is_that_of_the_textbook():
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a) == float('inf') and abs(psnr(a, a+1) - 48.1308) < 1e-3 and psnr(a, a+255) == 0


@pytest.mark.parametrize('field,change', [('action', lambda e: e.action.__setitem__((3, 1), 9)), ('state', lambda e: e.state.__setitem__((0, 0), 9)), ('reward', lambda e: setattr(e, 'reward', None)),
    ('velocity', lambda e: setattr(e, 'velocity', None)), ('instruction', lambda e: setattr(e, 'instruction', 'x')), ('subtask', lambda e: e.subtask.__setitem__(3, 'x')), ('success', lambda e: setattr(e, 'success', None)),
    ('fps', lambda e: setattr(e, 'fps', 3.)), ('action_shift', lambda e: setattr(e, 'action_shift', 1)), ('may_rest', lambda e: setattr(e, 'may_rest', ())),
    ('cameras', lambda e: e.cameras.pop('top')), ('camera top, frame 5', lambda e: e.cameras['top'].data.__setitem__(5, e.cameras['top'].data[4]))])
def test_whatever_a_writer_loses_is_named(field, change):
    a, b = full(0), full(0)
    assert compare(a, b) == float('inf')
    change(b)
    with pytest.raises(ValueError, match=f'^{field}: expected'): compare(a, b)


def test_a_bad_episode_stops_with_its_name_and_the_rest_goes_on_later(tmp_path):
    for i in range(4): write_episode(tmp_path/'in'/f'{i}.hdf5', full(i))
    whole = (tmp_path/'in'/'2.hdf5').read_bytes()
    src = Hdf5Source(tmp_path/'in')
    stamp = os.stat(tmp_path/'in'/'2.hdf5')
    (tmp_path/'in'/'2.hdf5').write_bytes(whole[:-9])
    broken = Hdf5Source(tmp_path/'in')
    with pytest.raises(ValueError, match='2.hdf5: .*expected a complete HDF5 file.*2 episodes of this run'): convert(broken, tmp_path/'out', progress=False)
    assert len(find_episodes(tmp_path/'out')) == 2
    (tmp_path/'in'/'2.hdf5').write_bytes(whole); os.utime(tmp_path/'in'/'2.hdf5', ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(ValueError, match='made of other data'): convert(Hdf5Source(tmp_path/'in'), tmp_path/'out', progress=False)


def test_other_settings_and_other_things_are_refused(tmp_path):
    src = ArraySource([full(0)])
    convert(src, tmp_path/'a', progress=False)
    with pytest.raises(ValueError, match='settings: expected'): convert(src, tmp_path/'a', hdf5(quality=50), progress=False)
    (tmp_path/'b').mkdir(); (tmp_path/'b'/'thesis.txt').write_text('mine')
    with pytest.raises(ValueError, match='expected a new or empty folder, found 1'): convert(src, tmp_path/'b', progress=False)
    assert claim(tmp_path/'c', dict(a=(1, 2))) == claim(tmp_path/'c', dict(a=[1, 2]))


def test_declarations_come_along(tmp_path):
    for i in range(6):
        e = full(i); e.may_rest, e.action[:,3] = (), 0
        write_episode(tmp_path/'in'/f'{i}.hdf5', e)
    declare(tmp_path/'in', 'action 3')
    convert(Hdf5Source(tmp_path/'in'), tmp_path/'out', progress=False)
    assert check(tmp_path/'out') == []


def test_killed_anywhere_it_goes_on_and_ends_as_if_it_never_was(tmp_path):
    for i in range(40): write_episode(tmp_path/'in'/f'{i}.hdf5', full(i))
    src = Hdf5Source(tmp_path/'in')
    convert(src, tmp_path/'once', progress=False)
    code = f'from vla_nb.data.convert import *\nprint("up", flush=True)\nconvert(Hdf5Source({str(tmp_path/"in")!r}), {str(tmp_path/"out")!r}, progress=False)'
    for wait in (.05, .12):
        p = subprocess.Popen([sys.executable, '-c', code], cwd=root, stdout=subprocess.PIPE)
        p.stdout.readline(); time.sleep(wait); p.send_signal(signal.SIGKILL); p.wait()
    convert(src, tmp_path/'out', progress=False)
    files = lambda at: {p.name: p.read_bytes() for p in at.iterdir()}
    assert files(tmp_path/'out') == files(tmp_path/'once')


# truncation

def test_what_is_kept_is_bit_for_bit_and_what_is_cut_is_only_steps(tmp_path):
    for compress in ('jpeg', 'lzf', None):
        a = write_episode(tmp_path/f'{compress}.hdf5', full(1, l=30), compress)
        with h5py.File(a, 'a') as f: f['observations/effort'], f['extra/table'], f['reasoning'] = np.arange(60.).reshape(30, 2), np.arange(5), ['once']
        for n in (1, 7, 29):
            assert truncate_file(a, tmp_path/'cut.hdf5', n) == (30, n)
            with h5py.File(a) as f, h5py.File(tmp_path/'cut.hdf5') as g:
                f.visititems(lambda k, v: isinstance(v, h5py.Group) or _same(k, v, g[k], n))
                assert g.attrs['truncated_from'] == 30 and 'success' not in g.attrs and dict(g.attrs).keys() - {'truncated_from'} == dict(f.attrs).keys() - {'success'}


def _same(k, v, w, n):
    cut = v[...,:n] if k == 'compress_len' else v[:n] if v.shape[0] == 30 else v[()]
    assert w.dtype == v.dtype and w.compression == v.compression and np.array_equal(w[()], cut), k


def test_short_episodes_are_copied_and_broken_ones_named(tmp_path):
    for i,l in enumerate((5, 10, 20)): write_episode(tmp_path/'in'/'sub'/f'{i}.hdf5', full(i, l))
    declare(tmp_path/'in', 'action 3')
    assert truncate(tmp_path/'in', tmp_path/'out', 10, progress=False) == dict(episodes=3, cut=1, steps=25, of=35)
    for i in (0, 1): assert (tmp_path/'in'/'sub'/f'{i}.hdf5').read_bytes() == (tmp_path/'out'/'sub'/f'{i}.hdf5').read_bytes()
    assert (tmp_path/'out'/'dataset.json').exists() and Hdf5Source(tmp_path/'out').lengths().tolist() == [5, 10, 10]
    with h5py.File(tmp_path/'in'/'sub'/'2.hdf5', 'a') as f:
        x = f['observations/qpos'][:6]; del f['observations/qpos']; f['observations/qpos'] = x
    with pytest.raises(ValueError, match='2.hdf5: observations/qpos: expected at least 10 steps, found 6'): truncate(tmp_path/'in', tmp_path/'out2', 10, progress=False)
    assert not list((tmp_path/'out2').rglob('*2.hdf5*'))


def test_where_it_may_not_write(tmp_path):
    write_episode(tmp_path/'in'/'0.hdf5', full(0))
    for out,n,said in ((tmp_path/'in'/'cut', 3, 'outside'), (tmp_path/'in', 3, 'outside'), (tmp_path/'out', 0, 'steps: expected at least 1')):
        with pytest.raises(ValueError, match=said): truncate(tmp_path/'in', out, n, progress=False)
    with pytest.raises(ValueError, match='found none'): truncate(tmp_path/'empty', tmp_path/'out', 3, progress=False)
    assert [p.name for p in (tmp_path/'in').iterdir()] == ['0.hdf5']


# rotations

def test_all_conversions_agree_with_scipy_in_float32_too():
    r = Rotation.random(2000, rng=1)
    for dtype,tol in ((torch.float64, 1e-7), (torch.float32, 2e-3)):
        m = torch.tensor(r.as_matrix(), dtype=dtype)
        for there,back in ((matrix_to_rot6d, rot6d_to_matrix), (matrix_to_quaternion, quaternion_to_matrix), (matrix_to_axis_angle, axis_angle_to_matrix), (matrix_to_euler, euler_to_matrix), (matrix_to_rpy, rpy_to_matrix)):
            assert (back(there(m))-m).abs().max() < tol and there(m).dtype == dtype


def test_batches_of_any_shape_and_gimbal_lock():
    m = torch.tensor(Rotation.random(24, rng=2).as_matrix()).reshape(2, 3, 4, 3, 3)
    assert matrix_to_rot6d(m).shape == (2, 3, 4, 6) and (rot6d_to_matrix(matrix_to_rot6d(m))-m).abs().max() < 1e-12
    assert matrix_to_quaternion(m[0,0,0]).shape == (4,) and matrix_to_axis_angle(m).shape == (2, 3, 4, 3)
    locked = euler_to_matrix(torch.tensor([[.3, torch.pi/2, .2], [.3, -torch.pi/2, .2]], dtype=torch.float64))
    assert (euler_to_matrix(matrix_to_euler(locked))-locked).abs().max() < 1e-7
    assert matrix_to_axis_angle(torch.eye(3)).tolist() == [0, 0, 0] and torch.equal(axis_angle_to_matrix(torch.zeros(3)), torch.eye(3))


def test_rotations_have_gradients_where_they_are_smooth():
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(rot6d_to_matrix, x)
    v = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(axis_angle_to_matrix, v)


def test_ten_numbers_of_a_pose():
    p = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (ten_to_pose(pose_to_ten(p))[:,[0, 1, 2, 6]] == p[:,[0, 1, 2, 6]]).all()
    assert (euler_to_matrix(ten_to_pose(pose_to_ten(p))[:,3:6])-euler_to_matrix(p[:,3:6])).abs().max() < 1e-9
    assert pose_to_ten(torch.zeros(7)).tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
