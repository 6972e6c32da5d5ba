"Reasoning from the tabletop to the rollout: what is recorded, what reaches the policy, and what is counted"
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vla_nb.core import Actions
from vla_nb.data.hdf5 import Hdf5Source, write_episode
from vla_nb.envs.record import demonstrate
from vla_nb.envs.tabletop import SUITES, Tabletop
from vla_nb.eval.point import Looker, PointReach
from vla_nb.eval.reasoning import Said, agreement, evaluate_reasoning, recite, slips
from vla_nb.eval.rollout import Crew, evaluate, no_reasoning, replaced_reasoning, rollout, true_reasoning


@pytest.fixture(scope='module')
def worlds(): return {s: Tabletop(s, renderer='rays', size=16) for s in SUITES}


class Discs(PointReach):
    def reasoning(self, task=None): return f'the {task or self.task} disc, walk to it.'


class Thinker(Looker):
    "Says where it goes, and goes where it says"
    def act(self, obs, seed=None, reasoning=None):
        said = reasoning or [f'the {s.split(" disc")[0].split()[-1]} disc, walk to it.' for s in obs.instruction]
        return Actions(super().act(obs.say(said), seed=seed).action, said)


class Puppet:
    "Moves by the sentence in its mouth alone; `env` tells where that is"
    def __init__(self, env): self.env, self.heard = env, []
    def act(self, obs, seed=None, reasoning=None):
        self.heard += reasoning
        told, self.env.task = self.env.task, next(t for t in self.env.tasks if t in reasoning[0])
        action = self.env.expert()
        self.env.task = told
        return Actions(torch.from_numpy(action)[None,None].float(), reasoning)


def test_the_place_in_the_words_is_the_place_in_the_picture(worlds):
    "The named colour dominates that third of the picture where the sentence says it is"
    env = Tabletop('buttons', renderer='rays', size=48)
    for seed in range(6):
        env.reset(seed, 'red')
        img = env.frame().astype(int)[24:40]    # the row of boxes
        for i,task in enumerate(env.tasks):
            strong = img[...,i] > 1.6*np.delete(img, i, -1).max(-1)
            thirds = [strong[:,k:k+16].sum() for k in (0, 16, 32)]
            assert ('left', 'middle', 'right')[int(np.argmax(thirds))] in env.reasoning(task)


@pytest.mark.parametrize('suite', [name for name,s in SUITES.items() if s.steps is None])
def test_the_expert_goes_over_once_from_moving_to_acting(worlds, suite):
    env = worlds[suite]
    for task in env.tasks:
        env.reset(2, task)
        said = []
        while env.achieved() is None and len(said) < env.max_steps:
            said.append(env.reasoning())
            env.step(env.expert())
        assert env.achieved() == task
        assert sum(a != b for a,b in zip(said, said[1:])) == 1
        assert said[0].endswith('move to it.') and not said[-1].endswith('move to it.')


def test_asking_moves_nothing_and_an_unknown_task_is_refused(worlds):
    env = worlds['buttons']
    env.reset(0, 'red')
    before = env._get()
    assert len({env.reasoning(t) for t in env.tasks}) == 3
    assert env.reasoning() == env.reasoning('red')
    np.testing.assert_array_equal(env._get(), before)
    with pytest.raises(ValueError, match='task'): env.reasoning('black')


def test_a_demonstration_carries_its_reasoning_into_the_file_and_back(worlds, tmp_path):
    ep = demonstrate(worlds['buttons'], 'green', 1)
    write_episode(tmp_path/'a.hdf5', ep)
    back = Hdf5Source(tmp_path).episode(0)
    assert back.subtask == ep.subtask and len(ep.subtask) == len(ep)
    assert demonstrate(PointReach(), 'red', 0).subtask is None    # a world that does not think aloud


def test_thinking_aloud_changes_nothing_else_in_a_demonstration(worlds):
    env = worlds['buttons']
    with_it = demonstrate(env, 'blue', 3)
    silent = SimpleNamespace(**{k: getattr(env, k) for k in ('reset', 'observe', 'step', 'achieved', 'expert', 'cameras', 'action_dim', 'max_steps', 'tasks', 'fps', 'may_rest')})
    without = demonstrate(silent, 'blue', 3)
    np.testing.assert_array_equal(with_it.action, without.action)
    np.testing.assert_array_equal(with_it.state, without.state)
    np.testing.assert_array_equal(with_it.cameras['front'].frames, without.cameras['front'].frames)


