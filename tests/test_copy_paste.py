"Commands that the program proposes can be pasted into a shell, wherever the folders are"
import re, shlex
from pathlib import Path

import pytest

import vla_nb
from test_convert import full
from vla_nb.cli import main
from vla_nb.data.convert import convert
from vla_nb.data.dataset import open_source
from vla_nb.data.episode import ArraySource
from vla_nb.data.rlds_write import rlds


def proposed(text): # The commands after 'next:', each as a shell would split it
    return [shlex.split(l.removeprefix('next:').strip())[1:] for l in text.splitlines() if re.match(r'(next:)? +vla-nb ', l)]


@pytest.fixture
def data(tmp_path):
    convert(ArraySource([full(i) for i in range(4)]), tmp_path/"my robot's data", rlds(), progress=False)
    return tmp_path/"my robot's data"


def test_a_blank_and_a_quote_survive_from_command_to_command(data, capsys, monkeypatch):
    monkeypatch.chdir(data.parent)
    def run(*words):
        assert main([*words]) == 0, capsys.readouterr()
        return proposed(capsys.readouterr().out)
    (look,) = run('convert', str(data), '--out', 'as hdf5', '--to', 'hdf5')
    assert look == ['doctor', 'as hdf5']
    (fit,) = run(*look)
    assert fit[:3] == ['train', '--data', 'as hdf5'] and run('stats', 'as hdf5') == [fit]
    (packed,) = run('cache', 'as hdf5', '--out', "packed & small")
    assert packed[:3] == ['train', '--data', 'packed & small']
    (kept,) = run('doctor', 'as hdf5', '--truncate', '6', '--out', 'cut short')
    assert kept == ['doctor', 'cut short'] and run(*kept)
    (part,) = run('doctor', f'{data}?split=train[:75%]')
    assert len(open_source(part[2])) == 3, 'what stands behind a folder is kept, and no shell expands it'
    fit[4] = 'a run'
    (roll,) = run(*fit, *'--steps 1 --warmup 0 --batch-size 4 --threads 0 --no-progress --cpu --height 16 --width 16 --val-fraction 0 --model.width 32 --model.channels 8 --model.learned 4 --model.spoken 4 --model.head-width 32 --model.head-depth 1 --model.combine-width 32'.split())
    assert roll == ['eval', 'a run']
    (roll,) = run('export', 'a run', '--out', 'to give away')
    assert roll == ['eval', 'to give away']


def test_a_mend_quotes_its_folder_too(tmp_path):
    for path in ('no such place', 'no $HOME'):
        with pytest.raises(FileNotFoundError) as e: open_source(tmp_path/path)
        assert shlex.split(str(e.value).split('Record some: ')[1]) == ['vla-nb', 'record', '--out', str(tmp_path/path)]


def test_no_command_is_proposed_with_a_bare_path():
    harmless = {'height', 'width', 'horizon', 'c.horizon', 'c.suite', 'name', 'k:<9', 'c.__doc__', 'need[0]', 'e'}    # numbers and names of ours
    bare = [(p.name, x) for p in sorted(Path(vla_nb.__file__).parent.rglob('*.py')) for l in p.read_text().splitlines()
            for command in re.findall(r'vla-nb [a-z{][^`]*', l) for x in re.findall(r'\{([^{}]*)\}', command) if not x.startswith('quote(str(')]
    assert [x for x in bare if x[1] not in harmless] == []
