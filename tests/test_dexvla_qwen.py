"""DexVLA, DiVLA and TinyVLA on Qwen2-VL, and LoRA: what readers need not see.

Fast: a language model of width 64 with one layer, frames of 32 px, five samples of unequal length.
"""
import json
from dataclasses import replace

import pytest, torch
from torch import nn

from vla_nb.backbones.lora import attach, is_lora, merge
from vla_nb.backbones.qwen2vl import qwen2vl_2b as published
from vla_nb.backbones.qwen2vl_io import save_qwen2vl
from vla_nb.core import Batch, Observation, Samples, draw_uniform
from vla_nb.eval.point import PointReach
from vla_nb.eval.rollout import rollout
from vla_nb.heads.scaledp import sizes
from vla_nb.layers.film import answer_masks
from vla_nb.policies.dexvla_config import DexVLAQwenConfig, part_of, qwen2vl_2b
from vla_nb.policies.dexvla_qwen import DexVLAQwen
from vla_nb.policies.divla_tinyvla import DiVLAQwen, DiVLAQwenConfig, TinyVLAQwen, TinyVLAQwenConfig, divla_2b, tinyvla_2b
from vla_nb.train.config import TrainConfig, load_config, parse_config
from vla_nb.train.optim import build_optimizer, check_groups

torch.set_num_threads(1)
small = dict(cameras=2, width=64, depth=1, mlp=64, vision_width=32, vision_depth=1, vision_heads=2, min_pixels=256, combine_width=32, max_new_tokens=24)
kinds = [(DexVLAQwen, DexVLAQwenConfig, {}), (DiVLAQwen, DiVLAQwenConfig, dict(horizon=6)), (TinyVLAQwen, TinyVLAQwenConfig, {})]
everyone = pytest.mark.parametrize('cls,Config,kw', kinds, ids=[k[0].name for k in kinds])


def one(x): return dict(mean=x.mean(0).tolist(), std=x.std(0).tolist(), min=x.amin(0).tolist(), max=x.amax(0).tolist())


@pytest.fixture(scope='module')
def data():
    g = torch.Generator().manual_seed(0)
    return Samples(torch.randint(0, 256, (5, 2, 3, 32, 32), dtype=torch.uint8, generator=g), torch.randn(5, 3, generator=g), ['press red', 'press blue', 'go', 'press the red one', 'go'],
                   torch.randn(5, 6, 2, generator=g), torch.arange(6)[None] >= torch.tensor([6, 6, 4, 1, 6])[:, None], torch.arange(5),
                   ['it is on the left, move.', 'it is here, press.', 'go on.', 'left.', ''])


@pytest.fixture(scope='module')
def stats(data): return dict(state=one(data.state), action=one(data.action.flatten(0, 1)))


def make(data, stats, cls=DexVLAQwen, Config=DexVLAQwenConfig, seed=0, **kw): return cls.from_data(Config(**{**small, **kw}), data.instruction + data.subtask, stats, seed)


def awake(policy):
    "The same policy with a head and a fusion that do not start at zero"
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for k, p in policy.named_parameters():
            if part_of(k) in ('head', 'fusion'): p.add_(.05*torch.randn(p.shape, generator=g))
    return policy.eval()


def by_heart(policy, data, steps=60):
    batch, opt = policy.prepare(data), torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], 3e-3)
    for i in range(steps):
        opt.zero_grad()
        policy.loss(Batch({**batch, 'seed': batch['seed']+100*i})).total.backward()
        opt.step()
    return policy.eval()


def test_the_number_of_cameras_is_that_of_training(data, stats):
    p = make(data, stats)
    with pytest.raises(ValueError, match='expected 2 cameras.*found 1'): p.act(Observation(data.images[:, :1], data.state, data.instruction), seed=data.seed)


def test_what_a_sample_costs_is_what_it_then_takes(data, stats):
    p = make(data, stats, swap_instruction=0.)
    n = (p.prepare(replace(data, subtask=['']*5))['labels'] == -100).sum(1).max().item() - 2*p.backbone.budget(32, 32).tokens
    assert p.cost(32, 32, data.instruction) == f'tokens: 2 x 4 of images (32x32 seen as 32x32), at most {n} around them, at most 24 said'


