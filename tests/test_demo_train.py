"When one of the demo's two trainings fails, the other is stopped and the one that failed is named"
import io, sys, time

import pytest

from vla_nb import demo as d


def test_a_failed_training_ends_the_phase(tmp_path, monkeypatch):
    def command(c, name, *more):
        return [sys.executable, '-c', 'raise SystemExit("out of disk")' if name == 'blind' else 'import time; time.sleep(60)']
    monkeypatch.setattr(d, 'train_command', command)
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match='blind stopped') as e: d.train_phase(d.Demo(out=tmp_path, quick=True))
    assert 'out of disk' in str(e.value) and time.monotonic() - began < 30


def test_the_bar_of_a_resumed_run_shows_the_speed_of_its_own_steps():
    now, bar = [0.], d.tqdm(total=1000, file=io.StringIO(), mininterval=0)
    bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 0, 0
    for t, step in ((1, 0), (60, 0), (61, 600), (62, 605), (63, 610)):    # waits a minute for its turn, then goes on at 600
        now[0] = t
        d.progress(bar, step, None)
        assert (bar.format_dict['rate'] or 5) == pytest.approx(5)
    assert bar.n == 610 and bar.initial == 600 and bar.format_dict['elapsed'] == 2
