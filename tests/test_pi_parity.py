"""π0.5 and π0 as openpi computes them, replayed from recordings whose weights come back from their seeds, bit for bit.

`fixtures/pi05_seeded.pt` and `pi0_seeded.pt` hold everything of the originals' recordings but the weights (a megabyte), the
gradients of the largest tensors and two of three pictures of the resizer.
"""
from pathlib import Path

import pytest, torch

from vla_nb import parity as P

fixtures = Path(__file__).parent/'fixtures'
twin = 'paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight'


def weights(shapes, seed):
    "Names in order of the alphabet: matrices by their fan-in, biases .15, norms .3 around what leaves a layer as it is"
    g, made = torch.Generator().manual_seed(seed), {}
    for n in sorted(shapes):
        if n == twin: made[n] = made['paligemma_with_expert.paligemma.lm_head.weight']; continue
        x = torch.randn(shapes[n], generator=g)
        if n.endswith('bias'): made[n] = .15*x
        elif n.endswith('position_embedding.weight'): made[n] = .3*x
        elif x.ndim == 1: made[n] = .3*x + ('layer_norm' in n or 'post_layernorm' in n)
        else: made[n] = x/x[0].numel()**.5*(.6 if '.dense.' in n else 1)
    return made


def whole(name):
    rec = torch.load(fixtures/f'{name}_seeded.pt', weights_only=True)
    return rec | dict(state_dict=weights(**rec['state_dict']))


def failed(rec, tmp_path):
    torch.save(rec, tmp_path/'rec.pt')
    return [r.name for r in P.check(tmp_path/'rec.pt') if not r.ok]


@pytest.mark.parametrize('name', ['pi05', 'pi0'])
def test_pi_equals_the_original(tmp_path, capsys, name):
    rec = whole(name)
    torch.save(rec, tmp_path/'rec.pt')
    rows = {r.name: r for r in P.check(tmp_path/'rec.pt')}
    assert not [r for r in rows.values() if not r.ok]
    assert sum(k.startswith('grads/') for k in rows) == len(rec['grads']) > 50 and {'outputs/loss', 'outputs/sampled_actions'} <= set(rows)
    assert P.parity(tmp_path/'rec.pt') and 'all within tolerance' in capsys.readouterr().out


@pytest.mark.parametrize('name,weight', [('pi05', 'action_out_proj.bias'), ('pi05', 'paligemma_with_expert.gemma_expert.model.norm.dense.weight'),
    ('pi0', 'state_proj.weight'), ('pi0', 'paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias')])
def test_one_changed_weight_fails(tmp_path, name, weight):
    rec = whole(name)
    rec['state_dict'][weight].view(-1)[5] += .01
    assert 'outputs/loss' in failed(rec, tmp_path)


def test_a_tensor_that_nobody_reads_fails(tmp_path):
    rec = whole('pi05')
    rec['outputs']['spare'] = torch.ones(1)
    assert failed(rec, tmp_path) == ['outputs/spare: nothing read it']
