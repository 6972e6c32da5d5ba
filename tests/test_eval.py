"Evaluation beyond its pages: processes, determinism, doors that refuse, the report's file"
import re
from functools import partial

import numpy as np, pytest, torch

from vla_nb.core import Actions
from vla_nb.eval.metrics import Success, success_table, tally
from vla_nb.eval.point import Looker, PointReach
from vla_nb.eval.report import figure_svg, success_groups, write_report
from vla_nb.eval.rollout import (Crew, RecedingHorizon, TemporalEnsemble, ablations, blank_images, evaluate, expert_rollout,
    ordinary, rollout, scrambled_instruction)
from vla_nb.eval.video import enlarge, side_by_side, write_gif, write_mp4

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


class Built(PointReach):
    "Counts how many were built"
    n = 0
    def __init__(self): Built.n += 1; super().__init__()


def test_a_crew_builds_its_environments_once():
    args = dict(where, make_env=None)
    with Crew(Built, n_envs=4) as crew:
        args['make_env'] = crew
        first = evaluate(Looker, conditions=(ordinary, blank_images), **args)
        shaky = evaluate(partial(Looker, noise=.4), **args)
        expert = expert_rollout(**args)
    assert Built.n == 4
    assert ends(first['ordinary']) == ends(rollout(Looker().act, **where))
    assert ends(shaky['ordinary']) != ends(first['ordinary'])
    assert all(r.success for r in expert) and len(expert) == 15


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


result = {'success': {'press <red>': {'n': 20, 'k': 19}, 'press & hold': {'n': 20, 'k': 0}}, 'expert': {'n': 40, 'k': 40},
    'ablations': {'blank_images': {'n': 0, 'k': 0}}, 'seconds_by_phase': {'record': 1.5, 'train': 130.}, 'seconds_total': 131.5, 'seed': 3}


def test_a_report_stands_alone(tmp_path):
    from matplotlib.figure import Figure
    fig = Figure()
    fig.subplots().plot([1, 2])
    frames = np.random.default_rng(0).integers(0, 255, (4, 9, 11, 3), np.uint8)
    film = write_gif(tmp_path/'a.gif', frames)
    path = write_report(tmp_path/'new'/'report.html', result, {'told <b>': film}, {'Loss & more': fig}, {'lr': 1e-3}, ['vla-nb eval x'], chance=.5)
    html = path.read_text()
    for bad in ('<red>', 'told <b>', 'src="http', 'href="http', '@import', '<script', '<!DOCTYPE svg', str(tmp_path)): assert bad not in html, bad
    assert not re.search(r'url\((?!#)', html)
    for good in ('47.5 %', '19 of 40', 'no episodes', 'press &lt;red&gt;', 'Loss &amp; more', 'prefers-color-scheme', '2 min 10 s', '<td>lr</td><td>0.001</td>', 'data:image/gif'):
        assert good in html, good
    assert html.count('<div') == html.count('</div>') and html.count('<span') == html.count('</span>')
    assert [p.name for p in (tmp_path/'new').iterdir()] == ['report.html']
    assert write_report(tmp_path/'again.html', result, {'told <b>': film}, {'Loss & more': fig}, {'lr': 1e-3}, ['vla-nb eval x'], chance=.5).read_text() == html


def test_a_report_needs_its_success():
    with pytest.raises(ValueError, match='counts by instruction'): success_groups({'expert': {'n': 1, 'k': 1}})


def test_a_bare_report_has_no_empty_sections(tmp_path):
    html = write_report(tmp_path/'r.html', {'success': {'reach': {'n': 3, 'k': 3}}}).read_text()
    assert 'Films' not in html and 'Next' not in html and 'Where the time went' not in html and 'class="films"' not in html


def test_svg_takes_the_pages_colours():
    from matplotlib.figure import Figure
    fig = Figure()
    fig.subplots().set_title('claim')
    svg = figure_svg(fig)
    assert svg.startswith('<svg') and 'currentColor' in svg and '#000000' not in svg and 'claim' in svg and 'height="' not in svg[:svg.index('>')]


def test_films(tmp_path):
    a, b = np.zeros((3, 5, 4, 3), np.uint8), np.full((7, 5, 6, 3), 9, np.uint8)
    both = side_by_side([a, b], gap=2)
    assert both.shape == (7, 5, 12, 3) and (both[:,:,4:6] == 255).all() and (both[6,:,6:] == 9).all()
    assert enlarge(a, 12).shape == (3, 15, 12, 3)
    with pytest.raises(ValueError, match='one height'): side_by_side([a, b[:,:4]])
    write_gif(tmp_path/'one.gif', a[:1])
    if write_mp4(tmp_path/'odd.mp4', np.zeros((3, 33, 35, 3), np.uint8)): assert (tmp_path/'odd.mp4').stat().st_size > 100
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]
