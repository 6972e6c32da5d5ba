"What π0.5 can do at inference: several chunks from one reading, absent cameras, chunks that continue, thoughts that are kept, and files that it starts from."
from dataclasses import replace

import pytest, torch
from torch.utils.flop_counter import FlopCounterMode

from test_pi import awake, data, look, small, stats  # noqa: F401
from test_pi_modes import make  # noqa: F401
from vla_nb.core import Actions, Observation, Policy, fold_seed, read_weights, write_weights
from vla_nb.eval.rollout import RecedingHorizon, evaluate, rollout
from vla_nb.objectives.realtime import guided_sample, identity_pull, jacobian_pull, left_over, soft_mask
from vla_nb.policies.pi05 import Pi05
from vla_nb.policies.pi_config import Pi05Config
from vla_nb.policies.pi_files import export_policy, start_pi
from vla_nb.policies.pi_modes import Pi05Expert, Pi05Flat, Pi05High
from vla_nb.policies.realtime import Pi05Realtime, Pi05RealtimeConfig, continue_chunk
from vla_nb.policies.replan import Replan
from vla_nb.run import Export, begin, export
from vla_nb.text.pi_prompt import PROMPT

torch.set_num_threads(1)
go = ['go']*4
known = ['press it.', 'stop.']


@pytest.mark.parametrize('cls', [Pi05, Pi05Flat, Pi05Expert], ids=['pi05', 'flat', 'expert'])
def test_candidates_are_single_answers_from_one_reading(cls, make, data):
    p, seed, passes = make(cls), torch.arange(4), []
    hook = p.pi.vlm.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    chunks,text = p.candidates(look(data), 3, seed=seed, reasoning=go)
    hook.remove()
    assert chunks.shape == (4, 3, 3, 2) and len(passes) == 1
    for j,s in enumerate((seed, fold_seed(seed, 1), fold_seed(seed, 2))):
        assert (chunks[:, j] - p.act(look(data), seed=s, reasoning=go).action).abs().max() < 1e-5
    alone,_ = p.candidates(look(data, slice(2, 3)), 3, seed=seed[2:3], reasoning=go[:1])
    assert (alone[0] - chunks[2]).abs().max() < 1e-4
    a, b = (p.candidates(look(data), 2, torch.Generator().manual_seed(3), reasoning=go)[0] for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a[:, 0], a[:, 1])


def test_eight_candidates_cost_less_than_two_answers_in_operations(data, stats):
    p = awake(data, stats, width=64, hidden=256, image=32, sample_steps=2)
    def cost(f):
        with FlopCounterMode(display=False) as c: f()
        return c.get_total_flops()
    one = cost(lambda: p.act(look(data), seed=torch.arange(4), reasoning=go))
    many = cost(lambda: p.candidates(look(data), 8, seed=torch.arange(4), reasoning=go))
    assert many < 2*one, f'{many/one:.2f}'


def test_a_camera_that_a_row_lacks(make, data):
    p, seen, seed = make(), torch.tensor([[True, True], [True, False], [False, True], [True, False]]), torch.arange(4)
    other = torch.where(seen[:, :, None, None, None], data.images, 255-data.images)
    rows = [p.prepare(replace(data, images=x, seen=seen)) for x in (data.images, other)]
    for training in (False, True):
        p.train(training)
        a, b = (p.loss(r) for r in rows)
        assert torch.allclose(a.total, b.total, atol=1e-6)
    p.eval()
    full, part = (p.loss(p.prepare(replace(data, images=other, seen=s))).total for s in (None, seen))
    assert abs(full - part) > 1e-3, 'a camera that is there does count'
    acts = [p.act(replace(look(data), images=x, seen=seen), seed=seed, among=known) for x in (data.images, other)]
    assert acts[0].text == acts[1].text and torch.equal(acts[0].action, acts[1].action)
    _,places,see,valid,expert = p._tokens(data.images, rows[0]['ids'], rows[0]['part'], seen)
    n = p.pi.vlm.vision_tower.tokens
    assert torch.equal(places, valid.long().cumsum(1) - 1)
    assert not valid[1, n:2*n].any() and places[1, 2*n] == n and places[0, 2*n] == 2*n
    assert not expert[1, n:2*n].any() and not see[1, 2*n:, n:2*n][rows[0]['part'][1] == PROMPT].any()
    gone = replace(look(data), images=data.images*seen[:, :, None, None, None])
    assert not torch.equal(p.act(gone, seed=seed, reasoning=go).action, p.act(replace(gone, seen=seen), seed=seed, reasoning=go).action), 'a black picture is not an absent one'


