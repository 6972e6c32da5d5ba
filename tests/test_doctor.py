"Every way to break a folder of episodes that we could think of, alone and all together; and what must not be called broken"
import subprocess, sys
from pathlib import Path

import h5py, numpy as np, pytest

from test_data import wander
from vla_nb.data.doctor import Fault, check, declare, declared, report, require_healthy
from vla_nb.data.episode import ArraySource, Subset
from vla_nb.data.hdf5 import Hdf5Source, find_episodes, write_episode
from vla_nb.data.integrity import notes
from vla_nb.data.mixture import Mixture
from vla_nb.data.windows import Windows

n = 8


def folder(path, n=n, **kw):
    for i in range(n): write_episode(path/f'episode_{i}.hdf5', wander(i, subtask=['go']*12, reward=np.linspace(0, 1, 12), **kw))
    return path


def swap(f, name, value):
    del f[name]
    f[name] = value


def texts(f, name, *values):
    del f[name]
    f.create_dataset(name, data=list(values), dtype=h5py.special_dtype(vlen=bytes))


def put(f, name, at, value):
    f[name][at] = value


def truncate(path, share): path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])


top, wrist, qpos = 'observations/images/top', 'observations/images/wrist', 'observations/qpos'
broken = {  # name -> (how to break an open file, or a path; field; what `found` says)
    'truncated': (lambda p: truncate(p, .6), 'file', 'truncated file'),
    'truncated by a byte': (lambda p: p.write_bytes(p.read_bytes()[:-1]), 'file', 'truncated file'),
    'empty': (lambda p: p.write_bytes(b''), 'file', 'an empty file'),
    'not hdf5': (lambda p: p.write_bytes(b'PK\3\4'*999), 'file', '3996 bytes'),
    'short action': (lambda f: swap(f, 'action', f['action'][:-3]), 'action', '9'),
    'long state': (lambda f: swap(f, qpos, np.concatenate([f[qpos][()]]*2)), qpos, '24'),
    'short camera': (lambda f: swap(f, wrist, f[wrist][:7]), wrist, '7'),
    'short subtask': (lambda f: texts(f, 'substep_reasonings', b'a', b'b'), 'substep_reasonings', '2'),
    'short reward': (lambda f: swap(f, 'reward', np.zeros(4)), 'reward', '4'),
    'short compress_len': (lambda f: swap(f, 'compress_len', f['compress_len'][:,:-1]), 'compress_len', '11'),
    'no steps': (lambda f: [swap(f, k, f[k][:0]) for k in ('action', qpos, top, wrist, 'reward', 'substep_reasonings')] + [swap(f, 'compress_len', f['compress_len'][:,:0])], 'action', 'none'),
    'nan in action': (lambda f: put(f, 'action', (5, 1), np.nan), 'action', 'nan at step 5, dimension 1'),
    'inf in state': (lambda f: put(f, qpos, (slice(3, 6), 2), -np.inf), qpos, '-inf at step 3, dimension 2, and 2 more up to step 5'),
    'nan in reward': (lambda f: put(f, 'reward', 4, np.nan), 'reward', 'nan at step 4'),
    'missing camera': (lambda f: f.__delitem__(wrist), wrist, "only ['top']"),
    'no cameras': (lambda f: (f.__delitem__(top), f.__delitem__(wrist)), 'observations/images', 'none'),
    'no images group': (lambda f: f.__delitem__('observations/images'), 'observations/images', "['action'"),
    'constant action': (lambda f: put(f, 'action', (slice(None), 2), .3), 'action, dimension 2', '0.3 at every step'),
    'constant state': (lambda f: put(f, qpos, (slice(None), 0), 0.), f'{qpos}, dimension 0', '0 at every step'),
    'non-utf8 instruction': (lambda f: texts(f, 'language_raw', b'gr\xfcn'), 'language_raw', 'byte 0xfc at 2'),
    'non-utf8 subtask': (lambda f: texts(f, 'substep_reasonings', *[b'ok']*11, b'\xff\xfe'), 'substep_reasonings', 'byte 0xff at 0'),
    'empty instruction': (lambda f: texts(f, 'language_raw', b' '), 'language_raw', 'an empty text'),
    'numbers for text': (lambda f: swap(f, 'language_raw', np.zeros(1)), 'language_raw', 'float64'),
    'no instruction': (lambda f: f.__delitem__('language_raw'), 'language_raw', "['action'"),
    'no action': (lambda f: f.__delitem__('action'), 'action', "['compress_len'"),
    'jpeg garbage': (lambda f: put(f, top, 9, np.random.default_rng(0).integers(0, 255, f[top].shape[1])), top, 'frame 9:'),
    'jpeg zeroed': (lambda f: put(f, top, 0, 0), top, 'frame 0: nothing'),
    'jpeg cut': (lambda f: put(f, top, (3, slice(f[top].shape[1]//2, None)), 0), top, 'frame 3:'),
    'jpeg middle overwritten': (lambda f: put(f, top, (3, slice(f[top].shape[1]//2, f[top].shape[1]//2+60)), 255), top, 'frame 3:'),
    'float images': (lambda f: swap(f, top, np.zeros((12, 4, 4, 3))), top, 'float64 (12, 4, 4, 3)'),
    'other action dims': (lambda f: swap(f, 'action', np.random.default_rng(0).normal(size=(12, 7))), 'action', '7'),
    'other state dims': (lambda f: swap(f, qpos, np.random.default_rng(0).normal(size=(12, 3))), qpos, '3'),
    'flat action': (lambda f: swap(f, 'action', np.arange(12.)), 'action', 'float64 (12,)'),
    'no subtask': (lambda f: f.__delitem__('substep_reasonings'), 'substep_reasonings', 'none'),
    'unknown colour order': (lambda f: f.attrs.__setitem__('color_order', 'gbr'), 'color_order', "'gbr'"),
    'dangling link': (lambda p: (p.unlink(), p.symlink_to('elsewhere.hdf5')), 'file', 'a link to elsewhere.hdf5'),
    'a group for a field': (lambda f: (f.__delitem__('action'), f.create_group('action')), 'action', "['action'"),
}


def breakage(path, how):
    if how in ('truncated', 'truncated by a byte', 'empty', 'not hdf5', 'dangling link'): return broken[how][0](path)
    with h5py.File(path, 'a') as f: broken[how][0](f)


@pytest.fixture(scope='module')
def healthy(tmp_path_factory): return folder(tmp_path_factory.mktemp('healthy'))


@pytest.fixture
def data(healthy, tmp_path):
    for p in find_episodes(healthy): (tmp_path/p.name).write_bytes(p.read_bytes())
    return tmp_path


@pytest.mark.parametrize('compress', ['jpeg', 'lzf', None])
def test_a_healthy_folder_has_no_faults(tmp_path, compress):
    for i in range(4): write_episode(tmp_path/f'{i}.hdf5', wander(i), compress)
    assert check(tmp_path) == [] and report([]) == 'no faults'
    require_healthy(tmp_path)


@pytest.mark.parametrize('how', broken)
def test_each_fault_is_named_and_nothing_else_is(data, how):
    breakage(data/'episode_5.hdf5', how)
    faults = check(data)
    assert [(f.file, f.field) for f in faults] == [('episode_5.hdf5', broken[how][1])], report(faults)
    assert broken[how][2] in faults[0].found and faults[0].expected and faults[0].mend
    with pytest.raises(ValueError) as e: require_healthy(data)
    assert str(faults[0]) in str(e.value) and not (data/'.healthy.json').exists()


def test_all_at_once_hide_nothing(tmp_path):
    folder(tmp_path, n=2*len(broken))
    for i,how in enumerate(broken): breakage(tmp_path/f'episode_{2*i}.hdf5', how)
    faults = check(tmp_path)
    assert [(f.file, f.field) for f in faults] == [(f'episode_{2*i}.hdf5', broken[how][1]) for i,how in enumerate(broken)]
    text = report(faults)
    assert text.startswith(f'{len(broken)} faults in {len(broken)} files') and all(f.found in text and f.mend in text for f in faults)
    with pytest.raises(ValueError) as e: require_healthy(tmp_path)
    assert str(e.value).count('\n') == 20


@pytest.mark.parametrize('which', [0, 5])
def test_a_camera_more_is_a_note_or_in_the_first_file_a_fault(data, which):
    with h5py.File(data/f'episode_{which}.hdf5', 'a') as f: f.copy(f[top], 'observations/images/extra')
    assert not check(data) and not notes(data) and len(Windows(Hdf5Source(data), 2)) == n*12, 'the file itself names its cameras, and this is none'
    with h5py.File(data/f'episode_{which}.hdf5', 'a') as f: f.attrs['camera_names'] = ['top', 'wrist', 'extra']
    faults, found = check(data), notes(data)
    assert [(f.file, f.field) for f in found] == [(f'episode_{which}.hdf5', 'observations/images/extra')] and 'only 1 have' in found[0].found
    if which:
        assert not faults and len(Windows(Hdf5Source(data), 2)) == n*12
        return
    assert [(f.file, f.field) for f in faults] == [('episode_0.hdf5', 'observations/images/extra')] and '1 of 8 files' in faults[0].found
    with pytest.raises(ValueError, match='leave .* out'): Windows(Hdf5Source(data), 2)    # as the doctor said


def test_threads_do_not_change_the_answer(data):
    for i,how in enumerate(('truncated', 'nan in action', 'jpeg cut', 'missing camera')): breakage(data/f'episode_{i}.hdf5', how)
    assert check(data, threads=1) == check(data, threads=8)


def test_headers_alone_find_garbage_and_cuts(data):
    for i,how in enumerate(('jpeg garbage', 'jpeg zeroed', 'jpeg cut')): breakage(data/f'episode_{i}.hdf5', how)
    assert [f.file for f in check(data, decode=False)] == [f'episode_{i}.hdf5' for i in range(3)]


def test_nothing_to_examine(tmp_path):
    fault, = check(tmp_path)
    assert fault.field == 'episodes' and fault.found == 'none'
    with pytest.raises(ValueError, match='1 fault in the data'): require_healthy(tmp_path)
    for what in (tmp_path/'nowhere', __file__):
        with pytest.raises(ValueError, match='expected a folder'): check(what)


def test_unfinished_writes_are_no_episodes(data):
    (data/'.episode_9.hdf5.17.tmp').write_bytes(b'half'); (data/'.episode_9.hdf5').write_bytes(b'half')
    assert check(data) == []


# as a user types it

@pytest.mark.parametrize('how', broken)
def test_the_commands_name_each_fault_and_refuse(data, how, capsys):
    from vla_nb.cli import main
    breakage(data/'episode_0.hdf5', how)    # the first, which a source would open to learn the cameras' names
    assert main(['doctor', str(data)]) == 2
    said = capsys.readouterr().out
    fault, = check(data)
    assert said.startswith('1 fault in 1 file\n') and 'Traceback' not in said
    for line in (f'episode_0.hdf5  {broken[how][1]}', f'expected  {fault.expected}', f'found     {fault.found}', f'mend      {fault.mend}'): assert line in said
    assert main(['train', '--data', str(data), '--out', str(data/'run')]) == 2
    said = capsys.readouterr().err
    assert '1 fault in the data; not training' in said and str(fault) in said
    assert not list((data/'run').glob('checkpoint-*')) and not (data/'run'/'log.jsonl').exists()


def test_in_a_process_of_its_own(data):
    for i,how in enumerate(('truncated', 'long state', 'nan in action', 'missing camera', 'constant action', 'non-utf8 instruction', 'jpeg garbage')): breakage(data/f'episode_{i}.hdf5', how)
    r, t = (subprocess.run([sys.executable, '-m', 'vla_nb.cli', *c, str(data)], capture_output=True, text=True) for c in (['doctor'], ['train', '--out', str(data/'run'), '--data']))
    assert r.returncode == t.returncode == 2 and 'Traceback' not in r.stderr+t.stderr
    assert r.stdout.startswith('7 faults in 7 files') and all(f'episode_{i}.hdf5' in r.stdout and f'episode_{i}.hdf5' in t.stderr for i in range(7))


def test_a_declaration_that_cannot_be_read_is_named(data):
    for text in ('{', '[]', '{"may_rest": "action 3"}'):
        (data/'dataset.json').write_text(text)
        with pytest.raises(ValueError, match='dataset.json'): check(data)


# a mixture

def mixture(data, tmp_path_factory, **kw):
    other = folder(tmp_path_factory.mktemp('other'))
    return Mixture({'here': Hdf5Source(data), 'there': Subset(Hdf5Source(other), [1, 2, 3, 5])}, **kw), other


def test_folders_of_a_mixture_are_judged_each_by_itself_and_side_by_side(data, tmp_path_factory):
    mix, other = mixture(data, tmp_path_factory)
    assert check(mix) == []
    require_healthy(mix)
    assert (data/'.healthy.json').exists() and (other/'.healthy.json').exists()
    breakage(data/'episode_5.hdf5', 'nan in action')
    breakage(other/'episode_3.hdf5', 'truncated')
    breakage(other/'episode_0.hdf5', 'truncated')    # not used by the mixture
    assert [(f.file, f.field) for f in check(mix)] == [('here/episode_5.hdf5', 'action'), ('there/episode_3.hdf5', 'file')]
    with pytest.raises(ValueError, match='2 faults.*\n.*here/episode_5.hdf5: action.*\n.*there/episode_3.hdf5: file'): require_healthy(mix)


def test_a_folder_with_other_cameras_or_dimensions_is_named(data, tmp_path_factory):
    b = tmp_path_factory.mktemp('b')
    for i in range(4): write_episode(b/f'{i}.hdf5', wander(i, cameras=('top', 'left'), a=3))
    sources = {'a': Hdf5Source(data), 'b': Hdf5Source(b)}
    assert [(f.file, f.field, f.expected) for f in check(Mixture(sources))] == [('b/', 'cameras', "['top', 'wrist'] as in a/"), ('b/', 'action', '4 dimensions as in a/')]
    assert [f.field for f in check(Mixture(sources, cameras=['top']))] == ['action']
    assert [f.field for f in check(Mixture(sources, cameras=['wrist']))] == ['cameras', 'action']


# suspicious, not broken

def test_notes_are_no_faults_and_are_not_made_of_ordinary_data(data, tmp_path):
    assert notes(data) == []
    still(data, 2, 'action', 1, .5 + 5e-5*np.sin(np.arange(12)))
    put_in = {3: lambda f: f['action'].__setitem__((4, 2), 4000.), 4: lambda f: texts(f, 'substep_reasonings', *[b'go']*11, b' '), 6: lambda f: f.attrs.__delitem__('color_order')}
    for i,how in put_in.items():
        with h5py.File(data/f'episode_{i}.hdf5', 'a') as f: how(f)
    (data/'episode_7.hdf5').write_bytes((data/'episode_0.hdf5').read_bytes())
    write_episode(data/'episode_8.hdf5', wander(8, l=90, subtask=['go']*90, reward=np.zeros(90)))
    assert check(data) == []
    found = {(f.file, f.field) for f in notes(data)}
    assert found == {('episode_2.hdf5', 'action, dimension 1'), ('episode_4.hdf5', 'substep_reasonings'), ('episode_6.hdf5', 'color_order'), ('episode_7.hdf5', 'action'), ('episode_8.hdf5', 'action')}, report(notes(data), 'note')
    # one of 186 readings is more than a thousandth: such a range may be meant


def test_a_glitch_is_noted_and_a_gripper_is_not(tmp_path):
    for i in range(20):
        e = wander(i, l=100)
        e.action[:,3] = 0
        if i == 3: e.action[50,3] = 1    # a gripper, seldom closed
        if i == 9: e.action[7,1] = -900
        write_episode(tmp_path/f'{i}.hdf5', e)
    found = notes(tmp_path)
    assert [(f.file, f.field) for f in found] == [('9.hdf5', 'action, dimension 1')] and '-900 at step 7' in found[0].found


# what stands still

def still(path, i, name='action', d=3, value=0., instruction=None):
    with h5py.File(path/f'episode_{i}.hdf5', 'a') as f:
        f[name][:,d] = value
        if instruction: f['language_raw'][0] = instruction


def test_a_dimension_that_moves_nowhere_is_one_fault_of_the_folder(data):
    for i in range(n): still(data, i)
    fault, = check(data)
    assert (fault.file, fault.field) == ('(every file)', 'action, dimension 3') and '{"may_rest": ["action 3"]} to dataset.json' in fault.mend
    with pytest.raises(ValueError, match='every file'): require_healthy(data)
    assert check(data, may_rest=['action 3']) == [] and len(check(data, may_rest=['state 3'])) == 1


def test_it_may_be_declared_beside_the_files_or_in_them(data, tmp_path_factory):
    for i in range(n): still(data, i)
    declare(data, 'action 3'); declare(data, 'state 0')
    assert declared(data) == ('action 3', 'state 0') and check(data) == []
    require_healthy(data)
    other = tmp_path_factory.mktemp('other')
    for i in range(4):
        e = wander(i, may_rest=('action 3',))
        e.action[:,3] = 0
        write_episode(other/f'episode_{i}.hdf5', e)
    assert check(other) == []
    for bad in ('action', 'action x', 'speed 1', 'action 1 2'):
        with pytest.raises(ValueError, match='expected such as'): declare(data, bad)


def test_a_gripper_that_rests_in_many_episodes_is_no_accident_and_one_frozen_sensor_is(data):
    for i in (0, 2, 5): still(data, i)
    assert check(data) == []
    still(data, 1, d=1, value=.7)
    assert [f.file for f in check(data)] == ['episode_1.hdf5']


def test_a_gripper_that_one_instruction_of_many_does_not_use_is_no_accident(tmp_path):
    folder(tmp_path, n=30)
    for i in range(4): still(tmp_path, i, instruction='push')
    assert check(tmp_path) == []
    still(tmp_path, 9)
    assert [f.file for f in check(tmp_path)] == ['episode_9.hdf5'], '5 of 30 is rare, and this one is alone with its instruction'


def test_a_goal_that_differs_between_episodes_is_no_fault(data):
    for i in range(n): still(data, i, 'observations/qpos', 2, float(i))
    assert check(data) == []


def test_one_file_that_rests_elsewhere_is_told_from_a_goal_and_from_the_rest(data):
    for i in range(n): still(data, i, value=.3 if i == 4 else 0.)
    assert [(f.file, f.found) for f in check(data)] == [('episode_4.hdf5', '0.3 at every step'), ('(every file)', '0 at every step of 7 files')]


def test_the_recorders_word_does_not_cover_a_frozen_sensor_and_yours_does(tmp_path):
    g = np.random.default_rng(0)
    for i in range(40):
        e = wander(i, may_rest=('state 3', 'action 3'))
        e.state[:,3] = np.clip(g.uniform(.2, .8)+np.linspace(0, 1, 12), 0, 1)    # fingers that open fully, and stay so
        e.action[:,3] = 0
        if i == 3: e.state[:,3] = 1
        if i == 7: e.state[:,3] = .437
        if i == 9: e.action[:,3] = .3
        write_episode(tmp_path/f'episode_{i}.hdf5', e)
    assert [(f.file, f.field) for f in check(tmp_path)] == [('episode_7.hdf5', 'observations/qpos, dimension 3'), ('episode_9.hdf5', 'action, dimension 3')]
    declare(tmp_path, 'state 3', 'action 3')
    assert check(tmp_path) == []


def test_short_episodes_are_not_blamed_for_standing_still(tmp_path):
    for i in range(4): write_episode(tmp_path/f'{i}.hdf5', wander(i, l=1))
    assert check(tmp_path) == []


# before training

def test_a_verdict_is_kept_until_a_file_changes(data, monkeypatch):
    from vla_nb.data import doctor
    calls, real = [], doctor._judge
    monkeypatch.setattr(doctor, '_judge', lambda *a, **k: calls.append(1) or real(*a, **k))
    src = Hdf5Source(data)
    for d in (data, str(data), src, Subset(src, [0, 1]), Windows(Subset(src, [0, 1]), 4)): require_healthy(d)
    assert len(calls) == 1
    breakage(data/'episode_7.hdf5', 'nan in action')
    for _ in range(2):
        with pytest.raises(ValueError, match='episode_7.hdf5: action'): require_healthy(Subset(src, [0, 1]))
    assert len(calls) == 3


def test_a_list_of_files_and_another_place_for_the_verdict(data, tmp_path_factory):
    cache = tmp_path_factory.mktemp('cache')
    require_healthy(Hdf5Source([data/f'episode_{i}.hdf5' for i in range(4)]), cache=cache)
    assert (cache/'.healthy.json').exists() and not (data/'.healthy.json').exists()


def test_a_source_without_files_passes():
    require_healthy(ArraySource([wander(0)]))


def test_a_fault_reads_as_one_line():
    assert str(Fault('a.hdf5', 'action', 'x', 'y', 'mend it')) == 'a.hdf5: action: expected x, found y; mend it'
