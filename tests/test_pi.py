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


from dataclasses import replace  # noqa: E402

from vla_nb.core import Observation, Samples  # noqa: E402
from vla_nb.policies.pi05 import Pi05  # noqa: E402
from vla_nb.policies.pi_config import Pi05Config  # noqa: E402
from vla_nb.policies.pi_modes import Pi05Expert, Pi05High, Pi05HighFast  # noqa: E402
from vla_nb.policies.pi_released import load_pi, released_weights  # noqa: E402
from vla_nb.text.pi_prompt import PROMPT, SAID, SPOKEN, state_bins  # noqa: E402

torch.set_num_threads(1)
small = Pi05Config(cameras=2, horizon=3, width=32, hidden=48, depth=3, heads=2, head_dim=16, expert_width=24, expert_hidden=48, vision_width=16, vision_depth=1, vision_hidden=24, vision_heads=2, patch=8, image=16, fast_weight=1., sample_steps=10, max_new_tokens=12)
classes = [Pi05, Pi05High, Pi05HighFast, Pi05Expert]


def one(x): return dict(mean=x.mean(0).tolist(), std=x.std(0).tolist(), q01=x.quantile(.01, 0).tolist(), q99=x.quantile(.99, 0).tolist())


@pytest.fixture(scope='module')
def data():
    g = torch.Generator().manual_seed(0)
    return Samples(torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8, generator=g), torch.randn(4, 3, generator=g), ['press red', 'go', 'press the blue one', 'go'],
                   torch.randn(4, 3, 2, generator=g), torch.arange(3)[None] >= torch.tensor([3, 3, 2, 3])[:, None], torch.arange(4), ['it is left, move.', 'press it.', '', 'stop.'])


@pytest.fixture(scope='module')
def stats(data): return dict(state=one(data.state), action=one(data.action.flatten(0, 1)))


def awake(data, stats, cls=Pi05, **kw):
    "A policy whose expert is not the identity"
    p = cls.from_data(replace(small, **kw), data.instruction + data.subtask, stats)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in p.pi.expert.parameters(): w.add_(.1*torch.randn(w.shape, generator=g))
    return p.eval()


def look(data, rows=slice(None)): return Observation(data.images[rows], data.state[rows], data.instruction[rows])


def grads(p, term, batch):
    p.zero_grad()
    p._terms(batch)[term]()[0].backward()
    return {k: w.grad.clone() for k,w in p.named_parameters() if w.grad is not None and w.grad.abs().sum() > 0}


def test_insulation_leaves_the_language_model_alone_and_the_expert_as_it_was(data, stats):
    cut = awake(data, stats)
    free = Pi05(replace(cut.config, insulate=False), stats, cut.tokenizer).eval()
    free.load_state_dict(cut.state_dict())
    batch = cut.prepare(data)
    a, b = grads(cut, 2, batch), grads(free, 2, batch)
    assert a and all('.expert.' in k for k in a), 'the flow moves the expert alone'
    assert all(torch.allclose(a[k], b[k], rtol=1e-5, atol=1e-7) for k in a), "the expert's gradient is what it was"
    assert sum('.language_model.layers.' in k for k in b) == 21 and sum('.language_model.layers.' in k for k,_ in cut.named_parameters()) == 27
    for term in (0, 1): assert not any('.expert.' in k for k in grads(cut, term, batch))


def test_a_target_does_not_move_what_comes_before_it(data, stats):
    p = awake(data, stats)
    b = p.prepare(data)
    at = lambda ids: p._read(b['images'], ids, b['part'])[0][:, -ids.shape[1]:].detach()
    before, n = at(b['ids']), (b['part'] > 0).sum(1)
    for i in range(int((b['part'][0] == PROMPT).sum()), int(n[0])):
        ids = b['ids'].clone()
        ids[0, i] = (ids[0, i] + 7) % p.config.vocab
        after = at(ids)
        assert torch.allclose(after[0, :i], before[0, :i], atol=1e-5), f'target {i} is seen before it is said'
        assert torch.allclose(after[1:][b['part'][1:] > 0], before[1:][b['part'][1:] > 0], atol=1e-5)


def test_said_or_given_alone_or_in_company(data, stats):
    p, seed = awake(data, stats), torch.arange(4)
    own = p.act(look(data), seed=seed, among=['press it.', 'stop.'])
    assert set(own.text) <= {'press it.', 'stop.'}
    assert torch.allclose(own.action, p.act(look(data), seed=seed, reasoning=own.text).action, atol=1e-4)
    alone = p.act(look(data, slice(2, 3)), seed=seed[2:3], among=['press it.', 'stop.'])
    assert alone.text == own.text[2:3] and torch.allclose(alone.action, own.action[2:3], atol=1e-4)
    with pytest.raises(ValueError, match='expected 4'): p.act(look(data), reasoning=['one'])


def test_the_expert_reads_no_spoken_actions(data, stats):
    p = awake(data, stats)
    b = p.prepare(data)
    changed = dict(b, ids=torch.where(b['part'] == SPOKEN, (b['ids'] + 1) % p.config.vocab, b['ids']))
    assert torch.allclose(p._terms(b)[2]()[0], p._terms(changed)[2]()[0], atol=1e-6)
    assert not (b['part'][2] == SPOKEN).any(), 'a padded chunk is not spoken'
    assert not (b['part'][2] == SAID).any() and (b['part'][:2] == SAID).any(1).all(), 'a row without a subtask says nothing'


@pytest.mark.parametrize('cls', classes, ids=[c.name for c in classes])
def test_there_and_back(cls, data, stats, tmp_path):
    p = awake(data, stats, cls)
    p.save_pretrained(tmp_path/'p')
    q, seed = cls.from_pretrained(tmp_path/'p'), torch.arange(4)
    a, b = p.act(look(data), seed=seed), q.act(look(data), seed=seed)
    assert torch.equal(a.action, b.action) and a.text == b.text and a.action.shape == (4, 3, 2) and a.action.isfinite().all()
    p.train()
    batch = p.prepare(data)
    out = p.loss(batch)
    assert out.total.isfinite() and out.count == (p._terms(batch)[0]()[1] if cls is Pi05High else 11), 'steps; where only words are learnt, words'
    assert {n for k in p.groups() for n in k.params} == dict(p.named_parameters()).keys()


def test_released_names_in_and_out(data, stats):
    p, q = awake(data, stats), Pi05.from_data(small, data.instruction + data.subtask, stats, seed=5).eval()
    weights = {k: v.clone() for k,v in released_weights(p.pi).items()}
    load_pi(q.pi, weights)
    assert all(torch.equal(a, b) for a,b in zip(p.state_dict().values(), q.state_dict().values()))


def test_state_bins_below_and_above():
    x = torch.tensor([[-9., -1., -1e-9, 0., .999, 1., 9.]])
    assert state_bins(x).tolist() == [[-1, 0, 127, 128, 255, 255, 255]]


def test_a_speaker_needs_subtasks(data, stats):
    with pytest.raises(ValueError, match='subtask'): awake(data, stats).prepare(replace(data, subtask=None))
    assert awake(data, stats, Pi05Expert).prepare(replace(data, subtask=None))['said_at'].numel() == 0
