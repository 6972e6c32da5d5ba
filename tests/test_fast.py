"The action tokenizer, beyond its page: no sequence of tokens explodes, whatever it was fitted to"
import json

import numpy as np, pytest

from vla_nb.data.convert import convert, hdf5
from vla_nb.data.dataset import DataConfig, open_source, train_val
from vla_nb.data.episode import ArraySource, Episode
from vla_nb.data.stats import compute_stats
from vla_nb.fast_fit import FastFit, fast_fit, read_fast, whole_chunks, with_fast
from vla_nb.policies.pi05 import Pi05
from vla_nb.policies.pi_config import Pi05Config, fast_to_config, plain_fast
from vla_nb.text.fast import coefficients, fit_fast, from_coefficients, save_fast
from vla_nb.text.fast_extend import extend_fast, join_pair

rng = np.random.default_rng(0)
n = 100_000


def motions(n, horizon, dims):
    t = np.linspace(0, 1, horizon)[:,None]
    f, p, a = (rng.uniform(*r, (n, 1, dims)) for r in ((.2, 1.5), (0, 6), (.3, 1)))
    return a*np.sin(2*np.pi*f*t + p)


def sentences(words, lengths):
    return [x.tolist() for x in np.split(rng.integers(0, words, lengths.sum()), np.cumsum(lengths)[:-1])]


def inside(fast, actions):
    least, most = np.array(fast.bounds)
    return np.isfinite(actions).all() and (actions >= least-fast.slack).all() and (actions <= most+fast.slack).all()


@pytest.fixture(scope='module')
def fast():
    x = motions(400, 8, 4)
    x[...,3] = x[...,3] > 0    # a gripper
    return fit_fast(x, vocab=400)


def test_100_000_random_sequences_stay_in_the_fitted_range(fast):
    actions, ok = fast.decode(sentences(fast.vocab, rng.integers(0, 41, n)))
    assert actions.shape == (n, 8, 4) and inside(fast, actions)
    assert 100 < ok.sum() < n and not np.abs(actions[~ok]).any(), 'some mean a chunk, the others are zeros'
    assert np.abs(actions[ok]).max() > 1, 'and those that do are not all small'