def row(data, i): return Observation(data.images[i:i+1], data.state[i:i+1], data.instruction[i:i+1])


# --- words

def test_prepare_labels_the_answer_and_nothing_else(data, stats):
    p = make(data, stats, swap_instruction=0.)
    b = p.prepare(data)
    prompt, answer = answer_masks(b['labels'], b['attention_mask'])
    for i in range(5):
        assert p.tokenizer.decode(b['labels'][i][answer[i]]) == data.subtask[i] + 'Next action:<|im_end|>'
        text = p.tokenizer.decode(b['input_ids'][i][prompt[i]])
        assert text.endswith(f'{data.instruction[i]}<|im_end|>\n<|im_start|>assistant\n') and text.count('<|vision_start|>') == 2
    assert (b['mm_token_type_ids'].sum(1) == 2*p.backbone.budget(32, 32).tokens).all()
    assert not (b['attention_mask'].int().diff(dim=1) < 0).any()    # padding is on the left alone
    assert b['images'].dtype == torch.uint8 and not any(k.startswith('other_') for k in b)


def test_reasoning_must_be_recorded(data, stats):
    with pytest.raises(ValueError, match='subtask: expected the recorded reasoning'): make(data, stats).prepare(replace(data, subtask=None))
    silent = make(data, stats, use_reasoning=False, swap_instruction=0.)
    assert (silent.prepare(replace(data, subtask=None))['labels'] != -100).sum() == 5    # the end token of each


def test_swapped_rows_keep_their_words_and_are_not_asked_for_them(data, stats):
    p = make(data, stats, swap_instruction=.5).train()
    b = p.prepare(data)
    x = p._augment(b)
    swap = draw_uniform(b['seed'], 1, stream=14)[:, 0] < .5
    assert swap.any() and not swap.all() and torch.equal(x['labels'], b['labels'])
    assert (x['to_say'][swap] == -100).all() and torch.equal(x['to_say'][~swap], b['labels'][~swap])
    for i in range(5):
        ids, mask = x['input_ids'][i], x['attention_mask'][i]
        told = data.instruction[(i+1) % 5 if swap[i] else i]
        assert f'{told}<|im_end|>\n<|im_start|>assistant\n{data.subtask[i]}Next action:' in p.tokenizer.decode(ids[mask])
    assert torch.equal(p.eval().loss(b).total, p.loss(Batch({k: v for k, v in b.items() if not k.startswith('other_')})).total)    # in training alone


def test_swapping_needs_reasoning(data, stats):
    with pytest.raises(ValueError, match='swap_instruction: expected 0 with use_reasoning=False'): DexVLAQwenConfig(use_reasoning=False)
    with pytest.raises(ValueError, match='TinyVLA acts on the prompt alone'): make(data, stats, TinyVLAQwen, TinyVLAQwenConfig, use_reasoning=True, swap_instruction=.3)


# --- loss

@everyone
def test_loss_and_act(data, stats, cls, Config, kw):
    p = awake(make(data, stats, cls, Config, **kw))
    l = p.loss(p.prepare(data))
    assert l.count == 6+6+4+1+6 and set(l.parts) == {'action', 'llm', 'guide'} and l.total.isfinite()
    torch.testing.assert_close(l.total.detach(), sum(l.parts.values()))
    a = p.act(data, seed=data.seed)
    lo, hi = (torch.tensor(stats['action'][k]) for k in ('min', 'max'))
    assert a.action.shape == (5, 6, 2) and (a.action >= lo-1e-4).all() and (a.action <= hi+1e-4).all()
    assert (a.text is None) == (not p.config.use_reasoning) and (a.text is None or len(a.text) == 5)


@everyone
def test_every_weight_learns_by_the_second_step(data, stats, cls, Config, kw):
    p = awake(make(data, stats, cls, Config, **kw)).train()
    p.loss(p.prepare(data)).total.backward()
    assert [k for k, q in p.named_parameters() if q.grad is None or not q.grad.any()] == []


def test_padding_does_not_count(data, stats):
    p = awake(make(data, stats))
    other = replace(data, action=torch.where(data.action_is_pad[..., None], 9., data.action))
    assert torch.equal(p.loss(p.prepare(data)).total, p.loss(p.prepare(other)).total)


