import sys
from pathlib import Path

import pytest

from vla_nb.compare import Compare, compare_table, plan
from vla_nb.demo import steps_done, train_runs


def test_plan_names_each_run():
    todo = plan(Compare(policies=('dexvla', 'pi05')))
    assert {k: n for k,(_,n) in todo.items()} == dict(dexvla=2500, pi05=2500)
    assert todo['pi05'][0][:2] == ['--policy', 'pi05']
    assert plan(Compare(policies=('dexvla',), quick=True))['dexvla'][1] == 20

def test_plan_refuses_a_policy_without_its_base():
    with pytest.raises(ValueError, match='starts from the run of pi05'): plan(Compare(policies=('comet',)))
    with pytest.raises(ValueError, match='dexvla'): plan(Compare(policies=('dexvl',)))

def run_that(code): return [sys.executable, '-c', code]

def test_a_run_that_needs_another_begins_after_it(tmp_path):
    seen, first, second = {}, tmp_path/'first'/'done', tmp_path/'second'/'done'
    commands = dict(second=run_that(f'from pathlib import Path as P; assert P({str(first)!r}).exists(); P({str(second)!r}).touch()'),
                    first=run_that(f'from pathlib import Path as P; P({str(first)!r}).touch()'))
    train_runs(tmp_path, commands, dict.fromkeys(commands, 1), needs=dict(second='first'), spent=lambda n, s: seen.update({n: s}))
    assert second.exists() and set(seen) == {'first', 'second'} and min(seen.values()) > 0

def test_a_failing_run_stops_the_others_and_shows_its_log(tmp_path):
    commands = dict(long=run_that('import time; time.sleep(60)'), bad=run_that('print("the reason"); raise SystemExit(3)'))
    with pytest.raises(ChildProcessError, match='(?s)bad stopped.*the reason'): train_runs(tmp_path, commands, dict.fromkeys(commands, 1))

def test_the_table_has_every_policy():
    row = dict(success=dict(n=60, k=54), other=dict(n=60, k=0), followed=dict(n=60, k=58), weights=2_000_000, trained=1_000_000, cpu_s=300., act_ms=12.5)
    assert '54/60' in compare_table(dict(dexvla=row)) and '5.0 CPU-min' in compare_table(dict(dexvla=row))

def test_a_line_that_is_being_written_is_not_read_yet(tmp_path):
    (tmp_path/'log.jsonl').write_text('{"step": 10, "loss": 2.5}\n{"step": 20, "loss": 2.25, "lr"')
    assert steps_done(tmp_path) == (10, 2.5)
    (tmp_path/'log.jsonl').write_text('{"step": 1')
    assert steps_done(tmp_path) == (0, None)
