"The action tokenizer, beyond its page: no sequence of tokens explodes, whatever it was fitted to"
import numpy as np, pytest

from vla_nb.text.fast import Fast, coefficients, fit_fast, from_coefficients

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