@pytest.mark.parametrize('draws', [1, 3])
def test_noises_share_one_pass_and_belong_to_the_sample(data, stats, draws):
    p, calls = awake(make(data, stats, swap_instruction=0., draws=draws)).train(), []
    p.backbone.register_forward_hook(lambda *_: calls.append(1))
    batch = p.prepare(data)
    whole = p.loss(batch)
    assert len(calls) == 1
    rows = [p.loss(Batch({k: v[i:i+1] for k, v in batch.items()})) for i in range(5)]
    torch.testing.assert_close(sum(r.parts['action']*r.count for r in rows)/whole.count, whole.parts['action'], atol=1e-5, rtol=1e-4)


def test_bf16_compute_over_fp32_weights(data, stats):
    p = awake(make(data, stats))
    want = p.loss(p.prepare(data)).total
    with torch.autocast('cpu', torch.bfloat16): got = p.loss(p.prepare(data)).total
    assert got.isfinite() and abs(got-want) < .05*want
    got.backward()
    assert {q.grad.dtype for q in p.parameters() if q.grad is not None} == {torch.float32}


def test_checkpointing_changes_no_gradient(data, stats):
    a, b = (awake(make(data, stats, checkpointing=c)).train() for c in (False, True))
    for p in (a, b): p.loss(p.prepare(data)).total.backward()
    for (k, x), y in zip(a.named_parameters(), b.parameters()): torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4, msg=k)


@pytest.mark.parametrize('kw', [dict(time_embed='bf16'), dict(prediction='epsilon', noise_shift=1., guide=0.), dict(head_size='Ti', combine_width=64)])
def test_settings(data, stats, kw):
    p = awake(make(data, stats, **kw))
    l = p.loss(p.prepare(data))
    assert l.total.isfinite() and ('guide' in l.parts) == bool(p.config.guide) and p.act(data, seed=data.seed).action.isfinite().all()
    if 'head_size' in kw: assert len(p.policy_head.blocks) == sizes['Ti']['depth']


# --- act

def test_acting_on_own_words_is_acting_on_the_same_words_read(data, stats):
    "T3: the state of the last said token is there, and one mean is used"
    p = by_heart(make(data, stats, swap_instruction=0.), data)
    said = p.act(data, seed=data.seed)
    assert said.text == data.subtask    # of unequal length, the last one empty
    read = p.act(data, seed=data.seed, reasoning=said.text)
    torch.testing.assert_close(said.action, read.action, atol=1e-5, rtol=0)
    hidden, prompt, answer, _ = p._speak(data.images, data.instruction)
    asked = p._ask(data.images, data.instruction, said.text)
    pm, am = answer_masks(asked['labels'], asked['attention_mask'])
    assert answer.sum(1).tolist() == am.sum(1).tolist() and prompt.sum(1).tolist() == pm.sum(1).tolist()
    again = p._read(data.images, asked)
    for i in range(5): torch.testing.assert_close(hidden[i][answer[i]], again[i][am[i]], atol=1e-5, rtol=0)


def test_a_word_cut_off_is_finite(data, stats):
    p = awake(make(data, stats, max_new_tokens=1))
    assert p.act(data, seed=data.seed).action.isfinite().all()


def test_no_answer_and_no_reasoning_are_finite(data, stats):
    "T2: the original answers NaN"
    p = awake(make(data, stats, use_reasoning=False, swap_instruction=0.))
    a = p.act(data, seed=data.seed)
    assert a.text is None and a.action.isfinite().all()
    b = p.prepare(data)
    hidden, nobody = p._read(b['images'], b), torch.zeros_like(b['attention_mask'])
    assert all(x.isfinite().all() for x in p._condition(hidden, b['attention_mask'], nobody, b['state']))
    b['labels'][0] = -100
    assert p.loss(b).total.isfinite()


@everyone
def test_alone_as_in_company(data, stats, cls, Config, kw):
    p = awake(make(data, stats, cls, Config, **kw))
    whole = p.act(data, seed=data.seed)
    for i in range(5):
        alone = p.act(row(data, i), seed=data.seed[i:i+1])
        torch.testing.assert_close(alone.action[0], whole.action[i], atol=1e-5, rtol=0)
        assert whole.text is None or alone.text[0] == whole.text[i]


