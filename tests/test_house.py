"""The house rules of the library: which room may import which, how long a notebook may be, and that importing is silent.

The arrows and the budgets are those of docs/decisions.md; a page that breaks one is to be split, not excused.
"""
import ast, json, re, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
nbs = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and not p.name.startswith('_'))
modules = sorted(p for p in (root/'vla_nb').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
below = {  # room -> the rooms that it may import
    'core': set(), 'data': {'core'}, 'text': {'core'}, 'layers': {'core'}, 'objectives': {'core'},
    'backbones': {'core', 'layers'}, 'heads': {'core', 'layers'},
    'policies': {'core', 'data', 'text', 'layers', 'objectives', 'backbones', 'heads'},
    'replay': {'core', 'data', 'text', 'layers', 'objectives', 'backbones', 'heads', 'policies'},
    'train': {'core', 'data'}, 'envs': {'core', 'data'}, 'eval': {'core', 'envs'}, 'serve': {'core'}, 'viz': {'core', 'data'},
}
no_networks = {'data', 'objectives'}


def name(p): return p.relative_to(root/'nbs').as_posix()
def room(module): return module.split('.')[1] if module.count('.') else module


def imports(path):
    "The modules that a file imports, at the top or inside a function"
    for n in ast.walk(ast.parse(path.read_text())):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        if isinstance(n, ast.ImportFrom):    # nbdev writes `from vla_nb.core import x` as `from ..core import x`
            base = ('vla_nb', *path.relative_to(root/'vla_nb').parent.parts)[:-(n.level-1) or None] if n.level else ()
            mod = '.'.join([*base, *([n.module] if n.module else [])])
            yield from ([f'{mod}.{a.name}' for a in n.names] if mod in ('vla_nb', 'torch') else [mod])


@pytest.mark.parametrize('path', modules, ids=lambda p: p.relative_to(root).as_posix())
def test_arrows_point_down(path):
    here = path.relative_to(root/'vla_nb').with_suffix('').parts
    own = here[0]
    for m in imports(path):
        if m.startswith('vla_nb') and own in below:
            to = room(m)
            assert to == own or to in below[own], f'{own} may import {sorted(below[own])}, but {path.name} imports {m}'
        if own in no_networks: assert not m.startswith('torch.nn'), f'{own} holds no networks, but {path.name} imports {m}'
        assert own == 'cli' or room(m) != 'cli' or not m.startswith('vla_nb'), 'nothing imports the commands'


def code_cells(nb): return [c for c in nb['cells'] if c['cell_type'] == 'code']
def source(c): return ''.join(c['source'])
def body(c): return [l for l in source(c).splitlines() if l.strip() and not l.startswith('#|')]
def directives(c): return set(re.findall(r'^#\|\s*(\w+)', source(c), flags=re.M))
def exported(c): return bool(directives(c) & {'export', 'exports', 'exporti'})


@pytest.mark.parametrize('path', nbs, ids=name)
def test_budgets(path):
    nb = json.loads(path.read_text())
    code = [c for c in code_cells(nb) if 'hide' not in directives(c) and 'default_exp' not in directives(c)]
    exp, lesson = [c for c in code if exported(c)], [c for c in code if not exported(c)]
    n = sum(len(body(c)) for c in exp)
    limit = 150 if name(path).startswith('policies/') else 250
    assert n <= limit, f'{n} exported lines, at most {limit}: split by idea'
    assert len(code) <= 60, f'{len(code)} code cells, at most 60'
    for c in exp: assert len(body(c)) <= 45, f'an export cell of {len(body(c))} lines, at most 45:\n{source(c)[:200]}'
    for c in lesson: assert len(body(c)) <= 12, f'a lesson cell of {len(body(c))} lines, at most 12 (aim at 8):\n{source(c)[:200]}'
    run = 0
    for c in nb['cells']:
        if c['cell_type'] == 'code' and c not in code: continue
        run = run + 1 if c['cell_type'] == 'code' else 0
        assert run <= 3, f'more than 3 code cells in a row:\n{source(c)[:200]}'
    words = sum(len(source(c).split()) for c in nb['cells'] if c['cell_type'] == 'markdown')
    lines = sum(len(body(c)) for c in code)
    if lines > 20: assert 1 <= words/lines <= 6, f'{words} words for {lines} lines of code; 1 to 6 words a line'
    for c in nb['cells']:
        for o in c.get('outputs', []):
            png = o.get('data', {}).get('image/png', '')
            assert len(''.join(png))*3/4 < 60_000, f'a figure of {len("".join(png))*3//4000} kB, at most 60 kB:\n{source(c)[:200]}'


@pytest.mark.parametrize('path', nbs, ids=name)
def test_opening(path):
    "H1 is the page's name, and a `>` line below it its summary; no heading is deeper than H3"
    cells = json.loads(path.read_text())['cells']
    md = [source(c) for c in cells if c['cell_type'] == 'markdown']
    assert re.match(r'# \S.*\n+> \S', md[0]), 'start with `# Name`, an empty line and `> one-sentence summary`'
    assert not any(re.search(r'^#### ', s, flags=re.M) for s in md), 'no H4'


def test_every_module_imports_in_silence():
    "Importing the library prints nothing, starts no CUDA context, sets no environment variable and touches no file"
    names = [p.relative_to(root).with_suffix('').as_posix().replace('/', '.') for p in modules]
    code = f'''
import os, sys, importlib, warnings
before = dict(os.environ)
import torch
rng = torch.random.get_rng_state()
for m in {names!r}: importlib.import_module(m)
assert not torch.cuda.is_initialized()
assert torch.equal(rng, torch.random.get_rng_state()), "the random state moved"
new = {{k: v for k, v in os.environ.items() if before.get(k) != v}}
assert not new, new
'''
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert not r.stdout, r.stdout
