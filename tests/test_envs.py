"The simulated worlds: renderers without OpenGL, determinism, and a recorder that survives kill -9"
import os, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vla_nb.data.hdf5 import Hdf5Source
from vla_nb.envs.record import demonstrate, record
from vla_nb.envs.tabletop import SUITES, Tabletop

RAYS = partial(Tabletop, 'buttons', renderer='rays', size=32)


@pytest.fixture(scope='module')
def env(): return RAYS()


def content(folder):
    "Everything that a reader sees of each episode"
    out = {}
    for p in sorted(folder.glob('*.hdf5')):
        e = Hdf5Source([p]).episode(0)
        out[p.name] = e.instruction, e.state.tobytes(), e.action.tobytes(), b''.join(e.cameras['front'].jpeg(i) for i in range(len(e)))
    return out


def run(code, **env):
    keep = {k: v for k, v in os.environ.items() if k not in ('MUJOCO_GL', 'PYOPENGL_PLATFORM')}
    return subprocess.run([sys.executable, '-c', code], env={**keep, **env}, capture_output=True, text=True, timeout=120)


def test_import_has_no_effect():
    r = run('import os, sys; b = dict(os.environ); import vla_nb.envs.record, vla_nb.envs.tabletop, vla_nb.envs.render, vla_nb.envs.scene\n'
            'assert dict(os.environ) == b; assert not {"mujoco", "metaworld", "OpenGL"} & set(sys.modules)')
    assert r.returncode == 0, r.stderr


def test_rays_without_opengl():
    "With MUJOCO_GL unset and OpenGL's libraries unloadable, `auto` answers rays and the world works"
    r = run('''
import ctypes, ctypes.util, re
load = ctypes.CDLL.__init__
def deny(self, name, *a, **k):
    if re.search('libE?GL|OSMesa|libX11', str(name)): raise OSError(f'{name}: hidden for this test')
    return load(self, name, *a, **k)
ctypes.CDLL.__init__, find = deny, ctypes.util.find_library
ctypes.util.find_library = lambda name: None if name in ('GL', 'EGL', 'OSMesa', 'X11') else find(name)
import vla_nb.envs.render as render
render._PROBE = 'raise SystemExit(1)'    # the probe runs in a process of its own, where nothing is hidden
from vla_nb.envs.tabletop import Tabletop
env = Tabletop('buttons', size=32)
assert env.backend == 'rays'
obs = env.reset(0, 'red')
env.step(env.expert())
assert obs.images.float().std() > 20
''')
    assert r.returncode == 0, r.stderr[-2000:]


def test_probe_failure_is_an_answer():
    r = run('from vla_nb.envs.render import pick_backend, works\n'
            'assert not works("no such backend")\n'
            'import vla_nb.envs.render as r; r._PROBE = "import os; os.abort()"\n'
            'assert pick_backend() == "rays"\n'
            'try: pick_backend("egl")\n'
            'except ValueError as e: assert "rays" in str(e)\n'
            'else: raise AssertionError')
    assert r.returncode == 0, r.stderr[-2000:]


@pytest.mark.parametrize('suite', ['buttons', 'desk', 'desk_two'])
def test_same_seed_same_world(suite):
    a, b = (Tabletop(suite, renderer='rays', size=32) for _ in range(2))
    task = a.tasks[-1]
    demonstrate(b, b.tasks[0], 11)    # what one world has been through does not matter
    x, y = (demonstrate(e, task, 5) for e in (a, b))
    assert x.instruction == y.instruction and np.array_equal(x.action, y.action) and np.array_equal(x.state, y.state)
    assert all(np.array_equal(x.cameras['front'][i], y.cameras['front'][i]) for i in range(len(x)))
    assert not np.array_equal(demonstrate(a, task, 6).action[:5], x.action[:5])


def test_achieved_is_what_was_done(env):
    "Told one thing, made to do another: the other is what counts, and the first button stays the answer"
    for told, done in (('red', 'green'), ('green', 'blue')):
        env.reset(3, told)
        assert env.achieved() is None
        env.task = done    # the expert works on this one
        for _ in range(env.max_steps):
            env.step(env.expert())
            if env.achieved(): break
        assert env.achieved() == done
        for _ in range(5): env.step(np.array([0, -1, 0, 0]))
        assert env.achieved() == done


