"`vla-nb collect` keeps every attempt, goes on where it stopped, and mixes nothing"
import pytest, torch

from vla_nb import collect as room
from vla_nb.collect import Collect, collect
from vla_nb.core import Actions
from vla_nb.data.dataset import open_source


class Forward:
    def act(self, obs, seed): return Actions(torch.tensor([0., 1., -.4, -1.]).expand(len(obs), 6, 4))

@pytest.fixture
def run(tmp_path, monkeypatch):
    for k,f in dict(find_policy=lambda p: p, frame_size=lambda p: 16, load_policy=lambda p: Forward()).items(): monkeypatch.setattr(room, k, f)
    return lambda **k: collect(Collect(tmp_path/'run', tmp_path/'out', **dict(episodes=1, renderer='rays', workers=1) | k))

def test_goes_on_and_counts(run, tmp_path, capsys):
    assert run() is None    # a command's exit code
    before = {p.name: p.read_bytes() for p in (tmp_path/'out').glob('*.hdf5')}
    assert len(before) == 3
    run(episodes=2)
    after = {p.name: p.read_bytes() for p in (tmp_path/'out').glob('*.hdf5')}
    assert len(after) == 6 and {k: after[k] for k in before} == before
    source, said = open_source(tmp_path/'out'), capsys.readouterr().out
    flags = [source.episode(i).success for i in range(len(source))]
    assert set(flags) == {True, False} and f'{sum(flags)}/6' in said and 'next: vla-nb train --policy comet' in said

def test_refuses_to_mix(run):
    run()
    with pytest.raises(ValueError, match='execute: expected 6.*found 3; record into another folder'): run(execute=6)
