"Operations of π's training step at the released size, counted on the meta device: no weights, no timing."
from functools import partial

import pytest, torch
from torch.utils.flop_counter import FlopCounterMode

from vla_nb.pi_forms import counted, joint_loss, model_flops, split_loss
from vla_nb.core import Batch
from vla_nb.policies.pi05 import Pi05
from vla_nb.policies.pi_config import pi05_base
from vla_nb.policies.pi_modes import Pi05Expert, Pi05Flat
from vla_nb.policies.pi_released import Pi, PiSize

released, prompt = PiSize(), dict(cameras=3, words=200)


def test_the_formula_by_hand():
    "18 layers of 110 million weights, an expert of 311 million, eyes of 411 million, at 968 and 50 tokens"
    assert model_flops(released, 3, 200)/1e12 == pytest.approx(13.37, abs=.01)
    assert model_flops(released, 3, 200, frozen=True)/1e12 == pytest.approx(4.53, abs=.01)
    assert model_flops(released, 3, 200, draws=8)/model_flops(released, 3, 200) < 1.08


def test_a_full_step_computes_what_the_model_asks_for():
    assert .98 < counted(split_loss, released, **prompt)/model_flops(released, **prompt) <= 1.02


def test_training_the_expert_does_not_walk_the_language_model():
    ours = counted(partial(split_loss, frozen=True), released, frozen=True, **prompt)
    assert ours <= 1.02*model_flops(released, **prompt, frozen=True)
    assert ours <= .53*counted(joint_loss, released, frozen=True, **prompt)


def test_words_and_noises_share_the_pass():
    said = counted(split_loss, released, said=64, **prompt)
    assert said <= .6*counted(joint_loss, released, said=64, **prompt)
    assert counted(partial(split_loss, draws=8), released, **prompt) <= 1.2*counted(split_loss, released, **prompt)


def test_checkpointing_twice_runs_three_forward_passes():
    twice = counted(partial(joint_loss, thin=True), released, **prompt)
    assert 1.5 < twice/model_flops(released, **prompt) < 1.8


@pytest.mark.parametrize('cls, frozen', [(Pi05Flat, False), (Pi05Expert, True)], ids=['full', 'expert'])
def test_the_policies_are_the_form_that_was_counted(cls, frozen):
    from dataclasses import replace
    one = dict(mean=[0.]*32, std=[1.]*32, q01=[-1.]*32, q99=[1.]*32)
    tiny = Pi05.Config(insulate=False, fast_weight=0., horizon=50, cameras=3)
    p = cls.from_data(tiny, ['go'], dict(state=one, action=one)).eval()
    p.config = replace(pi05_base(), insulate=False, fast_weight=0., alpha=1.)
    with torch.device('meta'):
        p.pi = Pi(released)
        none, words = torch.zeros(0, dtype=torch.long), torch.zeros(1, 200, dtype=torch.long)
        batch = Batch(images=torch.zeros(1, 3, 3, 224, 224, dtype=torch.uint8), ids=words, part=words+1, said_at=none, spoken_at=none, seed=words[:,0],
                      action=torch.zeros(1, 50, 32), valid=torch.ones(1, 50, dtype=torch.bool), learn=torch.ones(1, dtype=torch.bool))
        with FlopCounterMode(display=False) as count: p.loss(batch).total.backward()
    assert .98 < count.get_total_flops()/model_flops(released, 3, 200, frozen=frozen) <= 1.02
