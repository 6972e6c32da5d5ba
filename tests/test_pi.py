"π: prompts and action tokens as openpi has them, the layouts of a hierarchical sequence, and the policy."
import json, random
from pathlib import Path

import pytest, torch

from vla_nb import parity as P

fixtures = Path(__file__).parent/'fixtures'


def leaves(tree, at=()):
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for k,v in pairs:
        if isinstance(v, dict|list): yield from leaves(v, (*at, k))
        else: yield (*at, k)


def spoilt(tree, at):
    "A copy with one leaf changed"
    tree = json.loads(json.dumps(tree))
    x = tree
    for k in at[:-1]: x = x[k]
    v = x[at[-1]]
    x[at[-1]] = (not v) if isinstance(v, bool) else v + 'x' if isinstance(v, str) else v + 1 if isinstance(v, int) else .1*v + .3
    return tree


@pytest.mark.parametrize('kind', ['preproc', 'fast'])
def test_openpi_to_the_token(kind, capsys):
    rows = P.check(fixtures/f'{kind}.json')
    assert not [r for r in rows if not r.ok]
    assert P.parity(fixtures/f'{kind}.json') and 'all within tolerance' in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['preproc', 'fast'])
def test_one_changed_value_fails(kind, tmp_path):
    tree, rng = json.loads((fixtures/f'{kind}.json').read_text()), random.Random(0)
    notes = 'kind', 'versions', 'fit_chunks', 'bad_ids'    # one chunk of 300 need not change the fit; malformed ids may be malformed otherwise
    by_part = {}
    for at in leaves(tree):
        if at[0] not in notes: by_part.setdefault(tuple(k for k in at if isinstance(k, str)), []).append(at)
    for part,places in by_part.items():
        (tmp_path/'r.json').write_text(json.dumps(spoilt(tree, rng.choice(places))))
        try: failed = [r.name for r in P.check(tmp_path/'r.json') if not r.ok]
        except Exception as e:    # only the tokenizers library raises what is no ValueError
            if type(e) is not ValueError and 'tokenizer_json' not in part: raise
            failed = [str(e)]
        assert failed, f'{part}: a changed value went unseen'


def test_what_nothing_reads_fails(tmp_path):
    tree = json.loads((fixtures/'preproc.json').read_text())
    (tmp_path/'r.json').write_text(json.dumps(tree | {'surprise': 3}))
    assert [r.name for r in P.check(tmp_path/'r.json') if not r.ok] == ['surprise: nothing read it']