def test_replaced_reasoning_reaches_the_policy_and_the_world_answers(worlds):
    env = worlds['buttons']
    with Crew(lambda: env, n_envs=1) as crew:
        puppet = Puppet(env)
        got = rollout(puppet.act, crew, ['red'], [0, 1], condition=replaced_reasoning, progress=False)
    assert [(r.said, r.thought, r.achieved) for r in got] == [('red', 'green', 'green'), ('red', 'blue', 'blue')]
    assert [r.obeyed for r in got] == [True, True] and not any(r.success for r in got)
    assert all(r.thought in w for r in got for w in r.words) and sum(len(r.words) for r in got) == len(puppet.heard)
    assert 'move to it' in got[0].words[0] and 'press it' in got[0].words[-1]    # the thought keeps up with the scene


def test_own_words_are_kept_and_nothing_was_obeyed():
    got = rollout(Thinker().act, Discs, Discs.tasks, range(2), progress=False)
    assert all(r.thought is None and not r.obeyed and r.words[0].split()[1] == r.task for r in got)
    assert all(r.words == () for r in rollout(Looker().act, Discs, Discs.tasks, range(2), progress=False))


def test_conditions_travel_to_other_processes():
    where = dict(tasks=PointReach.tasks, seeds=range(2), conditions=(no_reasoning,), n_envs=2, progress=False)
    one, two = [evaluate(Thinker, PointReach, workers=w, **where)['no_reasoning'] for w in (1, 2)]
    assert [(r.achieved, r.steps, r.words) for r in one] == [(r.achieved, r.steps, r.words) for r in two]


def test_what_cannot_be_made_to_think_is_refused():
    with pytest.raises(ValueError, match='takes a reasoning'): rollout(Looker().act, Discs, ['red'], [0], condition=true_reasoning, progress=False)
    with pytest.raises(ValueError, match='replaced_reasoning'): rollout(Thinker().act, PointReach, ['red'], [0], condition=replaced_reasoning, progress=False)
    with pytest.raises(ValueError, match='speaks'): recite(Looker(), Discs(), ['red'], [0])
    with pytest.raises(ValueError, match='with a reasoning'): recite(Thinker(), PointReach(), ['red'], [0])


def test_agreement_counts_halves_and_kinds():
    a, b = 'the red button is on the left, press it.', 'the red button is on the right, press it.'
    got = agreement(said := [Said('red', 0, i, a, g) for i,g in enumerate((a, b, 'nonsense'))])
    assert [s.k for s in got.values()] == [1, 1, 2, 1] and all(s.n == 3 for s in got.values())
    assert slips(said) == [dict(task='red', seed=0, steps=[1, 2], of=3, want=a, got=b)]


def test_a_measurement_writes_what_it_returns(tmp_path):
    found = evaluate_reasoning(Thinker, Discs, tmp_path/'r.json', Discs.tasks, seeds=range(3), recited=range(10, 12), run=dict(cpu_minutes=0.))
    assert json.loads((tmp_path/'r.json').read_text()) == found
    assert found['rollouts']['replaced_reasoning'] == {'success': {'n': 9, 'k': 0}, 'followed': {'n': 9, 'k': 0}, 'obeyed': {'n': 9, 'k': 9}}
    assert found['rollouts']['ordinary']['success']['k'] == 9 and found['reasoning']['whole sentence']['k'] == found['reasoning']['whole sentence']['n']
    assert found['slips'] == [] and found['seeds'] == {'rollouts': [0, 1, 2], 'recited': [10, 11]}


def test_dexvla_qwen_takes_words_into_its_mouth(worlds):
    "Untrained: the given words reach the hidden states, so other words give other actions under one seed"
    from vla_nb.policies.dexvla_qwen import DexVLAQwen
    from vla_nb.policies.dexvla_config import DexVLAQwenConfig
    env = worlds['buttons']
    obs = env.reset(0, 'red')
    stats = {k: dict(mean=[0.]*4, std=[1.]*4, min=[-1.]*4, max=[1.]*4, q01=[-1.]*4, q99=[1.]*4) for k in ('state', 'action')}
    texts = [env.phrase(t, 0) for t in env.tasks] + [env.reasoning(t) for t in env.tasks]
    policy = DexVLAQwen.from_data(DexVLAQwenConfig(width=64, depth=1, vision_depth=1, vision_width=32, head_width=32, head_depth=1), texts, stats)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters(): p.normal_(std=.1) if not p.any() else None    # FiLM and adaLN-Zero start deaf
    policy.eval()
    act = [policy.act(obs, seed=torch.tensor([1]), reasoning=[env.reasoning(t)]) for t in ('red', 'green')]
    assert act[0].text == [env.reasoning('red')] and not torch.equal(act[0].action, act[1].action)
    assert torch.equal(act[0].action, policy.act(obs, seed=torch.tensor([1]), reasoning=[env.reasoning('red')]).action)
