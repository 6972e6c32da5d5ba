"Evaluation beyond its pages: processes, determinism, doors that refuse, the report's file"
from functools import partial

import numpy as np, pytest, torch

from vla_nb.core import Actions
from vla_nb.eval.metrics import Success, success_table, tally
from vla_nb.eval.point import Looker, PointReach
from vla_nb.eval.rollout import (RecedingHorizon, TemporalEnsemble, ablations, evaluate, expert_rollout, ordinary, rollout,
    scrambled_instruction)

where = dict(make_env=PointReach, tasks=PointReach.tasks, seeds=range(7, 12), progress=False)


def ends(rs): return [(r.task, r.seed, r.said, r.instruction_said, r.achieved, r.steps) for r in rs]


def test_two_processes_give_what_one_gives():
    args = dict(where, conditions=(ordinary, *ablations), n_envs=4, film=2)
    one, two = evaluate(partial(Looker, noise=.4), workers=1, **args), evaluate(partial(Looker, noise=.4), workers=2, **args)
    assert list(one) == list(two) == ['ordinary', 'blank_images', 'scrambled_instruction', 'no_instruction']
    for name in one:
        assert ends(one[name]) == ends(two[name])
        for a, b in zip(one[name], two[name]): assert (a.frames is None) == (b.frames is None)
    for a, b in zip(one['ordinary'][:2], two['ordinary'][:2]): assert np.array_equal(a.frames, b.frames)
    assert ends(expert_rollout(workers=2, **where)) == ends(expert_rollout(**where))


def test_the_callers_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    rollout(Looker(noise=.2).act, **where)
    assert torch.equal(state, torch.random.get_rng_state())


class NoSeed(Looker):
    "A policy that draws from the generator alone"
    def act(self, obs, generator=None): return super().act(obs, generator)


def test_a_generator_alone_is_repeatable():
    assert ends(rollout(NoSeed(noise=.4).act, **where)) == ends(rollout(NoSeed(noise=.4).act, **where))


def test_film_has_a_frame_for_the_start_and_each_step():
    rs = rollout(Looker().act, film=4, **where)
    assert [r.frames is not None for r in rs] == [True]*4 + [False]*11
    for r in rs[:4]: assert r.frames.shape == (r.steps+1, 32, 32, 3) and r.frames.dtype == np.uint8


class Looks(PointReach):
    "Counts how often it is rendered"
    seen = 0
    def observe(self): Looks.seen += 1; return super().observe()


def test_it_renders_only_to_look():
    rs = rollout(Looker().act, Looks, ['red'], [0], controller=RecedingHorizon(4), n_envs=1, progress=False)
    assert Looks.seen == 1 + (rs[0].steps-1)//4


def test_an_episode_ends_at_its_limit():
    class Still(Looker):
        def act(self, obs, generator=None): return Actions(torch.zeros(len(obs), 5, 2))
    rs = rollout(Still().act, **where)
    assert {r.steps for r in rs} == {PointReach.max_steps} and not any(r.success or r.followed for r in rs)


def test_nan_is_refused():
    class Nan(Looker):
        def act(self, obs, generator=None): return Actions(torch.full((len(obs), 5, 2), torch.nan))
    with pytest.raises(ValueError, match='diverged'): rollout(Nan().act, **where)


def test_scrambled_needs_another_task():
    class One(PointReach): tasks = ('red',)
    with pytest.raises(ValueError, match='at least 2'): rollout(Looker().act, One, ['red'], [0], condition=scrambled_instruction, progress=False)


def test_temporal_ensemble_is_acts():
    "Against ACT's own formulation: a table of all predictions by (time asked, time meant)"
    rng, t, n, m = np.random.default_rng(0), 7, 20, .01
    chunks, table, plan = rng.normal(size=(n, t, 3)), np.zeros((n, n+t, 3)), TemporalEnsemble(m).start()
    for s in range(n):
        table[s, s:s+t] = chunks[s]
        now = table[max(0, s-t+1):s+1, s]
        w = np.exp(-m*np.arange(len(now)))
        want = (now*(w/w.sum())[:,None]).sum(0)
        assert np.allclose(plan(chunks[s]), want[None], atol=1e-12)


def test_counts():
    assert str(Success()) == 'no episodes' and '–' in success_table({'nothing': Success()})
    assert sum(tally([('a', True), ('b', False)]).values()) == Success(2, 1)
    with pytest.raises(ValueError): Success(3, 4)
