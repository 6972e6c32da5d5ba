"""Qwen2-VL as a backbone: against the recorded fork, transformers' own processor and positions, and itself spoken token by token"""
import json
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import save_file

from vla_nb.backbones.patches import budget, join_cameras, mrope_positions, to_patches
from vla_nb.backbones.qwen2vl import Qwen2VL, qwen2vl_2b, qwen25vl_3b, tiny_config
from vla_nb.backbones.qwen2vl_io import (from_fork, image_processor, load_qwen2vl, lora_targets, on_meta, save_qwen2vl, set_checkpointing, to_fork)
from vla_nb.text.chat import Chat, collate, small_chat_tokenizer

here = Path(__file__).parent
says = ['I move to the red button.', 'The gripper is open, close it.', 'Now press.']
tells = ['press the red button', 'reach the left button and stay']


@pytest.fixture(scope='module')
def chat(): return Chat(small_chat_tokenizer([*tells, *says]))


def tiny(chat, **kw):
    torch.manual_seed(0)
    m = Qwen2VL(tiny_config(len(chat.tokenizer), chat.image_id, **{**dict(width=64, depth=2, vision_width=32, vision_depth=2), **kw})).eval()
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn_like(p)*.1)    # nothing is zero or one
    return m


def small_25(chat):
    "A Qwen2.5-VL with windowed attention"
    from transformers import Qwen2_5_VLConfig
    torch.manual_seed(0)
    return Qwen2VL(Qwen2_5_VLConfig(image_token_id=chat.image_id, tie_word_embeddings=True,
        text_config=dict(vocab_size=len(chat.tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
            rope_parameters=dict(rope_type='default', rope_theta=1e4, mrope_section=[2, 3, 3])),
        vision_config=dict(depth=2, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=48, patch_size=8, window_size=32, fullatt_block_indexes=[1]))).eval()


def batch(chat, model, b=4, n=2, answers=True, seed=0, size=(48, 64)):
    images = torch.randint(0, 256, (b, n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    tokens = (model.budget(*size).tokens,)*n
    out = chat.batch([tells[i%2] for i in range(b)], tokens, [says[i%3] for i in range(b)] if answers else None)
    labels = out.pop('labels')
    out['pixel_values'], out['image_grid_thw'] = model.patches(images)
    return out, labels


# the recorded fork (DexVLA, transformers 4.45)

def fork_model(rec):
    from transformers import Qwen2VLConfig
    c = Qwen2VLConfig(image_token_id=rec['image_id'], tie_word_embeddings=True, vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2),
        text_config=dict(vocab_size=rec['embed'].shape[0], hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
            rms_norm_eps=1e-6, rope_parameters=dict(rope_type='default', rope_theta=1e6, mrope_section=[2, 1, 1])))
    m = Qwen2VL(c).eval()
    weights = from_fork({**rec['state_dict'], 'model.embed_tokens.weight': rec['embed']})
    m.load_state_dict({f'vlm.{k}': v for k,v in weights.items()})
    return m


@pytest.fixture(scope='module')
def rec(): return torch.load(here/'fixtures/qwen2vl.pt', weights_only=True)


@torch.no_grad()
def test_recorded_fork(rec):
    "Positions exact; image embeddings, hidden states and logits to 1e-5"
    m = fork_model(rec)
    x, mask, types = rec['inputs'], rec['inputs']['attention_mask'], (rec['inputs']['input_ids'] == rec['image_id']).long()
    place,delta = mrope_positions(types == 1, mask, x['image_grid_thw'])
    assert torch.equal(place[:, mask], rec['position_ids'][:, mask])
    np.testing.assert_array_equal(delta, rec['rope_deltas'] + (~mask).sum(1, keepdim=True))    # the fork counts from the padded row's start
    eyes = m.vlm.model.get_image_features(x['pixel_values'], x['image_grid_thw']).pooler_output
    assert (torch.cat(eyes) - rec['image_embeds']).abs().max() < 1e-5
    h = m(x['input_ids'], mask, types, x['pixel_values'], x['image_grid_thw'])
    assert (h - rec['hidden_states'])[mask].abs().max() < 1e-5
    logits = m.vlm.lm_head(h[:,:-1][x['labels'][:,1:] != -100])
    assert (logits[:len(rec['logits_at_answer']), rec['columns']] - rec['logits_at_answer']).abs().max() < 1e-4*rec['logits_at_answer'].abs().max()


def test_recorded_speech(rec):
    "The fork's greedy tokens (its recording forced the end as the fifth), and its hidden states, which lack the last token; ours have it"
    m, said = fork_model(rec), rec['said']
    ids, x = said['prompt'], rec['inputs']
    r = m.generate(ids, torch.ones_like(ids, dtype=torch.bool), (ids == rec['image_id']).long(), x['pixel_values'][:32], x['image_grid_thw'][:2], rec['end_id'], rec['pad_id'], 5)
    assert torch.equal(torch.cat([ids, r.ids], 1)[:,:-1], said['output_ids'][:,:-1])
    assert r.hidden.shape[1] == said['hidden_states'].shape[1] + 1
    assert (r.hidden[:,:-1] - said['hidden_states']).abs().max() < 1e-5


# images

class Reference:
    "transformers' whole processor; its constructor alone wants a video processor, and that torchvision"
    def __init__(self, tokenizer, patch):
        from transformers import Qwen2VLProcessor
        p = self.p = object.__new__(Qwen2VLProcessor)
        p.image_processor, p.tokenizer, p.video_processor, p.chat_template = image_processor(patch), tokenizer, None, tokenizer.chat_template
        p.image_token, p.video_token = '<|image_pad|>', '<|video_pad|>'
        p.image_token_id, p.video_token_id = tokenizer.convert_tokens_to_ids([p.image_token, p.video_token])

    def __call__(self, images, text):
        from PIL import Image
        talk = [{'role': 'user', 'content': [{'type': 'image'}]*len(images) + [{'type': 'text', 'text': text}]}]
        return self.p(images=[Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], text=[self.p.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)], return_tensors='pt')


@pytest.mark.parametrize('h,w,patch,levels', [(64, 64, 8, 0), (224, 224, 14, 0), (56, 84, 14, 0), (240, 320, 14, 2), (480, 640, 14, 2), (274, 146, 14, 2), (30, 40, 14, 2)])
def test_processor(chat, h, w, patch, levels):
    "Patches, grid, prompt and types are the processor's own; a resize may differ by two grey levels in 255"
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))*255, size=(h, w), mode='bicubic').clamp(0, 255).byte()
    noise = torch.randint(0, 256, (2, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for images in (smooth, noise):
        ref, (x,grid), cost = Reference(chat.tokenizer, patch)(images, tells[0]), to_patches(images[None], patch), budget(h, w, patch)
        assert torch.equal(grid, ref['image_grid_thw']) and len(x) == 2*cost.patches
        assert (x - ref['pixel_values']).abs().max() < 1e-6 + 1.01*levels/255/.26130258
        got = collate([chat.prompt(tells[0], (cost.tokens,)*2)], None, chat.pad_id, chat.image_id)
        assert torch.equal(got['input_ids'], ref['input_ids']) and torch.equal(got['mm_token_type_ids'], ref['mm_token_type_ids'].long())


def test_budget_is_smart_resize():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    for h,w in np.random.default_rng(0).integers(20, 2000, (200, 2)).tolist():
        b = budget(h, w)
        assert (b.height, b.width) == smart_resize(h, w, 28, 56*56, 28*28*1280)
        assert b.patches == 4*b.tokens == b.height*b.width//196


@torch.no_grad()
def test_history_is_the_video_path(chat):
    "Two frames cost the tokens of one; four frames give what transformers computes for a video"
    m = tiny(chat)
    frames = torch.randint(0, 256, (2, 1, 4, 3, 64, 64), dtype=torch.uint8)
    assert m.budget(64, 64, frames=2).tokens == m.budget(64, 64).tokens
    x,grid = m.patches(frames)
    tokens = m.budget(64, 64, frames=4).tokens
    assert grid.tolist() == [[2, 8, 8]]*2
    b = chat.batch(tells, (tokens,))
    ids, mask, types = b['input_ids'], b['attention_mask'], b['mm_token_type_ids']
    h = m(ids, mask, types, x, grid)
    m.vlm.config.video_token_id = chat.tokenizer.convert_tokens_to_ids('<|video_pad|>')
    film = ids.masked_fill(types == 1, m.vlm.config.video_token_id)
    ref = m.vlm.model(input_ids=film, attention_mask=mask, mm_token_type_ids=2*types, pixel_values_videos=x, video_grid_thw=grid).last_hidden_state
    assert (h - ref)[mask].abs().max() < 1e-5
    same = frames[:,:,:1].expand(-1, -1, 2, -1, -1, -1)
    assert torch.equal(m.patches(same)[0], m.patches(frames[:,:,0])[0])    # one frame is shown twice


@torch.no_grad()
def test_cameras_of_two_sizes(chat):
    "Two calls, joined, are the images one after the other in each row"
    m = tiny(chat)
    images = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
    cut = [to_patches(images[:,:1], 8), to_patches(images[:,1:], 8, min_pixels=32*32, max_pixels=32*32)]
    x,grid = join_cameras(*cut, rows=2)
    assert grid.tolist() == [[1, 8, 8], [1, 4, 4]]*2
    b = chat.batch(tells, (16, 4))
    h = m(b['input_ids'], b['attention_mask'], b['mm_token_type_ids'], x, grid)
    k = b['attention_mask'][1]
    one = m(b['input_ids'][1:,k], b['attention_mask'][1:,k], b['mm_token_type_ids'][1:,k], torch.cat([cut[0][0][64:], cut[1][0][16:]]), grid[2:])
    assert (one[0] - h[1,k]).abs().max() < 1e-5


@pytest.mark.parametrize('make', [tiny, small_25])
def test_positions(chat, make):
    "M-RoPE without a loop is transformers' own, for any mixture of grids"
    m, g = make(chat), torch.Generator().manual_seed(0)
    for trial in range(5):
        grids = [[tuple((torch.randint(1, 4, (3,), generator=g)*torch.tensor([1, 2, 2])).tolist()) for _ in range(2)] for _ in range(3)]
        rows = [chat.prompt(t, tuple(t_*h*w//4 for t_,h,w in gs)) for t,gs in zip([*tells, 'go'], grids)]
        b, grid = collate(rows, None, chat.pad_id, chat.image_id), torch.tensor(sum(grids, []))
        mask, types = b['attention_mask'], b['mm_token_type_ids']
        ref,delta = m.vlm.model.get_rope_index(b['input_ids'], types, image_grid_thw=grid, attention_mask=mask)
        place,ours = mrope_positions(types == 1, mask, grid)
        assert torch.equal(place, ref) and torch.equal(ours, delta)


# the model

@torch.no_grad()
@pytest.mark.parametrize('make', [tiny, small_25])
def test_spoken_is_teacher_forced(chat, make):
    "Hidden states of greedy speech are those of one pass over the same text, the last token included (T3)"
    m = make(chat)
    b,_ = batch(chat, m, answers=False)
    if make is tiny:    # let rows end at different times: <|im_end|> is what the first row says third
        r = m.generate(**b, end_id=-1, pad_id=chat.pad_id, max_new_tokens=8)
        end = int(r.ids[0,2])
    else: end = -1
    r = m.generate(**b, end_id=end, pad_id=chat.pad_id, max_new_tokens=8)
    rows = [ids[k].numpy() for ids,k in zip(r.ids, r.text)]
    if make is tiny: assert len(rows[0]) == 3 and rows[0][-1] == end and not r.text[0,3:].any()
    full = collate([ids[k].numpy() for ids,k in zip(b['input_ids'], b['attention_mask'])], rows, chat.pad_id, chat.image_id)
    h = m(full['input_ids'], full['attention_mask'], full['mm_token_type_ids'], b['pixel_values'], b['image_grid_thw'])
    said = full['labels'] != -100
    for i in range(len(rows)):
        assert (h[i][said[i]] - r.hidden[i][r.answer[i]]).abs().max() < 1e-5
        assert (h[i][full['attention_mask'][i] & ~said[i]] - r.hidden[i][r.prompt[i]]).abs().max() < 1e-5
        assert torch.equal(full['input_ids'][i][said[i]], r.ids[i][r.text[i]])


@torch.no_grad()
def test_alone_or_in_a_batch(chat):
    "Left padding changes nothing"
    m = tiny(chat)
    b,_ = batch(chat, m)
    h, per = m(**b), len(b['pixel_values'])//4
    one = m(b['input_ids'][:1][b['attention_mask'][:1]][None], torch.ones(1, int(b['attention_mask'][0].sum()), dtype=torch.bool),
        b['mm_token_type_ids'][:1][b['attention_mask'][:1]][None], b['pixel_values'][:per], b['image_grid_thw'][:2])
    assert (one[0] - h[0][b['attention_mask'][0]]).abs().max() < 1e-5


def test_loss_is_the_stock_loss(chat):
    "The same mean and gradients as transformers' own, without logits of the prompt; nothing said: zero, not NaN"
    m = tiny(chat)
    b, labels = batch(chat, m)
    loss,n = m.answer_loss(m(**b), labels)
    stock = m.vlm(**b, labels=labels).loss
    assert torch.allclose(loss, stock, atol=1e-6) and n == (labels != -100).sum()
    w = m.vlm.model.language_model.layers[0].mlp.up_proj.weight
    assert torch.allclose(*(torch.autograd.grad(l, w)[0] for l in (loss, stock)), atol=1e-6)
    none,n = m.answer_loss(m(**b), torch.full_like(labels, -100))
    assert none == 0 and n == 0
    none.backward()


@pytest.mark.parametrize('make', [tiny, small_25])
def test_checkpointing_changes_no_gradient(chat, make):
    m = make(chat).train()
    b, labels = batch(chat, m)
    grads = []
    for on in (False, True):
        set_checkpointing(m, on)
        m.zero_grad()
        m.answer_loss(m(**b), labels)[0].backward()
        grads.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(*grads, strict=True))
    set_checkpointing(m, False)


# names, folders, sizes

def test_folders(chat, tmp_path):
    "A folder comes back the same, under transformers' names and under published ones; a missing or misshapen tensor is an error"
    for make in (tiny, small_25):
        m = make(chat)
        folder = save_qwen2vl(m, tmp_path/make.__name__)
        state = load_qwen2vl(folder).state_dict()
        assert state.keys() == m.state_dict().keys() and all(torch.equal(v, state[k]) for k,v in m.state_dict().items())
        fork = to_fork({k.removeprefix('vlm.'): v for k,v in m.state_dict().items()})
        assert all(k.startswith(('visual.', 'model.')) and 'language_model' not in k for k in fork)
        assert {f'vlm.{k}' for k in from_fork(fork)} == m.state_dict().keys()
        save_file(fork, folder/'model.safetensors', metadata={'format': 'pt'})
        state = load_qwen2vl(folder).state_dict()
        assert all(torch.equal(v, state[k]) for k,v in m.state_dict().items())
        lost = dict(fork)
        del lost['visual.blocks.1.attn.proj.bias']
        save_file(lost, folder/'model.safetensors', metadata={'format': 'pt'})
        with pytest.raises(ValueError, match='missing_keys.*blocks.1.attn.proj.bias'): load_qwen2vl(folder)
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps({**config, 'model_type': 'llama'}))
    with pytest.raises(ValueError, match='model_type'): load_qwen2vl(folder)
    with pytest.raises(FileNotFoundError, match='config.json'): load_qwen2vl(tmp_path)


def test_a_state_dict_names_a_tied_tensor_once(chat):
    m, n = tiny(chat), tiny(chat)
    torch.nn.init.zeros_(n.vlm.lm_head.weight)
    assert 'vlm.lm_head.weight' not in m.state_dict()
    n.load_state_dict(m.state_dict())
    assert n.vlm.lm_head.weight is n.vlm.model.language_model.embed_tokens.weight and torch.equal(n.vlm.lm_head.weight, m.vlm.lm_head.weight)


@pytest.mark.parametrize('config,params,tensors', [(qwen2vl_2b, 2_208_985_600, 729), (qwen25vl_3b, 3_754_622_976, 824)])
def test_published_sizes(config, params, tensors):
    m = on_meta(config())
    assert sum(p.numel() for p in m.parameters()) == params and len(m.state_dict()) == tensors
    assert all(p.is_meta for p in m.parameters())
    names = to_fork({k.removeprefix('vlm.'): v for k,v in m.state_dict().items()})
    depth = m.config.text_config.num_hidden_layers
    for k in ('visual.patch_embed.proj.weight', 'visual.blocks.31.attn.qkv.bias', 'visual.merger.mlp.2.weight', 'model.embed_tokens.weight', 'model.norm.weight',
        f'model.layers.{depth-1}.self_attn.k_proj.bias', f'model.layers.{depth-1}.mlp.down_proj.weight'): assert k in names
    assert tuple(names['visual.patch_embed.proj.weight'].shape) == (1280, 3, 2, 14, 14) and 'lm_head.weight' not in names


@pytest.mark.parametrize('make,vision,language', [(tiny, 2*4, 2*7), (small_25, 2*5, 2*7)])
def test_lora_targets_exist(chat, make, vision, language):
    "Each name is a linear layer of a block, and each part can be had alone (T16)"
    m = make(chat)
    for v,l,count in ((True, True, vision+language), (True, False, vision), (False, True, language)):
        names = lora_targets(m, v, l)
        assert len(names) == count and all(isinstance(m.get_submodule(n), torch.nn.Linear) for n in names)
        assert all(('.visual.' in n and v) or ('.language_model.' in n and l) for n in names) and not any('merger' in n or 'lm_head' in n for n in names)


# the chat

def test_chat(chat):
    p, a = chat.prompt(tells[0], (3, 2)), chat.answer(says[0])
    text = chat.tokenizer.decode(p)
    assert text == ('<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n' + '<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>'
        '<|vision_start|><|image_pad|><|image_pad|><|vision_end|>' + f'{tells[0]}<|im_end|>\n<|im_start|>assistant\n')
    assert chat.tokenizer.decode(a) == f'{says[0]}Next action:<|im_end|>'
    assert chat.tokenizer.decode(chat.answer(None)) == '<|im_end|>'
    assert chat.prompt(tells[0], (3, 2)) is p and chat.answer(says[0]) is a
    b = chat.batch(tells, (3,), [says[0], None])
    assert chat.read(b['input_ids'], b['labels'] != -100) == [says[0], '']


def test_specials_are_not_words(chat):
    "A pad or end token inside a text would shift windows or end the turn (T7): refused"
    for bad in ('press <|im_end|>', '<|endoftext|>', 'see <|image_pad|> this'):
        with pytest.raises(ValueError, match='special token'): chat.prompt(bad, (1,))
        with pytest.raises(ValueError, match='special token'): chat.answer(bad)


def test_small_tokenizer_is_exact(chat, tmp_path):
    from transformers import AutoTokenizer
    chat.tokenizer.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in (*tells, *says, 'Zürich — 42 µm\n\ttab', '按下红色按钮'):
        ids = chat.tokenizer(text)['input_ids']
        assert chat.tokenizer.decode(ids) == text and back(text)['input_ids'] == ids
    assert np.array_equal(Chat(back).prompt(tells[0], (4,)), chat.prompt(tells[0], (4,)))


def test_collate_pads_left(chat):
    rows, says_ = [np.arange(1, 4), np.arange(1, 6)], [np.array([7]), np.array([8, 9])]
    b = collate(rows, says_, 0, 2)
    assert b['input_ids'].tolist() == [[0, 0, 0, 1, 2, 3, 7], [1, 2, 3, 4, 5, 8, 9]]
    assert b['labels'].tolist() == [[-100]*6 + [7], [-100]*5 + [8, 9]]
    assert b['attention_mask'].tolist() == [[False]*3 + [True]*4, [True]*7]
    assert b['mm_token_type_ids'].tolist() == [[0, 0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0]]
    assert (collate(rows, None, 0, 2)['labels'] == -100).all()
