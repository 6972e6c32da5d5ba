"The denoising stepper, beyond its page"
import matplotlib.pyplot as plt, numpy as np, pytest, torch

from vla_nb.objectives.diffusion import ddim_path, squared_cosine
from vla_nb.viz.denoise import DenoiseFigure, DenoiseStepper, guesses, path_strip, to_end

schedule = squared_cosine()
kept = np.append(schedule.alpha_bar[torch.arange(90, -1, -10)].numpy(), np.float32(1))


def paths(b=3):
    noise = torch.randn(b, 8, 2, generator=torch.Generator().manual_seed(0))
    net = lambda x, t: x*.3    # any network that predicts the noise
    return torch.stack([noise, *ddim_path(net, schedule, noise, clip=100.)], 1).numpy()


def test_guesses_are_what_ddim_aimed_at():
    p = paths()[0].astype(np.float64)
    a = kept[:-1,None,None].astype(np.float64)
    np.testing.assert_allclose(guesses(p, kept.astype(np.float64)), (p[:-1] - np.sqrt(1-a)*p[:-1]*.3)/np.sqrt(a), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='expected 11 shares'): guesses(p, kept[1:])


def test_stepper_shows_each_stage_of_each_sample():
    p = paths()
    for k,targets in ((None, None), (kept, p[:,-1])):
        s = DenoiseStepper(p, k, list('ab'), targets)
        for i,t in ((2, 10), (0, 3)):
            s.sample.value, s.stage.value = i, t
            assert s.play.value == t and s.caption.startswith(f'sample {i} · stage {t} of 10') and ('guess' in s.caption) == (k is not None)
            for j in range(2): assert np.array_equal(s.view.lines[j].get_ydata(), p[i,t,:,j])
        assert bytes(s.picture.value) == DenoiseFigure(p[0], k, list('ab'), None if targets is None else targets[0]).png(3)
    one = DenoiseStepper(p[0], targets=p[0,-1])
    assert one.sample.max == 0 and one.stage.max == 10
    assert not plt.get_fignums()


def test_bad_paths():
    p = paths()[0]
    with pytest.raises(ValueError, match='two stages'): DenoiseFigure(p[:1])
    with pytest.raises(ValueError, match='one chunk'): DenoiseFigure(p, target=p[0,:4])


def test_strip_keeps_first_and_last():
    p = paths()[0]
    for n in (2, 5, 50):
        axes = path_strip(p, n, 'claim').axes
        assert len(axes) == min(n, 11)
        assert np.array_equal(axes[0].lines[0].get_ydata(), p[0,:,0]) and np.array_equal(axes[-1].lines[0].get_ydata(), p[-1,:,0])
    assert to_end(p)[-1] == 0
