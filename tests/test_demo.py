"The mechanics of the demo: every phase runs, and what it leaves can be read. A short budget cannot reach the success rate."
import json, subprocess, sys

import pytest

from vla_nb.demo import Demo, Phases


def demo(out, *more): return subprocess.run([sys.executable, '-m', 'vla_nb.cli', 'demo', '--quick', '--out', str(out), *more], capture_output=True, text=True)


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')
    r = demo(out)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return out


def test_result_holds_what_it_promises(out):
    r = json.loads((out/'result.json').read_text())
    assert set(r['ablations']) == {'blank_images', 'scrambled_instruction', 'no_instruction'}
    assert len(r['success']) == 3 and all({'n', 'k'} == set(v) for v in [*r['success'].values(), *r['ablations'].values(), r['followed_the_spoken_instruction']])
    assert {'record', 'train', 'measure', 'report'} == set(r['seconds_by_phase']) and r['seconds_total'] > 0
    assert r['seed'] == 0 and r['commit']


def test_report_is_one_file(out):
    html = (out/'report.html').read_text()
    assert 'data:image/gif' in html and 'src="http' not in html


def test_again_does_nothing_twice(out):
    before = (out/'policy'/'log.jsonl').stat().st_mtime_ns
    r = demo(out)
    assert r.returncode == 0 and (out/'policy'/'log.jsonl').stat().st_mtime_ns == before


def test_other_settings_are_refused(out):
    with pytest.raises(ValueError, match='seed'): Phases(Demo(out=out, quick=True, seed=1))