def test_observations_of_robots_with_and_without_a_camera_join():
    def one(seen): return Observation(torch.zeros(1, 2, 3, 4, 4).byte(), torch.zeros(1, 2), ['go'], seen=seen)
    lacks = torch.tensor([[True, False]])
    assert Observation.cat([one(None), one(lacks)]).seen.tolist() == [[True, True], [True, False]]
    assert Observation.cat([one(None), one(None)]).seen is None


@pytest.fixture(scope='module')
def live(data, stats):
    "A policy of the kind that is trained to continue, with padded dimensions"
    c = Pi05RealtimeConfig(**{f: getattr(small, f) for f in Pi05Config.__dataclass_fields__ if f not in ('horizon', 'pad_dims')}, horizon=3, pad_dims=5, max_delay=2)
    p = Pi05Realtime.from_data(c, data.instruction + data.subtask, stats)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in p.pi.expert.parameters(): w.add_(.1*torch.randn(w.shape, generator=g))
    return p.eval()


def test_guidance_on_the_policy(live, make, data):
    seed, obs = torch.arange(4), look(data)
    old, free = live.act(obs, seed=seed, reasoning=go).action, live.act(obs, seed=seed+9, reasoning=go).action
    assert torch.allclose(continue_chunk(live, obs, old, 1, 1, seed+9, go, most=0.).action, free, atol=1e-6), 'no weight, no guidance'
    for pull in (identity_pull, jacobian_pull):
        new = continue_chunk(live, obs, old, 1, 2, seed+9, go, pull=pull).action
        assert (new[:, :2] - old[:, 1:]).abs().mean() < .5*(free[:, :2] - old[:, 1:]).abs().mean()
        with torch.inference_mode(): assert torch.allclose(continue_chunk(live, obs, old, 1, 2, seed+9, go, pull=pull).action, new, atol=1e-6)
    assert not any(p.grad is not None for p in live.parameters())
    with pytest.raises(ValueError, match='horizon|whole chunk'): continue_chunk(live, obs, old[:, 1:], 1, 1)
    with pytest.raises(ValueError, match='delay'): continue_chunk(live, obs, old, 2, 2)
    for f in (lambda x: continue_chunk(live, obs, x, 1, 1), lambda x: live.continue_chunk(obs, x, 1, 1)):
        with pytest.raises(ValueError, match='previous: expected 4 chunks'): f(old[:1])
    with pytest.raises(ValueError, match='expert rests'): continue_chunk(make(Pi05High), obs, old, 1, 1)


def test_given_beginnings_on_the_policy(live, data, tmp_path):
    seed, obs = torch.arange(4), look(data)
    old = live.act(obs, seed=seed, reasoning=go).action
    new = live.continue_chunk(obs, old, 1, 2, seed+9, go).action
    assert torch.allclose(new[:, :2], old[:, 1:], atol=1e-5)
    other = live.continue_chunk(obs, old + 1, 1, 2, seed+9, go).action
    assert (other[:, 2] - new[:, 2]).abs().max() > 1e-3, 'what follows depends on the beginning'
    assert torch.allclose(live.continue_chunk(obs, old, 1, 0, seed, go).action, old, atol=1e-5)
    with pytest.raises(ValueError, match='max_delay'): replace(live.config, max_delay=3)
    live.train()
    out = live.loss(live.prepare(data))
    out.total.backward()
    assert out.total.isfinite() and live.pi.expert.time_mlp_in.weight.grad.abs().sum() > 0
    live.zero_grad(); live.eval()
    live.save_pretrained(tmp_path/'p')
    assert torch.equal(Pi05Realtime.from_pretrained(tmp_path/'p').continue_chunk(obs, old, 1, 2, seed+9, go).action, new)


