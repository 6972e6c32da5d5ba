"When one of the demo's two trainings fails, the other is stopped and the one that failed is named"
import sys, time

import pytest

from vla_nb import demo as d


def test_a_failed_training_ends_the_phase(tmp_path, monkeypatch):
    def command(c, name, *more):
        return [sys.executable, '-c', 'raise SystemExit("out of disk")' if name == 'blind' else 'import time; time.sleep(60)']
    monkeypatch.setattr(d, 'train_command', command)
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match='blind stopped') as e: d.train_phase(d.Demo(out=tmp_path, quick=True))
    assert 'out of disk' in str(e.value) and time.monotonic() - began < 30
