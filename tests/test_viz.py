"Figures and the episode browser, beyond their pages"
import matplotlib.pyplot as plt, numpy as np, pytest

from vla_nb.data.episode import ArrayFrames, ArraySource, Episode, JpegFrames, Subset, encode_frame
from vla_nb.eval.metrics import Success
from vla_nb.viz.browser import EpisodeBrowser, EpisodeFigure, caption
from vla_nb.viz.figures import (action_chunk, denoising_strip, episode_strip, loss_curves, normaliser_histograms, particles,
    success_bars)

rng = np.random.default_rng(0)


def episode(l, n=2, jpeg=False, **more):
    frames = rng.integers(0, 255, (n, l, 16, 24, 3), np.uint8)
    cams = {f'cam{i}': JpegFrames([encode_frame(f) for f in x]) if jpeg else ArrayFrames(x) for i, x in enumerate(frames)}
    return Episode(cams, rng.normal(size=(l, 7)), rng.normal(size=(l, 4)), 'pick <b>up</b> & go', **more)


@pytest.fixture
def source(): return ArraySource([episode(5), episode(9, subtask=[f'part {i}' for i in range(9)], fps=50., success=False), episode(3)])


def test_figures_leave_no_trace():
    before = dict(plt.rcParams)
    x = rng.normal(size=(50, 3)).astype(np.float32)
    figs = [action_chunk(x[:8]), action_chunk(x[:8], np.arange(8) > 5, 'abc', 'claim'), episode_strip(rng.integers(0, 255, (9, 8, 8, 3), np.uint8)),
        episode_strip(np.zeros((1, 8, 12, 3), np.uint8)), success_bars({'one': Success(3, 1), 'two': Success(4, 4)}, 'claim', .5),
        loss_curves([{'step': 1, 'loss': 2.}, {'step': 2, 'loss': float('nan')}, {'step': 3, 'val': 1.}], ['loss', 'val'], smooth=.5),
        normaliser_histograms(x, x*2, list('abc')), particles([x[:,:2], x[:,1:]]), denoising_strip([x[:8], x[8:16]])]
    for f in figs: f.draw_without_rendering()
    assert not plt.get_fignums() and dict(plt.rcParams) == before


def test_bars_are_the_rates():
    ax = success_bars({'one': Success(3, 1), 'two': Success(4, 4)}).axes[0]
    assert np.allclose([b.get_width() for b in ax.patches], [100/3, 100])
    assert [t.get_text() for t in ax.get_yticklabels()] == ['one', 'two']


def test_a_curve_skips_what_is_missing():
    log = [{'step': 1, 'loss': 2.}, {'step': 2, 'loss': float('nan')}, {'step': 3, 'loss': None}, {'step': 4, 'loss': 1.}]
    assert loss_curves(log, ['loss']).axes[0].lines[0].get_xydata().tolist() == [[1, 2], [4, 1]]


def test_browser_shows_what_the_source_holds(source):
    b = EpisodeBrowser(source, 1)
    assert b.step.max == 8 and b.play.interval == 20
    for i, t in ((1, 8), (0, 4), (2, 0), (1, 3)):
        b.pick.value = i
        b.step.value = t
        assert b.caption == f'episode {i}: {caption(source.episode(i), t)}'
        assert bytes(b.picture.value).startswith(b'\x89PNG')
        for im, f in zip(b.view.images, source.episode(i).cameras.values()): assert np.array_equal(im.get_array(), f[t])
        assert [c.get_xdata()[0] for c in b.view.cursors] == [t, t]
    assert '<b>' not in b.text.value and '&lt;b&gt;' in b.text.value
    assert 'part 3' in b.caption and '0.06 s' in b.caption and 'fails' in b.caption
    assert not plt.get_fignums()


def test_browser_reads_lazily_and_decodes():
    class Counted(JpegFrames):
        n = 0
        def __getitem__(self, i): Counted.n += 1; return super().__getitem__(i)
    ep = episode(30, 1, jpeg=True)
    ep.cameras = {k: Counted(v.data) for k, v in ep.cameras.items()}
    EpisodeBrowser(Subset(ArraySource([ep, ep]), [1])).step.value = 29
    assert Counted.n == 3    # to lay out, to open, to step


def test_a_frame_of_other_brightness_is_not_rescaled():
    ep = Episode({'c': ArrayFrames(np.stack([np.full((4, 4, 3), v, np.uint8) for v in (0, 100)]))}, np.zeros((2, 1)), np.zeros((2, 1)), 'x')
    view = EpisodeFigure(ep)
    view.png(1)
    assert (view.images[0].get_array() == 100).all() and view.images[0].make_image(None, unsampled=True)[0][0, 0, 0] == 100


def test_stored_output_is_a_picture_alone_and_small(source, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    b = EpisodeBrowser(source)
    out = b._repr_mimebundle_()
    assert set(out) == {'image/png', 'text/plain'} and len(out['image/png'])*3/4 < 60_000
    assert out == EpisodeBrowser(source)._repr_mimebundle_()
    monkeypatch.delenv('IN_TEST')
    assert 'application/vnd.jupyter.widget-view+json' in b._repr_mimebundle_()


def test_the_widget_is_open_for_the_browser(source):
    "Its own methods hide none of ipywidgets'"
    import ipywidgets as w
    own = {k for k in vars(EpisodeBrowser) if not k.startswith('_')} | (set(vars(EpisodeBrowser(source))) - set(vars(w.VBox())))
    assert not [k for k in own if hasattr(w.VBox, k)]


def test_an_empty_source_is_refused(source):
    with pytest.raises(ValueError, match='at least one episode'): EpisodeBrowser(Subset(source, []))