def test_random_chunks_of_the_right_length_stay_in_the_fitted_range(fast):
    "Every number random: as far from a motion as words can go"
    q = fast.sayable[rng.integers(0, fast.high-fast.low+1, (n//5, 32))]
    codes = fast.tokenizer.encode_batch([''.join(map(chr, r)) for r in q])
    actions, ok = fast.decode([e.ids for e in codes])
    assert ok.all() and inside(fast, actions)
    raw = from_coefficients((q + fast.low).reshape(-1, 8, 4), fast.scale)
    assert np.abs(raw).max() > 5, 'without the guard they would have been far outside'


def test_100_000_sentences_with_one_wrong_word_stay_in_the_fitted_range(fast):
    ids = [list(x) for x in fast.encode(motions(10_000, 8, 4))]*10
    ids = [x.copy() for x in ids]
    for x,at,word in zip(ids, rng.random(n), rng.integers(0, fast.vocab, n)): x[int(at*len(x))] = int(word)
    actions, ok = fast.decode(ids)
    assert inside(fast, actions) and .02 < ok.mean() < 1


def test_decoding_a_batch_is_decoding_one_by_one(fast):
    ids = [*fast.encode(motions(20, 8, 4)), *sentences(fast.vocab, rng.integers(0, 41, 200)), []]
    actions, ok = fast.decode(ids)
    for x,a,k in zip(ids, actions, ok):
        b, one = fast.decode([x])
        assert one[0] == k and np.array_equal(a, b[0])
    none, ok = fast.decode([])
    assert none.shape == (0, 8, 4) and ok.shape == (0,)


def test_round_trip_is_off_by_no_more_than_the_bound(fast):
    x = motions(1000, 8, 4)
    x = np.clip(x, *np.array(fast.bounds))
    back, ok = fast.decode(fast.encode(x))
    off = coefficients(x, fast.scale)
    said = (off >= fast.low) & (off <= fast.high)
    assert ok.all() and np.abs(back-x)[said.all((1, 2))].max() < 2*fast.slack
    rmse = ((back-x)**2).mean((0, 1))**.5
    assert (rmse[:3] < 1/12**.5/fast.scale).all(), rmse


@pytest.mark.parametrize('seed', range(20))
def test_pairs_are_joined_as_one_would_by_hand(seed):
    r = np.random.default_rng(seed)
    x = r.integers(-1, 3, 60)
    for a,b in ((0, 1), (1, 1), (2, 2)):
        want, i = [], 0
        while i < len(x):
            two = i+1 < len(x) and x[i] == a and x[i+1] == b
            want.append(9 if two else int(x[i]))
            i += 1 + two
        assert join_pair(x, a, b, 9).tolist() == want


@pytest.mark.parametrize('start', ['bytes', 'plain'])
def test_extending_makes_other_words_for_the_same_numbers(start):
    x = motions(300, 8, 3)
    full = fit_fast(x, vocab=200)
    old = full if start == 'bytes' else plain_fast(8, 3, bound=2.)
    more = extend_fast(old, x, old.vocab + 40)
    mine, first = more.encode(x), extend_fast(old, x, 0)
    assert more.vocab == old.vocab + 40 and sum(map(len, mine)) < sum(map(len, old.encode(x)))
    for a,b in zip(more.decode(mine), first.decode(old.encode(x))): assert np.array_equal(a, b)


def episodes(n=8, l=30):
    return ArraySource([Episode(dict(front=np.full((l, 16, 16, 3), 40*i % 255, np.uint8)), *2*[motions(1, l, 3)[0].astype(np.float32)], 'swing', subtask=['to and fro']*l) for i in range(n)])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp('fast')/'data'
    convert(episodes(), out, hdf5(None), progress=False)
    return out


def test_fit_on_demonstrations_and_speak_with_it(data, tmp_path, capsys):
    out = tmp_path/'fast.json'
    fast_fit(FastFit(data, out, horizon=6, vocab=300, val_fraction=.25))
    said = capsys.readouterr().out
    assert 'binning each number takes 18' in said and 'vla-nb train --policy pi05' in said and (tmp_path/'fast.png').stat().st_size > 1000
    windows, held_out = train_val(open_source(data), DataConfig(val_fraction=.25), 6)
    stats = compute_stats(windows)
    fast = read_fast(out, 6, 3)
    small = Pi05Config(width=32, hidden=32, expert_width=32, expert_hidden=32, depth=1, vision_width=32, vision_depth=1, image=16)
    policy, plain = (Pi05.from_data(small, ['swing', 'to and fro'], stats, fast=f) for f in (fast, None))
    x = policy.action_norm(windows.chunk(np.arange(4))[0]).numpy()
    assert policy.fast.encode(x) == fast.encode(x)
    batch, longer = (p.prepare(windows.samples(np.arange(4))) for p in (policy, plain))
    assert batch['ids'].shape[1] < longer['ids'].shape[1], 'fewer words'
    assert policy.loss(batch).total.isfinite() and fast_to_config(fast) == with_fast(small, out, 3).fast


def test_whole_chunks_are_those_without_padding(data):
    windows,_ = train_val(open_source(data), DataConfig(val_fraction=0.), 7)
    idx = np.arange(len(windows))
    action, pad = windows.chunk(idx)
    want = action[~pad.any(1)]
    got = whole_chunks(windows, lambda x: x)
    assert got.shape == want.shape and np.array_equal(got, want.double().numpy())
    assert len(whole_chunks(windows, lambda x: x, most=11)) == 11


def test_mistakes_are_named_with_their_mend(data, tmp_path, fast):
    folder = save_fast(fast, tmp_path/'folder')
    x = motions(3, 8, 4)
    assert read_fast(folder, 8, 4).encode(x) == fast.encode(x)
    for call,says in ((lambda: read_fast(folder, 6, 4), 'horizon: expected 6'),
                      (lambda: read_fast(folder, 8, 3), 'dims: expected 3'),
                      (lambda: fast_fit(FastFit(data, tmp_path/'x.json', horizon=31)), 'horizon: expected at most 30'),
                      (lambda: fast_fit(FastFit(data, tmp_path/'x.json', adapt=folder, scale=20.)), '--scale: expected 10'),
                      (lambda: fast_fit(FastFit(data, tmp_path/'x.json', vocab=20)), 'vocab: expected at least'),
                      (lambda: FastFit(data, tmp_path/'x.json', horizon=0), 'horizon: expected at least 1')):
        with pytest.raises(ValueError, match=says): call()
    with pytest.raises(FileNotFoundError, match='vla-nb fast-fit'): read_fast(tmp_path/'none.json', 6, 4)
    (tmp_path/'odd.json').write_text('{"report": 1}')
    with pytest.raises(ValueError, match='odd.json: fast: expected'): read_fast(tmp_path/'odd.json', 6, 4)
    assert not (tmp_path/'x.json').exists() and not (tmp_path/'x.png').exists()


def test_adapting_a_released_folder(data, tmp_path, capsys):
    "A released folder has settings of another kind, no largest number and no chunk size"
    old = fit_fast(motions(400, 20, 7), vocab=500)
    folder = tmp_path/'released'
    folder.mkdir()
    (folder/'tokenizer.json').write_text(old.tokenizer.to_str())
    (folder/'processor_config.json').write_text(json.dumps(dict(scale=old.scale, min_token=old.low, time_horizon=None, action_dim=None)))
    for vocab in (100, 600):
        fast_fit(FastFit(data, tmp_path/'a.json', vocab=vocab, adapt=folder))
        new = read_fast(tmp_path/'a.json', 6, 3)
        assert new.vocab == max(vocab, 500) and all(new.tokenizer.id_to_token(i) == old.tokenizer.id_to_token(i) for i in range(500))
    assert json.loads((tmp_path/'a.json').read_text())['report']['adapted'] == 'released'


def test_the_commands_fit_and_train(data, tmp_path, capsys):
    "vla-nb fast-fit, then vla-nb train --fast: the saved policy speaks with the fitted tokenizer; one for other chunks is refused"
    from vla_nb.cli import main
    from vla_nb.run import load_policy
    assert main(['fast-fit', str(data), '--out', str(tmp_path/'f.json'), '--vocab', '300', '--val-fraction', '.25']) == 0
    words = ['train', '--policy', 'pi05', '--data', str(data), '--fast', str(tmp_path/'f.json'), '--steps', '1', '--batch-size', '4', '--threads', '0', '--no-progress', '--cpu', '--warmup', '0',
             '--height', '16', '--width', '16', '--model.image', '16', '--model.patch', '8', '--model.depth', '1', '--model.vision-depth', '1', '--val-fraction', '.25']
    assert main([*words, '--out', str(tmp_path/'run')]) == 0
    spoken = load_policy(tmp_path/'run').fast
    assert fast_to_config(spoken) == fast_to_config(read_fast(tmp_path/'f.json', 6, 3))
    capsys.readouterr()
    assert main([*words, '--out', str(tmp_path/'no'), '--model.horizon', '8']) == 2
    assert 'horizon: expected 8' in capsys.readouterr().err