def test_other_words_other_actions(data, stats):
    p = awake(make(data, stats))
    a, b = (p.act(data, seed=data.seed, reasoning=[w]*5).action for w in ('left.', 'it is here, press.'))
    assert (a-b).abs().amax((1, 2)).min() > 1e-4


def test_reasoning_of_the_wrong_length(data, stats):
    with pytest.raises(ValueError, match='reasoning: expected 5'): awake(make(data, stats)).act(data, seed=data.seed, reasoning=['left.'])


def test_generator(data, stats):
    p = awake(make(data, stats))
    a, b = (p.act(data, generator=torch.Generator().manual_seed(3)).action for _ in range(2))
    assert torch.equal(a, b)


# --- made, saved, described

def test_initial_weights_depend_on_the_seed_alone(data, stats):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a = make(data, stats)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    b, c = make(data, stats), make(data, stats, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.backbone.vlm.lm_head.weight, c.backbone.vlm.lm_head.weight)


def test_needs_what_from_data_makes(stats):
    with pytest.raises(ValueError, match='tokenizer, vlm_config'): DexVLAQwen(DexVLAQwenConfig(), stats)


@pytest.mark.parametrize('rank', [0, 2])
@everyone
def test_there_and_back(data, stats, tmp_path, cls, Config, kw, rank):
    p = awake(make(data, stats, cls, Config, **kw, lora_rank=rank))
    q = cls.from_pretrained(p.save_pretrained(tmp_path/'p'))
    assert q.config == p.config and torch.equal(q.act(data, seed=data.seed).action, p.act(data, seed=data.seed).action)


def test_starts_from_a_published_folder(data, stats, tmp_path):
    first = make(data, stats, seed=3)
    save_qwen2vl(first.backbone, tmp_path/'vlm')
    first.tokenizer.save_pretrained(tmp_path/'vlm')
    p = DexVLAQwen.from_data(DexVLAQwenConfig(**{**small, 'vlm': str(tmp_path/'vlm')}), [], stats)
    assert all(torch.equal(v, first.state_dict()[k]) and v.dtype == torch.float32 for k, v in p.state_dict().items() if k.startswith('backbone.'))
    assert str(tmp_path) not in json.dumps(p.config.vlm_config) and p.config.vlm == ''
    q = DexVLAQwen.from_pretrained(awake(p).save_pretrained(tmp_path/'p'))
    assert torch.equal(q.act(data, seed=data.seed).action, p.act(data, seed=data.seed).action)


def test_command_line_and_file_know_every_field(tmp_path):
    c = parse_config(DexVLAQwenConfig, ['--frozen', 'vision', 'merger', '--head-size', 'L', '--lora-rank', '4'])
    assert c.frozen == ('vision', 'merger') and c.head_size == 'L' and c.lora_rank == 4
    (tmp_path/'c.yaml').write_text('horizon: 8\nfrozen: [language]\n')
    assert load_config(DexVLAQwenConfig, tmp_path/'c.yaml').frozen == ('language',)


# --- groups and LoRA

def test_groups_cover_everything_once(data, stats):
    p = make(data, stats, frozen=('vision', 'merger'), language_lr=.5)
    groups = {g.name: g for g in check_groups(p, p.groups())}
    assert set(groups) == {'vision', 'merger', 'language', 'fusion', 'head'} and groups['language'].lr == .5
    p.loss(p.prepare(data)).total.backward()
    still = {k for k, q in p.named_parameters() if q.grad is None}
    assert still == {*groups['vision'].params, *groups['merger'].params}
    assert {id(q) for g in build_optimizer(p, TrainConfig()).param_groups for q in g['params']} == {id(q) for q in p.parameters() if q.requires_grad}


