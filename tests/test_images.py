"Images: geometry over many sizes, decoding over many scales and files, augmentation's independence of the batch"
import io

import numpy as np, pytest, torch
from einops import rearrange
from PIL import Image

from vla_nb.data import images
from vla_nb.data.episode import encode_frame
from vla_nb.data.images import _pillow, augment, decode_jpeg, fit, psnr, resize_with_pad, to_model


def smooth(h, w, seed=0):
    "A smooth colour picture"
    y, x = np.mgrid[:h, :w]
    a, b, c = np.random.default_rng(seed).uniform(.05, .2, 3)
    return (127+120*np.stack([np.sin(a*x), np.cos(b*y), np.sin(c*(x+y))], -1)).astype(np.uint8)


@pytest.mark.parametrize('h,w,height,width', [(480, 640, 224, 224), (640, 480, 224, 224), (100, 300, 64, 48), (17, 33, 64, 64), (64, 64, 31, 57), (1, 200, 32, 32)])
def test_fit_keeps_the_aspect_and_stays_inside(h, w, height, width):
    rh, rw, top, left = fit(h, w, height, width)
    assert 1 <= rh <= height and 1 <= rw <= width and (rh == height or rw == width)
    assert 0 <= top <= height-rh and 0 <= left <= width-rw
    assert abs(rh/h - rw/w) <= 1/min(h, w) + 1e-6


@pytest.mark.parametrize('h,w', [(48, 64), (64, 48), (20, 30), (64, 64)])
def test_resize_with_pad_equals_pillow(h, w):
    im = smooth(h, w)
    rh, rw, top, left = fit(h, w, 40, 40)
    want = Image.new('RGB', (40, 40))
    want.paste(Image.fromarray(im).resize((rw, rh), Image.BILINEAR), (left, top))
    got = resize_with_pad(rearrange(torch.from_numpy(im), 'h w c -> 1 1 c h w'), 40, 40)
    assert psnr(rearrange(got, '1 1 c h w -> h w c'), np.array(want)) > 48


def test_resize_does_not_mix_samples_or_cameras():
    x = torch.randint(0, 256, (2, 3, 3, 30, 40), dtype=torch.uint8)
    one = torch.cat([torch.cat([resize_with_pad(x[b:b+1, n:n+1], 16, 16) for n in range(3)], 1) for b in range(2)])
    assert torch.equal(one, resize_with_pad(x, 16, 16))


@pytest.mark.parametrize('want,size', [((168, 224), (240, 320)), ((0, 0), (480, 640)), ((360, 480), (480, 640)), ((84, 112), (120, 160)), ((10, 10), (60, 80)), ((200, 300), (480, 640))])
def test_decode_picks_a_power_of_two_that_leaves_enough(want, size):
    assert decode_jpeg(encode_frame(smooth(480, 640)), *want).shape == (*size, 3)


@pytest.mark.parametrize('h,w', [(481, 643), (9, 7), (50, 121)])
def test_odd_sizes_and_the_fallback_agree(h, w, monkeypatch):
    data = encode_frame(smooth(h, w))
    fast = decode_jpeg(data, h//4, w//4)
    monkeypatch.setattr(images, 'simplejpeg', None)
    slow = decode_jpeg(data, h//4, w//4)
    assert fast.shape == slow.shape and psnr(fast, slow) > 40
    out = np.empty_like(slow)
    assert np.array_equal(decode_jpeg(data, h//4, w//4, out=out), out)


def test_grey_jpegs_become_colour_and_garbage_is_refused():
    out = io.BytesIO()
    Image.fromarray(smooth(32, 32)[..., 0]).save(out, 'JPEG')
    x = decode_jpeg(out.getvalue())
    assert x.shape == (32, 32, 3) and np.array_equal(x[..., 0], x[..., 2])
    for bad in (b'', b'garbage', encode_frame(smooth(32, 32))[:100]):
        with pytest.raises(ValueError): decode_jpeg(bad)
        with pytest.raises(ValueError): _pillow(bad, 1, None)


def test_a_wrong_buffer_is_refused():
    with pytest.raises(ValueError, match='out: expected'): decode_jpeg(encode_frame(smooth(32, 32)), out=np.empty((16, 16, 3), np.uint8))


@pytest.mark.parametrize('shared', [True, False])
def test_augment_is_a_function_of_each_seed_alone(shared):
    x = torch.randint(0, 256, (6, 2, 3, 24, 32), dtype=torch.uint8)
    seed = torch.tensor([3, 1, 4, 1, 5, 9])
    whole = augment(x, seed, shared=shared)
    for i in range(6): assert torch.equal(whole[i:i+1], augment(x[i:i+1], seed[i:i+1], shared=shared))
    order = torch.tensor([5, 0, 2])
    assert torch.equal(whole[order], augment(x[order], seed[order], shared=shared))
    assert not torch.equal(whole, augment(x, seed+1, shared=shared))
    x[3] = x[1]
    assert torch.equal(*augment(x, seed, shared=shared)[[1, 3]].unbind())


def test_each_strength_alone_changes_what_it_says():
    x = torch.randint(60, 200, (8, 1, 3, 24, 32), dtype=torch.uint8)
    seed, none = torch.arange(8), dict(crop=0., rotate=0., brightness=0., contrast=0., saturation=0.)
    assert torch.equal(augment(x, seed, **none), x)
    for k, v in dict(crop=.1, rotate=10., brightness=.3, contrast=.4, saturation=.5).items():
        assert not torch.equal(augment(x, seed, **none | {k: v}), x), k
    grey = x[:, :, :1].expand_as(x).contiguous()
    assert (augment(grey, seed, **none | dict(saturation=.5)).int()-grey.int()).abs().max() <= 1, 'saturation leaves grey alone'


def test_to_model_range_and_dtype():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 16, 16)
    assert to_model(x).min() == -1 and to_model(x).max() == 1 and to_model(x, torch.bfloat16).dtype == torch.bfloat16
