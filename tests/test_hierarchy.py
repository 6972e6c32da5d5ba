"Two steps under one instruction: the world, the expert, the counts, and the timeline"
import matplotlib.pyplot as plt, numpy as np, pytest, torch

from vla_nb.core import Actions
from vla_nb.envs.record import demonstrate
from vla_nb.envs.tabletop import SUITES, Plan, Tabletop
from vla_nb.eval.hierarchy import compare, diary, difference, halves, how_far, measure, naming, outcomes, replay
from vla_nb.eval.metrics import Success
from vla_nb.eval.reasoning import Said
from vla_nb.eval.rollout import EpisodeResult, RecedingHorizon, ordinary, replaced_reasoning, true_reasoning
from vla_nb.viz.timeline import SubtaskTimeline, TimelineFigure, Told, hold, spans, timeline_strip, told


@pytest.fixture(scope='module')
def env(): return Tabletop('desk_two', renderer='rays', size=16)


class Pilot:
    "The scripted expert in a policy's clothes: names the step and does it, or does the step that it is made to name"
    speaks = True
    def __init__(self, env): self.env = env

    def act(self, obs, seed=None, reasoning=None):
        env, told = self.env, self.env.task
        said = reasoning[0] if reasoning else env.reasoning()
        env.task = next((t for t in env.tasks if env.reasoning(t) == said), told)
        action, env.task = env.expert(), told
        return Actions(torch.from_numpy(action)[None,None].float().repeat(len(obs), 1, 1), [said]*len(obs))


def test_the_desk_is_as_it_was():
    "What the single tasks gave before there were plans, to the digit"
    was = {'drawer': (54, 'slide the drawer out', 'the drawer is in the middle, pull it open.', [.0188, .5701, .0792, 1.], 114.405),
        'button': (39, 'press the button', 'the button is on the left, press it.', [.3029, .6413, .0532, 1.], 82.652),
        'left': (23, 'twist the handle to the left', 'the faucet is on the right, turn it left.', [-.3687, .7027, .1359, .2972], 76.314),
        'right': (21, 'twist the handle to the right', 'the faucet is on the right, turn it right.', [-.2496, .7133, .1327, .2959], 63.34)}
    desk = Tabletop('desk', renderer='rays', size=16)
    assert desk.tasks == tuple(was)
    for task,(n, words, said, state, moved) in was.items():
        ep = demonstrate(desk, task, 5)
        assert (len(ep), ep.instruction, ep.subtask[-1]) == (n, words, said)
        np.testing.assert_allclose(ep.state[-1], state, atol=2e-4)
        assert abs(np.abs(ep.action).sum() - moved) < .01
        assert desk.did == (task,) == desk.plan(task)


def test_the_expert_does_both_steps_in_order(env):
    for seed in range(70_000, 70_006):
        for task in env.tasks:
            ep = demonstrate(env, task, seed, noise=.15)
            assert ep.success and env.did == env.plan(task)
            said = spans(ep.subtask)
            assert len(said) == 2 and [halves(s)[0] for s,_,_ in said] == [env.steps[n].phrases[0] for n in env.plan(task)]


def test_both_orders_begin_and_end_alike():
    env = Tabletop('desk_two', renderer='rays', size=32)
    for seed in range(3):
        a, b = (env.reset(seed, t) for t in env.tasks)
        assert torch.equal(a.images, b.images) and torch.equal(a.state, b.state) and a.instruction != b.instruction
        bare = env.frame()
        env._tick('button')
        lit = env.frame()
        assert (np.abs(lit.astype(int) - bare).max(-1) > 40).sum() >= 8    # pixels
        env.reset(seed, env.tasks[0])
        assert np.array_equal(env.frame(), bare)
        env.data.joint('drawer-goal_slidey').qpos = -.14
        env.mj.mj_kinematics(env.model, env.data)
        assert (np.abs(env.frame().astype(int) - bare).max(-1) > 40).sum() >= 8


def test_a_wrong_order_is_the_other_task(env):
    env.reset(0, 'drawer_button')
    env._tick('button')
    assert env.achieved() is None and halves(env.reasoning())[0] == 'open the drawer' == halves(env.reasoning('button_drawer'))[0]
    env._tick('drawer')
    assert env.achieved() == 'button_drawer'
    assert env.reset(0, 'drawer_button') and env.did == () and env.achieved() is None