def test_idle_achieves_nothing(env):
    env.reset(3, 'red')
    for _ in range(env.max_steps): env.step(np.zeros(4))
    assert env.achieved() is None


def test_expert_is_reliable(env):
    "Unseen layouts, every task"
    assert all(demonstrate(env, t, 60_000 + s, noise=.3).success for s in range(3) for t in env.tasks)


def test_errors_name_what_was_expected(env):
    with pytest.raises(ValueError, match='task.*red.*purple'): env.reset(0, 'purple')
    with pytest.raises(ValueError, match=r'action.*\(4,\).*\(7,\)'): env.step(np.zeros(7))
    with pytest.raises(ValueError, match='suite.*buttons.*kitchen'): Tabletop('kitchen', renderer='rays')


def test_heldout_words_are_known():
    for s in SUITES.values():
        known = {w for t in s.tasks.values() for p in t.phrases for w in p.split()}
        assert all({w for p in t.heldout for w in p.split()} <= known for t in s.tasks.values())


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    record(RAYS, folder, episodes_per_task=3, workers=0, progress=False)
    return content(folder)


def test_kill_and_resume(tmp_path, whole):
    "kill -9 of the recorder: its workers end, nothing half is listed, and the same call finishes the folder to the byte"
    code = (f'from functools import partial\nfrom vla_nb.envs.record import record\nfrom vla_nb.envs.tabletop import Tabletop\n'
            f'record(partial(Tabletop, "buttons", renderer="rays", size=32), {str(tmp_path/"r")!r}, episodes_per_task=3, workers=2, progress=False)')
    p = subprocess.Popen([sys.executable, '-c', code], start_new_session=True)
    end = time.time() + 100
    while time.time() < end and len(list((tmp_path/'r').glob('*.hdf5'))) < 2: time.sleep(.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    end = time.time() + 20
    while time.time() < end and alive(p.pid): time.sleep(.1)
    assert not alive(p.pid), 'a worker outlived its recorder'
    some = content(tmp_path/'r')
    assert 2 <= len(some) and all(whole[k] == v for k, v in some.items())
    summary = record(RAYS, tmp_path/'r', episodes_per_task=3, workers=0, progress=False)
    assert summary['episodes'] == 9 and summary['recorded'] == 9 - len(some)
    assert content(tmp_path/'r') == whole
    assert not [q for q in (tmp_path/'r').iterdir() if q.name.startswith('.')]


def alive(session):
    "Whether a process of the session still runs"
    for p in Path('/proc').glob('[0-9]*/stat'):
        try: fields = p.read_text().rsplit(')', 1)[1].split()
        except OSError: continue
        if int(fields[3]) == session and fields[0] != 'Z': return True
    return False


def test_half_a_file_is_never_listed(tmp_path, whole):
    record(RAYS, tmp_path, episodes_per_task=1, workers=0, progress=False)
    name = '.episode_000099_red.hdf5.123.tmp'
    (tmp_path/name).write_bytes(b'\x89HDF\r\n\x1a\n half')
    assert len(Hdf5Source(tmp_path)) == 3
    record(RAYS, tmp_path, episodes_per_task=1, workers=0, progress=False)
    assert not (tmp_path/name).exists()


class Clumsy(Tabletop):
    "An expert that does nothing on every second candidate"
    max_steps_clumsy = 25
    def expert(self): return np.zeros(4, np.float32) if self.now//3 % 2 == 0 else super().expert()
    def reset(self, seed, task):
        self.now, self.max_steps = seed, self.max_steps_clumsy
        return super().reset(seed, task)


def test_failures_are_dropped_and_counted(tmp_path):
    s = record(partial(Clumsy, 'buttons', renderer='rays', size=16), tmp_path, episodes_per_task=2, workers=0, noise=0., progress=False)
    assert s['expert'] == {t: dict(n=4, k=2) for t in ('red', 'green', 'blue')} and s['episodes'] == 6
    assert [p.name.split('_')[1] for p in sorted(tmp_path.glob('*.hdf5'))] == [f'{k:06d}' for k in (3, 4, 5, 9, 10, 11)]
    again = record(partial(Clumsy, 'buttons', renderer='rays', size=16), tmp_path, episodes_per_task=2, workers=0, noise=0., progress=False)
    assert again['recorded'] == 0 and again['expert'] == s['expert']


def test_hopeless_expert_stops(tmp_path):
    class Never(Clumsy):
        max_steps_clumsy = 1
    with pytest.raises(RuntimeError, match='red.*succeed.*found 0'):
        record(partial(Never, 'buttons', renderer='rays', size=16), tmp_path, episodes_per_task=1, workers=0, progress=False)


# --- Meta-World and ALOHA ---

def run_expert(env, task, seed, steps=None):
    env.reset(seed, task)
    for n in range(steps or env.max_steps):
        env.step(env.expert())
        if env.achieved(): break
    return env


def test_metaworld_experts_on_ten_tasks():
    from vla_nb.envs.metaworld import MT10, MetaWorld
    env = MetaWorld(MT10, renderer='rays', size=16)
    done = {t: run_expert(env, t, 4).achieved() for t in MT10}
    assert [t for t, d in done.items() if d != t] in ([], ['peg-insert-side-v3']), done    # that expert fails now and then


def test_metaworld_marks_only_where_they_are_the_goal():
    from vla_nb.envs.metaworld import PHRASES, MetaWorld
    env = MetaWorld(('push-v3', 'drawer-open-v3'), renderer='rays', size=96)
    shown = {t: (env.reset(0, t), len(env.views[0].sites))[1] for t in env.tasks}
    assert shown == {'push-v3': 1, 'drawer-open-v3': 0}
    marked = {t for t, (said, _) in PHRASES.items() if 'mark' in said}
    assert marked == {f'{k}-v3' for k in ('reach', 'reach-wall', 'push', 'push-wall', 'push-back', 'pick-place', 'pick-place-wall')}


def test_metaworld_goal_reaches_the_expert():
    "The stock environment zeroes the goal in what it shows; the expert of `reach` would then go elsewhere"
    from vla_nb.envs.metaworld import MetaWorld
    env = MetaWorld(('reach-v3',), renderer='rays', size=16)
    env.reset(1, 'reach-v3')
    assert np.allclose(env._vector()[-3:], env.env._target_pos) and np.abs(env._vector()[-3:]).sum() > .1


def test_metaworld_same_seed_same_episode():
    from vla_nb.envs.metaworld import MetaWorld
    env = MetaWorld(('pick-place-v3', 'coffee-pull-v3'), renderer='rays', size=24)
    for t in env.tasks:
        a = demonstrate(env, t, 3, noise=.05)
        demonstrate(env, t, 4, noise=.05)
        b = demonstrate(env, t, 3, noise=.05)
        assert np.array_equal(a.action, b.action) and np.array_equal(a.cameras['corner2'][2], b.cameras['corner2'][2])


def test_aloha_transfers_and_repeats(tmp_path):
    from vla_nb.envs.aloha import Aloha
    s = record(partial(Aloha, renderer='rays', size=16), tmp_path, episodes_per_task=2, seed=20, workers=0, noise=.01, push=0, progress=False)
    assert s['expert'] == {'transfer': dict(n=2, k=2)}
    e = Hdf5Source(tmp_path).episode(0)
    assert e.action.shape[1] == e.state.shape[1] == 14 and e.fps == 50 and 200 < len(e) <= 400
    again = demonstrate(Aloha(renderer='rays', size=16), 'transfer', 20, noise=.01, push=0)
    assert np.array_equal(again.action, e.action)


@pytest.mark.parametrize('suite', ['buttons', 'desk', 'desk_two'])
def test_recordings_are_healthy(tmp_path, suite):
    from vla_nb.data.doctor import check, report
    record(partial(Tabletop, suite, renderer='rays', size=16), tmp_path, episodes_per_task=2, workers=0, progress=False)
    faults = check(tmp_path)
    assert not faults, report(faults)
