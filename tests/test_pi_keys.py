"π0 and π0.5 at their released sizes: the names and shapes of all tensors, as openpi's own models have them."
import json
from pathlib import Path

import pytest, torch

from vla_nb.policies.pi_released import Pi, PiSize, load_pi, released_weights

keys = json.loads((Path(__file__).parent/'fixtures/openpi_keys.json').read_text())    # listed from openpi's PyTorch models


def model(kind):
    with torch.device('meta'): return Pi(PiSize(pi05=kind == 'pi05'))


def on_meta(kind): return {k: torch.empty(shape, device='meta') for k,shape in keys[kind].items()}


@pytest.mark.parametrize('kind,n', [('pi05', 812), ('pi0', 777)])
def test_all_names_and_shapes_are_openpis(kind, n):
    assert len(keys[kind]) == n
    assert {k: list(v.shape) for k,v in released_weights(model(kind)).items()} == keys[kind]
    layout,aside = load_pi(model(kind), on_meta(kind))
    assert layout.name == 'openpi' and [k.rsplit('.', 2)[-2] for k in aside] == ['lm_head']


@pytest.mark.parametrize('kind', ['pi05', 'pi0'])
def test_whatever_tensor_is_missing_is_named(kind):
    pi, whole = model(kind), on_meta(kind)
    loose = [k for k in whole if k.endswith('gemma_expert.lm_head.weight')]    # stored, and no part of the model
    for k in [*whole][::80]:
        if k in loose: continue
        with pytest.raises(ValueError) as e: load_pi(pi, {n: v for n,v in whole.items() if n != k})
        assert f'{k}: expected {tuple(keys[kind][k])}, found none' in str(e.value)


def test_the_other_model_and_a_prefix_are_refused():
    with pytest.raises(ValueError, match='is it another model'): load_pi(model('pi05'), on_meta('pi0'))
    with pytest.raises(ValueError, match='prefix before them all'): load_pi(model('pi0'), {f'policy.{k}': v for k,v in on_meta('pi0').items()})