@pytest.mark.parametrize('vision,language', [(True, False), (False, True), (True, True)])
def test_lora_trains_merges_and_answers_the_same(data, stats, tmp_path, vision, language):
    "T16: the choice of towers is real"
    p = make(data, stats, lora_rank=2, lora_alpha=4., lora_vision=vision, lora_language=language)
    groups = {g.name: g for g in check_groups(p, p.groups())}
    assert [g.trainable for g in (groups['vision'], groups['language'])] == [not vision, not language]
    assert [f'{k}_lora' in groups for k in ('vision', 'language')] == [vision, language]
    start = {k: v.clone() for k, v in p.state_dict().items()}
    by_heart(p, data, steps=5)
    for k, v in p.state_dict().items():
        base = 'base_layer' in k and not is_lora(k)
        assert not base or torch.equal(v, start[k]), k
        assert not is_lora(k) or 'lora_B' not in k or v.any(), k
    before = p.act(data, seed=data.seed, reasoning=data.subtask).action
    assert torch.equal(DexVLAQwen.from_pretrained(p.save_pretrained(tmp_path/'a')).act(data, seed=data.seed, reasoning=data.subtask).action, before)
    p.merge_lora()
    assert p.config.lora_rank == 0 and {part_of(k) for k, _ in p.named_parameters()} == {'vision', 'merger', 'language', 'fusion', 'head'}
    torch.testing.assert_close(p.act(data, seed=data.seed, reasoning=data.subtask).action, before, atol=1e-5, rtol=0)
    q = DexVLAQwen.from_pretrained(p.save_pretrained(tmp_path/'b'))
    torch.testing.assert_close(q.act(data, seed=data.seed, reasoning=data.subtask).action, before, atol=1e-5, rtol=0)


def test_lora_with_dropout_merges_too():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(4, 5)
    attach(net, ['0'], rank=2, dropout=.5)
    with torch.no_grad(): net[0].lora_B['default'].weight.normal_()
    want = net.eval()(x)
    torch.testing.assert_close(merge(net)(x), want)
    with pytest.raises(ValueError, match='names: expected at least one'): attach(net, [])


# --- full size

@pytest.mark.parametrize('cls,config,head', [(DexVLAQwen, qwen2vl_2b(), 955_861_518), (DiVLAQwen, divla_2b(), 89_636_878), (TinyVLAQwen, tinyvla_2b(), None)], ids=lambda x: getattr(x, 'name', ''))
def test_full_size_on_the_meta_device(data, stats, cls, config, head):
    wide = dict(state=one(torch.zeros(2, 14)), action=one(torch.zeros(2, 14)))
    tokenizer = make(data, stats).tokenizer
    with torch.device('meta'): p = cls(replace(config, vlm_config=published().to_dict()), wide, tokenizer)
    n = {g.name: sum(q.numel() for q in g.params.values()) for g in p.groups()}
    assert n['vision'] + n['merger'] + n['language'] == 2_208_985_600 and head in (None, n['head'])
    assert {q.device.type for q in p.parameters()} == {'meta'} and p.schedule.alpha_bar.device.type == 'cpu'
    assert ('fusion' in n) == (cls is not TinyVLAQwen)


# --- trained by the house's loop

@pytest.mark.parametrize('kw', [dict(swap_instruction=.5), dict(lora_rank=2, lora_dropout=.1)], ids=['full', 'lora'])
def test_a_run_goes_on_where_it_stopped(data, stats, assert_resumes, kw):
    _,row = assert_resumes(lambda: make(data, stats, **kw), lambda p, k: Batch({**(b := p.prepare(data)), 'seed': b['seed']+100*k}))
    assert {'loss/action', 'loss/llm', 'loss/guide', 'val/action'} <= set(row)


def test_receding_horizon_does_not_depend_on_how_many_robots(data, stats):
    "Speaking and acting in closed loop, four worlds at once and one by one"
    move = dict(state=dict(mean=[0.]*2, std=[.5]*2, min=[-1.]*2, max=[1.]*2), action=dict(mean=[0.]*2, std=[.1]*2, min=[-.1]*2, max=[.1]*2))
    p = awake(make(data, move, max_new_tokens=3, cameras=1))
    (many, one) = ([(e.task, e.seed, e.steps, e.achieved) for e in rollout(p.act, PointReach, PointReach.tasks[:2], [0, 1], n_envs=n, progress=False)] for n in (4, 1))
    assert many == one and len(many) == 4