def test_the_full_jacobian_is_a_derivative():
    "Against finite differences, on a small network"
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6)).double()
    model = lambda x, tau: net(x.flatten(1)).unflatten(1, (3, 2))
    x, target, tau, w = torch.randn(1, 3, 2).double(), torch.randn(1, 3, 2).double(), torch.tensor([.6]).double(), soft_mask(3, 1, 1).double()
    _,pull = jacobian_pull(model, x, tau, target, w)
    def energy(x): return -(w*(target - (x - .6*model(x, tau)))**2).sum()/2
    numeric = torch.stack([(energy(x + e.view_as(x)) - energy(x - e.view_as(x)))/2e-5 for e in 1e-5*torch.eye(6).double()]).view_as(x)
    assert torch.allclose(pull, numeric, atol=1e-6)
    assert not torch.allclose(pull, identity_pull(model, x, tau, target, w)[1], atol=1e-2)


def test_the_old_chunk_by_the_new_count():
    x = torch.arange(8.).view(1, 4, 2)
    assert left_over(x, 1)[0, :, 0].tolist() == [2, 4, 6, 0]
    assert soft_mask(4, 0, 0)[0, 0] > soft_mask(4, 0, 0)[3, 0] > 0 and soft_mask(4, 4, 0).eq(1).all() and soft_mask(4, 0, 4).eq(0).all()
    still = lambda x, tau: torch.zeros_like(x)
    assert torch.equal(guided_sample(still, x, x, soft_mask(4, 2, 1), 5), x), 'nothing to correct, nothing moves'


def test_thoughts_are_kept_by_robot_and_not_by_row(make, data):
    p, seed = make(), torch.arange(4)
    r, calls = Replan(p, every=2, known=known), []
    obs = look(data)
    first = r.act(obs, seed=seed, robots=list('abcd'))
    hook = p.pi.vlm.embed.register_forward_hook(lambda *_: calls.append(1))
    rows = [3, 0]
    part = Observation(data.images[rows], data.state[rows], [data.instruction[i] for i in rows])
    second = r.act(part, seed=seed[rows], robots=['d', 'a'])
    hook.remove()
    assert len(calls) == 1 and r.thoughts == 4, 'one pass over the prompt, and no word'
    assert second.text == [first.text[3], first.text[0]] and torch.allclose(second.action, first.action[rows], atol=1e-4)
    assert r.act(obs, seed=seed, robots=list('abcd')).text == first.text and r.thoughts == 6, 'two robots were due'
    r.forget('a')
    assert set(r.memory) == set('bcd')
    with pytest.raises(ValueError, match='speaks'): Replan(make(Pi05Expert))


def test_starting_from_files(make, data, stats, tmp_path):
    p, seed = make(), torch.arange(4)
    want = p.act(look(data), seed=seed, reasoning=go).action
    out = export_policy(p, tmp_path/'o')
    for cls,kw in ((Pi05, {}), (Pi05Flat, {}), (Pi05, dict(lora_rank=2))):
        q = make(cls, **kw)
        with torch.no_grad():
            for k,w in q.named_parameters(): w.add_(0. if '.lora_' in k else .1)
        told = start_pi(q, out)
        assert told.loaded == sum(1 for _ in p.pi.parameters()) and not told.fresh and 'tensors loaded' in str(told)
        if cls is Pi05: assert (q.act(look(data), seed=seed, reasoning=go).action - want).abs().max() < 1e-6
        else: assert all(torch.equal(a, b) for a,b in zip(q.parameters(), p.parameters()))
    w = read_weights(out)
    for name in ('action_in_proj.bias', 'paligemma_with_expert.paligemma.model.language_model.norm.weight'):
        less = {k: v.clone() for k,v in w.items() if k != name}
        (tmp_path/'l').mkdir(exist_ok=True)
        write_weights(tmp_path/'l', less)
        with pytest.raises(ValueError, match=name.replace('.', r'\.')): start_pi(make(), tmp_path/'l')
    strange = awake(replace(data, instruction=['other words']*4), stats)
    with pytest.raises(ValueError, match='tokenizer'): start_pi(strange, p)
    with pytest.raises(ValueError, match='merge_lora'): start_pi(make(), make(lora_rank=2))


