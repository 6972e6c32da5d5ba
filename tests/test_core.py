"Writing whole or not at all, sharded weights, and random numbers within their bounds"
import os

import pytest
import torch

from vla_nb import core
from vla_nb.core import atomic_path, draw_uniform, read_weights, write_weights


def test_a_folder_is_replaced_and_leaves_no_litter(tmp_path):
    for text in ('one', 'two'):
        with atomic_path(tmp_path/'out') as t:
            (t/'sub').mkdir(parents=True)
            (t/'sub'/'a.txt').write_text(text)
    assert (tmp_path/'out/sub/a.txt').read_text() == 'two'
    assert os.listdir(tmp_path) == ['out']


def test_the_old_folder_survives_a_kill_between_the_renames(tmp_path, monkeypatch):
    with atomic_path(tmp_path/'out') as t: t.mkdir(); (t/'a').write_text('old')
    real, done = os.replace, []
    def dies(a, b):
        if done: raise KeyboardInterrupt
        done.append(real(a, b))
    monkeypatch.setattr(core.os, 'replace', dies)
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(tmp_path/'out') as t: t.mkdir(); (t/'a').write_text('new')
    left = list(tmp_path.iterdir())
    assert [(p/'a').read_text() for p in left] == ['old'] and left[0].name.startswith('.out.') and left[0].suffix == '.old'


def test_a_missing_shard_is_named(tmp_path):
    write_weights(tmp_path, {k: torch.ones(10) for k in 'abc'}, shard=45)
    assert set(read_weights(tmp_path)) == set('abc')
    gone = sorted(tmp_path.glob('*.safetensors'))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name): read_weights(tmp_path)


def test_uniform_numbers_never_reach_their_bounds(monkeypatch):
    for bits in (0, -1):    # all zeros, all ones
        monkeypatch.setattr(core, '_mix', lambda z, bits=bits: torch.full_like(z, bits))
        u = draw_uniform(torch.arange(3), 2)
        assert (0 < u).all() and (u < 1).all()