def test_phrases_say_the_order():
    for name,s in SUITES.items():
        for task,k in s.tasks.items():
            if not isinstance(k, Plan): continue
            assert not set(k.phrases) & set(k.heldout) and len(set(k.phrases)) >= 3
            for words in (*k.phrases, *k.heldout):
                at = [min(words.index(v) for v in verbs if v in words) for verbs in (dict(drawer=('open', 'pull', 'slide'), button=('press', 'push', 'hit'))[n] for n in k.steps)]
                assert at == sorted(at), words
    with pytest.raises(ValueError, match='task'): Tabletop('desk_two', renderer='rays', size=16).reset(0, 'drawer')


def test_a_pilot_follows_the_words_in_its_mouth(env, tmp_path):
    pilot = Pilot(env)
    got = measure(pilot, lambda: env, (ordinary, true_reasoning, replaced_reasoning), [3], [4], controller=RecedingHorizon(1), n_envs=1)
    rolls = got['rollouts']
    for k in ('ordinary', 'true_reasoning', 'heldout_phrasings'): assert rolls[k]['success'] == dict(n=2, k=2) and rolls[k]['progress']['all steps'] == 2
    assert rolls['replaced_reasoning']['obeyed'] == rolls['replaced_reasoning']['obeyed_first'] == dict(n=2, k=2)
    assert rolls['replaced_reasoning']['progress']['another step first'] == 2
    assert set(got['diary']) == {'ordinary', 'true_reasoning', 'replaced_reasoning'} and 'step' not in vars(env)
    frames = replay(env, got['diary']['replaced_reasoning'])
    assert len(frames) == len(got['diary']['replaced_reasoning']['actions'])+1 and env.achieved() == 'button_drawer'
    with pytest.raises(ValueError, match='diary'): replay(env, got['diary']['ordinary'] | dict(achieved='button_drawer'))
    both = compare(tmp_path/'r.json', dict(hierarchical=got), lambda: env, [3], dict(steps=0))
    assert both['expert'] == dict(n=2, k=2) and (tmp_path/'r.json').exists()


def test_counts():
    want = ['open the drawer on the left', 'press the button in the middle']
    said = [Said('t', 0, 0, want[0], want[0]), Said('t', 0, 1, want[0], 'open the drawer on the right'), Said('t', 0, 2, want[1], 'open the drawer in the middle')]
    assert {k: s.k for k,s in naming(said, near=0).items()} == {'whole subtask': 1, 'which step': 2, 'where': 2, 'whole, more than 0 steps from the change': 1}
    assert naming(said, near=9)['whole, more than 9 steps from the change'].n == 0
    assert halves('') == ('', '')
    assert how_far(('a', 'c'), ('a', 'b')) == 'another step first'
    e = EpisodeResult('t', 0, 't', '', 't', 5, did=('a', 'b'))
    assert 'obeyed_first' not in outcomes([e], lambda t: ('a', 'b'))
    d, low, high = difference(Success(60, 50), Success(60, 40))
    assert low < d < high and abs(d - 1/6) < 1e-12


def test_timeline(env):
    ep = demonstrate(env, 'button_drawer', 8, noise=.15, push=0)
    t = told(ep)
    assert t.end == 'succeeds' and len(spans(t.said)) == 2
    late = Told(t.instruction, t.frames, t.said[:1]*4 + t.said[:-4], t.said)
    v = SubtaskTimeline([t, late])
    v.pick.value = 1
    v.step.value = spans(t.said)[0][2]
    assert 'should be: open the drawer' in v.caption and v.play.value == v.step.value
    assert bytes(v.picture.value) == TimelineFigure(late).png(v.step.value)
    assert len(timeline_strip(Told('x', t.frames[:3], ['a', 'b', 'a']), 1).axes) == 3    # no flicker is lost
    assert spans([]) == [] and hold(['a'], 3, 3) == ('a',)*3
    with pytest.raises(ValueError, match='want: expected'): Told('x', t.frames, t.said, t.said[:-1])
    assert not plt.get_fignums()