def test_from_run_to_run_and_out_again(make, data, tmp_path, capsys):
    "`--init RUN`, `--init FOLDER`, `export --layout openpi`, with adapters on the way"
    first = make(lora_rank=2)
    with torch.no_grad():
        for k,w in first.named_parameters(): w.add_(.05 if '.lora_B.' in k else 0.)
    first.save_pretrained(tmp_path/'run')
    want = first.act(look(data), seed=torch.arange(4), reasoning=go).action
    export(Export(tmp_path/'run', tmp_path/'out', 'openpi'))
    assert 'next:' in capsys.readouterr().out and (tmp_path/'out/norm_stats.json').exists()
    for source,words in ((tmp_path/'run', 'a run of pi05'), (tmp_path/'out', 'openpi')):
        q = make(lora_rank=3)
        assert words in str(begin(q, source))
        assert (q.act(look(data), seed=torch.arange(4), reasoning=go).action - want).abs().max() < 1e-5
    with pytest.raises(ValueError, match='--init .*out: action_dim.*--model.pad-dims 2'): begin(make(pad_dims=5), tmp_path/'out')


class Corridor:
    "A world that ends after a number of steps that its seed says; it notes what it was told to do"
    tasks, action_dim, max_steps = ('walk',), 2, 99
    def reset(self, seed, task): self.left = 3 + seed; return self.observe()
    def phrase(self, task, seed, heldout=False): return 'walk'
    def observe(self): return Observation(torch.full((1, 1, 3, 4, 4), self.left).byte(), torch.zeros(1, 2), ['walk'])
    def step(self, action): self.left -= 1
    def achieved(self): return 'walk' if self.left <= 0 else None


class Talker(Policy):
    "Says the frame's level, which tells the robots apart"
    name, speaks = 'talker', True
    def act(self, obs, generator=None, seed=None, reasoning=None, among=None):
        text = reasoning or [f'at {x}' for x in obs.images[:, 0, 0, 0, 0].tolist()]
        return Actions(torch.zeros(len(obs), 1, 2), text)


def test_memories_stay_with_their_episodes_in_a_rollout():
    "Episodes of different lengths side by side: rows move up when one ends, memories do not"
    found = rollout(Replan(Talker(None, None), every=4).act, Corridor, ['walk'], [5, 0, 3], n_envs=3, controller=RecedingHorizon(1), progress=False)
    assert [e.words for e in found] == [('at 8',)*4 + ('at 4',)*4, ('at 3',)*3, ('at 6',)*4 + ('at 2',)*2]


@pytest.mark.parametrize('change', [0., 20.])
def test_a_rollout_leaves_no_memories_behind(change):
    policy = Replan(Talker(None, None), every=4, change=change)
    evaluate(lambda: policy, Corridor, ['walk'], [5, 0, 3], n_envs=3, controller=RecedingHorizon(1), progress=False)
    assert policy.thoughts and not policy.memory
    policy.act(Corridor().reset(0, 'walk'))
    assert (policy.memory[0].seen is None) == (change == 0), 'frames are kept where their change is asked for'


def test_a_network_for_fewer_dimensions_is_refused(make, data, stats, tmp_path):
    with pytest.raises(ValueError, match='pad_dims: expected at least the 2'): make(pad_dims=1)
    out = export_policy(make(), tmp_path/'o')
    wide = dict(stats, action={k: [*v, v[0]] for k,v in stats['action'].items()})
    p = Pi05.from_data(small, data.instruction + data.subtask, wide)
    with pytest.raises(ValueError, match='fewer dimensions than yours'): start_pi(p, out)
