"What docs/build.py changes in the pages that nbdev makes: their order, and the order of what stands on them"
import importlib.util
from pathlib import Path

from fastcore.nbio import mk_cell
from fastcore.xtras import dict2obj

spec = importlib.util.spec_from_file_location('docs_build', Path(__file__).resolve().parent.parent/'docs/build.py')
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def doc(name, line):
    text = f'---\n\n[source](https://example.org/m.py#L{line}){{target="_blank"}}\n\n### {name}\n\n```python\ndef {name}():\n```\n\n*What it does*'
    c = mk_cell(f'#| echo: false\n#| output: asis\nshow_doc({name})')
    c.outputs = dict2obj([{'output_type': 'execute_result', 'metadata': {}, 'data': {'text/markdown': text}}])
    return c
def source(*names): return mk_cell('#| code-fold: show\n#| exports: true\n' + '\n'.join(f'def {n}(): pass' for n in names))


def test_definitions_stand_in_the_order_of_the_module():
    text, other = mk_cell('some words', 'markdown'), mk_cell('1+1')
    src = source('one', 'two', 'three')
    cells = [text, doc('three', 30), src, doc('two', 20), doc('one', 10), other, doc('five', 50), doc('four', 40), text]    # as nbdev leaves them
    out = build.reorder(cells)
    assert [build.documents(c) or c.source.split()[-1] for c in out] == ['words', 'one', 'pass', '1+1', 'four', 'five', 'words']
    head = out[1].outputs[0].data['text/markdown']
    assert '### one, two, three {#one}' in head and '<span id="two"></span><span id="three"></span>' in head and '#L10' in head
    assert '```' not in head, 'the signature stands in the source below'
    assert '```' in out[4].outputs[0].data['text/markdown'], 'a hidden source keeps its signature'


def test_links_to_methods_and_private_functions_have_a_target():
    src = mk_cell('#| exports: true\nclass Arm:\n    def __init__(self): pass\n    def move(self): pass\ndef _help(): pass')
    head = build.reorder([doc('Arm', 1), src])[0].outputs[0].data['text/markdown']
    assert '### Arm {#arm}' in head and '<span id="arm.move"></span><span id="_help"></span>' in head and '__init__' not in head


def test_private_sources_stay_where_they_were():
    a, b = source('_helper'), source('public')
    out = build.reorder([a, doc('public', 9), b])
    assert out[0] is a and out[2] is b and len(out) == 3


def test_pages_stand_in_reading_order():
    section = lambda n: dict(section=n, contents=[f'{n}/01_x.ipynb'])
    got = build.reading_order(['index.ipynb', '00_core.ipynb', '03_demo.ipynb', section('backbones'), section('data'), section('layers'), section('zoo')])
    assert [c if isinstance(c, str) else c['section'] for c in got] == ['index.ipynb', '00_core.ipynb', 'data', 'layers', 'backbones', 'zoo', 'commands and checks']
    assert got[-1]['contents'] == ['03_demo.ipynb']
