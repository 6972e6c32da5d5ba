"What stands behind a folder's name, and streaming orders: splits as TFDS cuts them, standardised numbers, exact resumption"
import shutil, tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_nb.data.dataset import BufferedOrder, DataConfig, asked_of, open_source, train_val
from vla_nb.data.loader import Loader, Order
from vla_nb.data.oxe import standards
from vla_nb.data.rlds import RldsSource, episodes_of
from vla_nb.data.returns import ValueWindows

tiny = Path(shutil.copytree(Path(__file__).parent/'fixtures'/'rlds_tiny', Path(tempfile.mkdtemp())/'rlds_tiny'))    # its index is written beside it


@pytest.mark.parametrize('said, n, want', [('train', 7, range(7)), ('train[:]', 7, range(7)), ('train[:50%]', 7, range(4)), ('train[50%:]', 7, range(4, 7)), ('train[2:5]', 7, range(2, 5)),
    ('train[-2:]', 7, range(5, 7)), ('train[:-2]', 7, range(5)), ('train[-30%:]', 10, range(7, 10)), ('train[:1%]', 10, range(0)), ('train[5:99]', 7, range(5, 7)), ('v-1.0[1:2]', 3, range(1, 2))])
def test_cuts(said, n, want): assert episodes_of(said, n) == want


@pytest.mark.parametrize('n', [1, 3, 20, 101])
def test_percentages_part_a_split(n):
    for p in range(0, 101, 7): assert [*episodes_of(f'a[:{p}%]', n), *episodes_of(f'a[{p}%:]', n)] == list(range(n))


def test_parts_of_tfds_own_set():
    whole = open_source(f'{tiny}?split=train')
    parts = [open_source(f'{tiny}?split=train{x}') for x in ('[:67%]', '[67%:]')]
    assert [len(p) for p in (whole, *parts)] == [3, 2, 1] and len(open_source(f'{tiny}?split=val')) == 2
    assert [p.episode(i).action.sum() for p in parts for i in range(len(p))] == [whole.episode(i).action.sum() for i in range(3)]
    assert parts[1].describe(0) == whole.describe(2), 'a fault is named by its record in the file'
    assert len({p.fingerprint for p in (whole, *parts)}) == 3


def test_standardised_by_name():
    plain, turned = open_source(tiny).episode(0), open_source(f'{tiny}?standardize=libero').episode(0)
    assert np.allclose(turned.action[:, -1], 1-plain.action[:, -1].clip(0, 1)) and turned.state.shape[1] == 8
    assert open_source(f'{tiny}?standardize=libero').fingerprint == RldsSource(tiny, standardize=standards['libero']).fingerprint != open_source(tiny).fingerprint


def test_options_within_a_mixture(tmp_path):
    (tmp_path/'mix.yaml').write_text(f'both: {{dataset_dir: ["{tiny}?split=train[:2]", "{tiny}?split=val"]}}')
    mix = open_source(tmp_path/'mix.yaml')
    assert len(mix) == 4 and mix.episode(2).action.sum() == open_source(f'{tiny}?split=val').episode(0).action.sum()


@pytest.mark.parametrize('said, match', [('?split=', "found 'split'"), ('?', "found ''"), ('?splits=a', "found 'splits'"), ('?split=train[5', 'or a part as'), ('?standardize=x', 'expected one of')])
def test_nonsense_is_refused(said, match):
    with pytest.raises(ValueError, match=match): open_source(f'{tiny}{said}')


def test_a_folder_may_have_a_question_mark(tmp_path):
    (tmp_path/'what?').mkdir()
    assert asked_of(tmp_path/'what?') == (tmp_path/'what?', {})


@pytest.mark.parametrize('buffer', [1, 10, 500])
def test_streams_resume_exactly(buffer):
    "Every sample once an epoch, none early by more than the buffer, any step at once, two processes as one"
    o, n = BufferedOrder(buffer, 103, 8, seed=5), 103
    idx = np.concatenate([o(k)[0] for k in range(o.steps)])
    assert len(set(idx.tolist())) == len(idx) == 96 and (idx - np.arange(96) <= buffer).all()
    for k in (17, 3): assert np.array_equal(BufferedOrder(buffer, n, 8, seed=5)(k)[0], o(k)[0])
    halves = [BufferedOrder(buffer, n, 4, seed=5, rank=r, world=2)(15) for r in range(2)]
    assert all(np.array_equal(h[0], o(15)[0][r::2]) and torch.equal(h[1], o(15)[1][r::2]) for r, h in enumerate(halves))
    if buffer == 1: assert np.array_equal(idx, np.arange(96))


def test_a_streamed_run_by_its_config(tmp_path):
    "DataConfig(buffer=…) trains through the buffer, also with a critic's windows; a weighted mixture refuses it"
    source = open_source(tiny)
    windows, held_out = train_val(source, DataConfig(val_fraction=.34, buffer=10), 4)
    plain, _ = train_val(source, DataConfig(val_fraction=.34), 4)
    a, b = (Loader(w, 4, lambda s: s, size=(16, 16)) for w in (windows, ValueWindows(windows)))
    assert isinstance(a.order, BufferedOrder) and isinstance(b.order, BufferedOrder) and type(Loader(plain, 4, lambda s: s).order) is Order
    assert torch.equal(a.batch(2).images, b.batch(2).images) and len(windows) == len(plain) and len(held_out)
    resumed = next(iter(Loader(windows, 4, lambda s: s, size=(16, 16), start_step=2)))
    assert torch.equal(resumed.images, a.batch(2).images)
    (tmp_path/'mix.yaml').write_text(f'both: {{dataset_dir: ["{tiny}", "{tiny}?split=val"], sample_weights: [1, 1]}}')
    with pytest.raises(ValueError, match='an order of their own'): train_val(open_source(tmp_path/'mix.yaml'), DataConfig(val_fraction=0., buffer=10), 4)
