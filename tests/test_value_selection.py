"What a value that chooses needs: aims, scale, reach, and the hidden state in place of words"
from dataclasses import replace

import numpy as np, pytest, torch
from test_comet import batch, new, obs, source
from vla_nb.data.windows import Windows
from vla_nb.objectives.cal_ql import CalQLConfig, td_loss
from vla_nb.policies.comet import Comet
from vla_nb.policies.value_head import ValueSettings, check_value, scaled

def test_critics_aim_at_what_the_next_observation_is_worth():
    policy = new(state_value=True, scale=.02, calql=CalQLConfig(alpha=0., n_actions=2))
    b, head = batch(policy), policy.value
    now, after = policy._tokens(b), policy._tokens(b, 'next_')
    none, obs_ = b['action'][:,:0], head.trunk(now)
    ahead = head.state_value(head.trunk(after), none).mean(0)
    terms = policy.loss(b).parts
    torch.testing.assert_close(terms['td'], td_loss(head.critics(obs_, b['action']), .02*b['reward'] + b['discount']*b['mask']*ahead))
    torch.testing.assert_close(terms['state_value'], td_loss(head.state_value(obs_, none), .02*b['mc_return']))

def test_its_gradients_reach_trunk_and_critics_only():
    policy = new(state_value=True)
    policy.loss(batch(policy)).total.backward()
    assert {k.split('.')[1] for k,p in policy.named_parameters() if p.grad is not None and p.grad.any()} == {'trunk', 'actor', 'critics', 'temperature', 'state_value'}
    assert sorted(k for g in policy.groups() for k in g.params) == sorted(k for k,_ in policy.named_parameters())

def test_a_scale_of_one_changes_nothing_and_zero_is_refused():
    q = CalQLConfig(alpha=5., lagrange_gap=.8, clip_min=-1.)
    assert scaled(q, 1.) == q and scaled(q, .5) == replace(q, alpha=2.5, temp=.5, lagrange_gap=.4, clip_min=-.5)
    for bad in (dict(scale=0.), dict(state_value=True, bootstrap=False)):
        with pytest.raises(ValueError, match=list(bad)[0]): check_value(ValueSettings(**bad))
    with pytest.raises(ValueError, match='reach'): new(reach=.5)

def test_reach_shows_what_lies_beyond_the_recorded_range():
    near, far = new(), new(reach=4.)
    a = 3*torch.ones(1, 2, 2)
    a = near.base.action_norm.inverse(a)
    assert near.codec(a).eq(1).all() and near.codec.outside(a).item() == 1
    torch.testing.assert_close(far.codec(a), torch.full((1, 4), .75))
    assert far.codec.outside(a).item() == 0

def test_the_thought_asks_for_no_words_and_is_the_same_from_the_cache(tmp_path):
    policy = new(reads='thought', state_value=True)
    live, cut = batch(policy), policy.windows(Windows(source, 2), policy.features(source, tmp_path, (16, 16), dtype='float32', progress=False))
    assert not {'ids', 'words', 'next_ids'} & set(live)
    cached = policy.prepare(cut.samples(np.arange(8)))
    torch.testing.assert_close(policy.loss(live).total, policy.loss(cached).total, rtol=1e-4, atol=1e-4)

def test_a_checkpoint_brings_everything_back(tmp_path):
    policy, seed = new(reads='thought', state_value=True, reach=2., scale=.02), torch.arange(2)
    again = Comet.from_pretrained(policy.save_pretrained(tmp_path/'p'))
    assert again.codec.reach == 2. and torch.equal(again.rank(obs(), seed=seed).q, policy.rank(obs(), seed=seed).q)


def test_a_value_does_not_go_on_under_other_settings():
    trained = new(reads='thought', reach=2., scale=.02)
    with pytest.raises(ValueError, match="reads: expected 'thought'.*--model.reads"): new().adopt(trained)
    with pytest.raises(ValueError, match='scale: expected 0.02'): new(reads='thought', reach=2.).adopt(trained)
    new(reads='thought', reach=2., scale=.02).adopt(trained)
