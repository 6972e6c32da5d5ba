"Conventions of Open X-Embodiment and OpenVLA: TensorFlow's image operations to a millionth, grippers by the obvious loop, statistics there and back"
import json
from pathlib import Path

import numpy as np, pytest, torch

from test_data import wander
from vla_nb.data.episode import ArraySource
from vla_nb.data.openvla_images import augment_openvla, brightness, center_crop, contrast, crop_and_resize, hue, random_boxes, resize_lanczos, saturation
from vla_nb.data.oxe import absolute_gripper, binarize_gripper, bridge, bridge_oxe, dataset_statistics, fractal, libero, minmax_bounds, quantile_bounds, read_statistics
from vla_nb.data.parts import decode_picture
from vla_nb.data.rlds import RldsSource

tf = np.load(Path(__file__).parent/'fixtures'/'openvla_aug.npz')
image = torch.from_numpy(tf['image']).permute(2, 0, 1)[None]


def far(x, name): return float((x[0].permute(1, 2, 0)-torch.from_numpy(tf[name])).abs().max())


@pytest.mark.parametrize('name,f', [('brightness', brightness), ('contrast', contrast), ('contrast2', contrast), ('saturation', saturation), ('saturation2', saturation), ('hue', hue), ('hue2', hue)])
def test_colours_are_tensorflows_to_a_millionth(name, f):
    out = f(image.float()/255, torch.tensor([float(tf[f'{name}_param'])]))
    assert min(far(out, name), far(out.clamp(0, 1), name)) < 1e-6


def test_the_centre_crop_is_tensorflows():
    box = random_boxes(torch.full((1, 2), .5))
    assert far(crop_and_resize(image.float()/255, box), 'center_crop') < 2e-6
    assert (center_crop(image[None])[0,0].permute(1, 2, 0).float()-255*torch.from_numpy(tf['center_crop'])).abs().max() <= .51


@pytest.mark.parametrize('n', [30, 32, 64])
def test_the_resize_is_tensorflows_to_the_byte(n):
    off = (resize_lanczos(image[None], n, n)[0,0].permute(1, 2, 0).int()-torch.from_numpy(tf[f'lanczos3_{n}']).int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < .001    # a tie may round either way


def test_the_default_decoder_of_tensorflow_is_another_one():
    off = np.abs(decode_picture(tf['jpeg_bytes'].tobytes()).astype(int)-tf['jpeg_tf_default'])
    assert 0 < off.max() <= 8 and off.mean() < 2


def test_augmentation_belongs_to_the_sample():
    x = torch.randint(0, 256, (6, 2, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = augment_openvla(x, torch.arange(6))
    assert torch.equal(out[[4]], augment_openvla(x[[4]], torch.tensor([4]))) and not torch.equal(out, augment_openvla(x, torch.arange(6)+9))
    same = augment_openvla(x[:,:1].expand(-1, 2, -1, -1, -1), torch.arange(6))
    assert not torch.equal(same[:,0], same[:,1]), 'each camera has its own draw'
    assert torch.equal(augment_openvla(x, torch.arange(6), area=1., light=0., stretch=0., turn=0.), x)


def test_grippers_equal_the_obvious_loops():
    g = np.random.default_rng(0)
    for _ in range(50):
        w = g.choice([0, .01, .3, .5, .97, 1], g.integers(1, 15)).astype(np.float32)
        carry, want = w[-1], np.empty_like(w)
        for i in reversed(range(len(w))):
            if w[i] > .95 or w[i] < .05: carry = float(w[i] > .95)
            want[i] = carry
        assert (binarize_gripper(w) == want).all()
        c = g.choice([-1, -.05, 0, .05, 1], g.integers(1, 15))
        said = [1 if x < -.1 else -1 for x in c if abs(x) > .1]
        state, want = -said[0] if said else 1, []
        for x in c:
            state = 1 if x < -.1 else -1 if x > .1 else state
            want.append(state/2+.5)
        assert absolute_gripper(c).tolist() == want


def test_standardisations_reach_the_episode(tmp_path):
    import shutil
    at = shutil.copytree(Path(__file__).parent/'fixtures'/'rlds_tiny', tmp_path/'t')
    a, b, c = (RldsSource(at, standardize=f) if f else RldsSource(at) for f in (None, libero, bridge))
    e, l, r = (s.episode(1) for s in (a, b, c))
    assert np.allclose(l.action[:,6], 1-e.action[:,6].clip(0, 1)) and (l.action[:,:6] == e.action[:,:6]).all() and l.state.shape == (12, 8)
    assert len(r) == 10 and np.allclose(r.action[:,:6], e.state[2:,:6]-e.state[1:-1,:6]) and all((r.cameras['image'][t] == e.cameras['image'][t+1]).all() for t in range(10))
    assert len({s.fingerprint for s in (a, b, c)}) == 3
    rec = {'action/world_vector': np.ones((4, 3)), 'action/rotation_delta': np.zeros((4, 3)), 'action/gripper_closedness_action': np.array([[0], [1], [0], [-1.]]), 'action/open_gripper': np.array([0, 1, 1, 0], bool), 'observation/state': np.cumsum(np.ones((4, 7)), 0),
        'observation/natural_language_instruction': ['x']*4, 'observation/base_pose_tool_reached': np.ones((4, 7)), 'observation/gripper_closed': np.zeros((4, 1))}
    assert fractal(rec.get)['action'][:,6].tolist() == [1, 0, 0, 1] and bridge_oxe(rec.get)['action'].tolist() == [[1]*6+[1]]*2 and fractal(rec.get)['state'].shape == (4, 8)


def test_statistics_are_written_read_and_undone(tmp_path):
    src = ArraySource([wander(i, a=7, p=8) for i in range(8)])
    for e in src.episodes: e.action[:,2] = .25
    d = dataset_statistics(src, 'x')
    (tmp_path/'dataset_statistics.json').write_text(json.dumps({**d, 'y': d['x']}))
    s = read_statistics(tmp_path/'dataset_statistics.json', 'y')
    a = np.concatenate([e.action for e in src.episodes])
    assert np.allclose(s['action']['q99'], np.quantile(a, .99, axis=0), atol=1e-6) and s['action']['mask'] == [True]*6+[False] and (s['num_transitions'], s['num_trajectories']) == (96, 8)
    for norm in (quantile_bounds(s['action']), minmax_bounds(s['action'])):
        y = norm(torch.from_numpy(a))
        assert y[:,:6].abs().max() <= 1 and (y[:,2] == 0).all() and torch.equal(y[:,6], torch.from_numpy(a[:,6])) and torch.allclose(norm.inverse(y)[:,2], torch.tensor(.25))
    assert torch.allclose(norm.inverse(y), torch.from_numpy(a), atol=1e-5)
    for name,said in ((None, r"expected one of \['x', 'y'\], found None"), ('z', 'found z')):
        with pytest.raises(ValueError, match=said): read_statistics(tmp_path/'dataset_statistics.json', name)
    with pytest.raises(ValueError, match='mask: expected 7 entries'): dataset_statistics(src, 'x', [True])
