"The smallest policy with everything a training loop can get wrong: padding, noise, dropout, a frozen part, two groups"
import hashlib
from dataclasses import dataclass, replace

import torch
from torch import nn

from vla_nb.core import Batch, Losses, ParamGroup, Policy, draw_normal, masked_mean
from vla_nb.train.config import TrainConfig


@dataclass(frozen=True)
class ToyConfig:
    width:int = 16
    dropout:float = 0.


class Toy(Policy):
    name, Config = 'toy', ToyConfig

    def __init__(self, config, stats=None, tokenizer=None):
        super().__init__(config, stats or {'action': {'mean': [0., 0.]}})
        self.frozen = nn.Linear(3, 3)
        self.net = nn.Sequential(nn.Linear(3, config.width), nn.LayerNorm(config.width), nn.GELU(), nn.Dropout(config.dropout))
        self.out = nn.Linear(config.width, 8)

    def loss(self, batch):
        x = self.frozen(batch['state']) + .1*draw_normal(batch['seed'], 3)
        pred = self.out(self.net(x)).reshape(-1, 4, 2)
        loss, n = masked_mean((pred-batch['action']).square(), ~batch['is_pad'])
        size, _ = masked_mean(pred.abs(), ~batch['is_pad'])
        return Losses(loss + .01*size, {'mse': loss, 'size': size}, n)

    def groups(self):
        of = lambda *parts: {k: p for k,p in self.named_parameters() if k.split('.')[0] in parts}
        return [ParamGroup('frozen', of('frozen'), trainable=False), ParamGroup('net', of('net'), lr=.5), ParamGroup('out', of('out'), weight_decay=.01)]


def new(seed=0, **config):
    torch.manual_seed(seed)
    return Toy(ToyConfig(**config))


def windows(n=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    state = torch.randn(n, 3, generator=g)
    action = torch.stack([(state*k).sin()[:,1:] for k in (.5, 1, 1.5, 2)], 1)
    return Batch(state=state, action=action, is_pad=torch.arange(4) >= torch.randint(1, 5, (n, 1), generator=g), seed=torch.arange(n))


def loader(batch_size, data=None):
    "Global batch of micro-step k is a function of k; process r of w takes rows r, r+w, ... of it"
    data = windows() if data is None else data
    def make(start, rank, world):
        n, per = len(data['seed']), batch_size*world
        for k in range(start, 10**9):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(k//(n//per)))
            yield Batch({x: v[order[k%(n//per)*per:][:per][rank::world]] for x,v in data.items()})
    return make


def settings(**kw):
    return TrainConfig(**{**dict(steps=30, batch_size=8, lr=1e-2, warmup=3, ema=.9, eval_every=0, save_every=5, log_every=4, progress=False, cpu=True), **kw})


def curve(rows):
    "What must be equal: everything but the speed"
    return [{k: v for k,v in r.items() if k != 'samples_per_s'} for r in rows]


def digest(folder):
    "One hash over every tensor file of a checkpoint"
    h = hashlib.sha256()
    for p in sorted(folder.rglob('*.safetensors')): h.update(p.relative_to(folder).as_posix().encode() + p.read_bytes())
    return h.hexdigest()


class Block(nn.Module):
    "What an engine gathers in one piece"
    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(width), nn.Linear(width, width)

    def forward(self, x): return x + self.mlp(self.norm(x)).tanh()


class Deep(Toy):
    "Blocks in a list, and a last matrix that is the embedding's (dropped from the state, as a policy that can be saved does)"
    name = 'deep'

    def __init__(self, config, stats=None, tokenizer=None):
        super().__init__(config, stats)
        self.embed, self.blocks = nn.Embedding(5, 8), nn.ModuleList([Block(8), Block(8)])
        self.read = nn.Linear(8, 5, bias=False)
        self.read.weight = self.embed.weight
        self.register_state_dict_post_hook(lambda m, state, prefix, _: [None, state.pop(f'{prefix}read.weight', None)][0])
        self.register_load_state_dict_pre_hook(lambda m, state, prefix, *_: state.__setitem__(f'{prefix}read.weight', state[f'{prefix}embed.weight']))

    def loss(self, batch):
        l, word = super().loss(batch), batch['seed'] % 5
        h = self.embed(word)
        for b in self.blocks: h = b(h)
        ce = nn.functional.cross_entropy(self.read(h), (word+1) % 5, reduction='none')
        ce, _ = masked_mean(ce[:,None].expand(-1, 4), ~batch['is_pad'])
        return Losses(l.total + ce, {**l.parts, 'ce': ce.detach()}, l.count)

    def groups(self):
        of = lambda *parts: {k: p for k,p in self.named_parameters() if k.split('.')[0] in parts}
        return [*super().groups(), ParamGroup('words', of('embed', 'blocks'), lr=2.)]


def deep(seed=0, **config):
    torch.manual_seed(seed)
    return Deep(ToyConfig(**config))


class Several(Deep):
    "A part with what would be an optimiser of its own"
    name = 'several'

    def groups(self):
        *rest,words = super().groups()
        return [*rest, replace(words, betas=(.9, .999), eps=1e-6, weight_decay=.1, schedule='constant', warmup=2, clip=.05, delay=2)]


def several(seed=0, **config):
    torch.manual_seed(seed)
    return Several(ToyConfig(**config))
