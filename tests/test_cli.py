"The commands as a user types them: exit codes, one-line errors, config files, and refusal before the first step"
import json, subprocess, sys
from pathlib import Path

import numpy as np, pytest

from vla_nb.cli import COMMANDS, main
from vla_nb.run import Train, find_policy, only_one
from vla_nb.data.episode import Episode
from vla_nb.data.hdf5 import write_episode
from vla_nb.train.checkpoint import latest
from vla_nb.train.track import read_log

root = Path(__file__).resolve().parent.parent
TINY = ['--steps', '4', '--batch-size', '4', '--warmup', '1', '--save-every', '2', '--log-every', '1', '--no-progress', '--height', '32', '--width', '32']


def episode(seed, length=12):
    rng = np.random.default_rng(seed)
    words = ['press the red button', 'press the blue button'][seed % 2]
    return Episode({'front': rng.integers(0, 255, (length, 32, 32, 3), dtype=np.uint8)}, rng.normal(size=(length, 4)), rng.uniform(-1, 1, (length, 4)), words)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    for i in range(6): write_episode(folder/f'episode_{i}.hdf5', episode(i))
    return folder


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')
    assert main(['train', '--data', str(data), '--out', str(out), *TINY]) == 0
    return out


def test_help_teaches(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f'vla-nb {name}' in said for name in COMMANDS)


@pytest.mark.parametrize('name', COMMANDS)
def test_every_option_is_explained(name, capsys):
    with pytest.raises(SystemExit) as e: main([name, '--help'])
    assert e.value.code == 0
    said = capsys.readouterr().out
    assert COMMANDS[name][0].__doc__.split(';')[0].split(':')[0][:40] in ' '.join(said.split())


def test_unknown_command_names_the_nearest(capsys):
    assert main(['trian']) == 2
    assert "'train'" in capsys.readouterr().err


def test_train_writes_a_policy_and_a_log(run):
    assert [r['step'] for r in read_log(run/'log.jsonl') if 'loss' in r] == [1, 2, 3, 4]
    assert find_policy(run) == latest(run) and (latest(run)/'model.safetensors').exists()


def test_a_run_is_not_overwritten(data, run, capsys):
    assert main(['train', '--data', str(data), '--out', str(run), *TINY]) == 2
    assert '--resume' in capsys.readouterr().err


def test_resume_of_a_finished_run_changes_nothing(data, run):
    before = (run/'log.jsonl').read_text()
    assert main(['train', '--data', str(data), '--out', str(run), '--resume', *TINY]) == 0
    assert (run/'log.jsonl').read_text() == before


def test_two_processes_may_not_train_in_one_folder(tmp_path):
    with only_one(tmp_path):
        code = f'from vla_nb.run import only_one; from pathlib import Path\nwith only_one(Path({str(tmp_path)!r})): pass'
        r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode and 'another process is training here' in r.stderr


def run_command(*args): return subprocess.run([sys.executable, '-m', 'vla_nb.cli', *map(str, args)], capture_output=True, text=True)


def test_config_file_and_command_line(data, tmp_path):
    cfg = tmp_path/'c.yaml'    # in processes of their own: a setting that has no value yet is no Path, which the type checks would refuse
    cfg.write_text('train: {steps: 4, warmup: 1, batch_size: 4, progress: false}\ndataset: {height: 32, width: 32}\n')
    r = run_command('train', '--config', cfg, '--data', data, '--out', tmp_path/'a', '--steps', 2)
    assert r.returncode == 0, r.stderr
    assert len([r for r in read_log(tmp_path/'a'/'log.jsonl') if 'loss' in r]) >= 1 and latest(tmp_path/'a').name == 'checkpoint-000002'
    cfg.write_text('train: {stepz: 4}\n')
    r = run_command('train', '--config', cfg, '--data', data, '--out', tmp_path/'b')
    assert r.returncode == 2 and "'steps'" in r.stderr


def test_training_refuses_broken_data_before_the_first_step(data, tmp_path, capsys):
    for p in data.glob('*.hdf5'): (tmp_path/p.name).write_bytes(p.read_bytes())
    (tmp_path/'episode_1.hdf5').write_bytes((data/'episode_1.hdf5').read_bytes()[:2000])
    assert main(['doctor', str(tmp_path)]) == 2
    assert 'episode_1.hdf5' in capsys.readouterr().out
    assert main(['train', '--data', str(tmp_path), '--out', str(tmp_path/'run'), *TINY]) == 2
    assert 'episode_1.hdf5' in capsys.readouterr().err
    assert not list((tmp_path/'run').glob('checkpoint-*')) and not (tmp_path/'run'/'log.jsonl').exists()


def test_doctor_and_stats_of_good_data(data, tmp_path, capsys):
    assert main(['doctor', str(data)]) == 0
    assert main(['stats', str(data), '--out', str(tmp_path/'s.json')]) == 0
    assert len(json.loads((tmp_path/'s.json').read_text())['action']['mean']) == 4


def test_cache_then_train_from_it(data, tmp_path):
    assert main(['cache', str(data), '--out', str(tmp_path/'cache'), '--height', '32', '--width', '32']) == 0
    assert main(['train', '--data', str(tmp_path/'cache'), '--out', str(tmp_path/'run'), *TINY]) == 0


def test_a_folder_that_is_no_policy(tmp_path, capsys):
    assert main(['eval', str(tmp_path)]) == 2
    assert 'config.json' in capsys.readouterr().err
