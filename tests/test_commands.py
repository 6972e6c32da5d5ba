"Every `vla-nb` command that a page shows is one that the command line accepts"
import json, re, shlex
from pathlib import Path

import pytest

from vla_nb.cli import COMMANDS
from vla_nb.run import train_settings
from vla_nb.train.config import parse_config

root = Path(__file__).resolve().parent.parent


def commands():
    for p in sorted(root.glob('nbs/**/[0-9i]*.ipynb')):
        if '.ipynb_checkpoints' in p.parts: continue
        text = '\n'.join(''.join(c['source']) for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'markdown')
        for block in re.findall(r'^```\w*\n(.*?)^```', text, flags=re.M | re.S):
            for line in block.replace('\\\n', ' ').splitlines():
                if line.startswith('vla-nb ') and '…' not in line: yield pytest.param(line, id=f'{p.relative_to(root/"nbs")}: {line[:50]}')


@pytest.mark.parametrize('line', list(commands()))
def test_shown_commands_are_accepted(line, capsys):
    _, name, *words = shlex.split(line, comments=True)
    try: parse_config(train_settings(words) if name == 'train' else COMMANDS[name][0], words, prog=f'vla-nb {name}')
    except SystemExit: pytest.fail(f'{line}\n{capsys.readouterr()}')
